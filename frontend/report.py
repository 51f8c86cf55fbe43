"""report.html: one static page about a plan, for people without weft at hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files

from jinja2 import Environment

from ..ir.module import Module
from ..ir.text import print_module
from ..ir.types import Mesh
from .describe import collectives, diff, human_bytes, memory_by_role, parameters

#: a page stays readable, and opens fast, with this many lines of a dump or ranks of a mesh
_MAX_LINES, _MAX_RANKS, _MAX_ROWS = 1500, 64, 400


@dataclass(frozen=True)
class Dump:
    """The module after a pass."""

    name: str
    module: Module
    note: str = ""


@dataclass(frozen=True)
class _Shown:
    name: str
    note: str
    lines: list[str]


def _passes(dumps: Sequence[Dump]) -> list[_Shown]:
    """The first dump whole, every other as what its pass changed (whole at a new level)."""
    shown = []
    previous: Dump | None = None
    for dump in dumps:
        if previous is not None and previous.module.level == dump.module.level:
            lines = diff(previous.module, dump.module, (previous.name, dump.name)).splitlines()
        else:
            lines = print_module(dump.module).splitlines()
        if len(lines) > _MAX_LINES:
            lines = [*lines[:_MAX_LINES], f"... {len(lines) - _MAX_LINES} more lines in ir/"]
        count = sum(len(f.ops) for f in dump.module.functions)
        note = (
            f"{dump.module.level}, {len(dump.module.functions)} functions, {count} ops. {dump.note}"
        )
        shown.append(_Shown(dump.name, note, lines))
        previous = dump
    return shown


def render_report(
    title: str,
    subtitle: str,
    summary: Sequence[tuple[str, str]],
    dumps: Sequence[Dump],
    spmd: Module,
) -> str:
    """The page as text.

    Args:
        summary: rows of the first table.
        dumps: the module after each pass.
        spmd: the module whose collectives and placements are shown.
    """
    mesh = spmd.mesh or Mesh()
    memory = memory_by_role(spmd)
    largest = max(memory.values(), default=1) or 1
    environment = Environment(autoescape=True, trim_blocks=True)
    environment.filters["human"] = human_bytes
    template = environment.from_string(
        files("weft.frontend").joinpath("report.html.j2").read_text()
    )
    ranks = [
        (rank, ", ".join(f"{n}={c}" for n, c in zip(mesh.names, mesh.coord(rank), strict=True)))
        for rank in range(min(mesh.size, _MAX_RANKS))
    ]
    return template.render(
        title=title,
        subtitle=subtitle,
        summary=summary,
        columns=min(mesh.sizes[-1] if mesh.sizes else 1, 16),
        ranks=ranks,
        hidden_ranks=max(0, mesh.size - _MAX_RANKS),
        memory=[
            (role, human_bytes(size), round(100 * size / largest)) for role, size in memory.items()
        ],
        collectives=collectives(spmd)[:_MAX_ROWS],
        parameters=parameters(spmd)[:_MAX_ROWS],
        passes=_passes(dumps),
    )
