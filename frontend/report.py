"""report.html: one static page about a plan, for people without weft at hand.

Everything is inside the page. The texts of the dumps, and each op's place in them, are gzipped and
base64-coded; a small script unpacks them when a difference or a history is asked for.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from typing import Any

from jinja2 import Environment

from ..costmodel.cluster import Cluster
from ..costmodel.simulate import Timeline
from ..costmodel.simulate_memory import MADE
from ..ir.module import Module
from ..ir.opdef import OPS
from ..ir.text import print_module
from ..ir.types import Mesh
from .describe import (
    collectives,
    fallbacks,
    human_bytes,
    human_time,
    memory_by_owner,
    op_line,
    parameters,
    replicated,
    star,
    titled,
)
from .explain import Explanation
from .flat import beginning
from .report_svg import memory_svg, timeline_svg

#: a page opens fast with this many rows of a table, ranks of a mesh and explained ops
_MAX_RANKS, _MAX_ROWS, _MAX_EXPLAINED = 64, 400, 40
#: ranks side by side: the devices of most hosts
_MAX_COLUMNS = 8
#: packed texts of a page; longer ones are cut, the folder `ir/` has them whole
_MAX_PACKED_BYTES = 2_000_000
#: characters of a text for which a page holds one line of an op's history
_CHARACTERS = 50
#: a character of a text brings about this many of the page, whose packing takes about a tenth of
#: them (dumps of Llamas of 8 and 80 layers): a first guess of what fits, halved until it does
_RAW, _PACKING = 5, 12


@dataclass(frozen=True)
class Dump:
    """The module after a pass."""

    name: str
    module: Module
    note: str = ""

    @cached_property
    def text(self) -> str:
        """The module's text."""
        return print_module(self.module)


@dataclass(frozen=True)
class Explained:
    """A row of the table of heavy ops: what one costs, all its repetitions together."""

    name: str
    where: str
    count: int
    split: str
    cost_us: float
    runner_up: str
    more_us: float


def heavy_ops(placed: Module, cluster: Cluster) -> list[Explained]:
    """The contractions of a placed module that cost most, with their runner-up."""
    explanation = Explanation(placed, cluster)
    groups: dict[tuple[str, ...], list[int]] = {}
    for number, op in explanation.matching(""):
        if OPS[op.name].family == "contraction":
            types = ", ".join(str(v.type) for v in (*op.operands, *op.results))
            key = (titled(op), star(op.loc.path), str(dict(op.split)), types)
            groups.setdefault(key, []).append(number)
    rows = []
    for (name, path, *_), numbers in list(groups.items())[:_MAX_EXPLAINED]:
        choice = explanation.op(numbers[0])
        best, count = choice.runner_up, len(numbers)
        cost_us = choice.chosen.total_us
        rows.append(
            Explained(
                name, path, count, choice.chosen.text, cost_us * count,
                best.text if best else "no other is legal",
                (best.total_us - cost_us) * count if best else 0.0,
            )
        )  # fmt: skip
    return sorted(rows, key=lambda row: -row.cost_us)


def _columns(sizes: Sequence[int]) -> int:
    """Ranks in a row of the mesh's picture: the last axes as far as they fit."""
    columns = 1
    for size in reversed(sizes):
        if columns > 1 and columns * size > _MAX_COLUMNS:
            break
        columns *= size
    return min(columns, _MAX_COLUMNS)


def _place(where: str) -> str:
    """A module path and its user's line, without the folders of the file."""
    path, space, line = where.rpartition(" (")
    return f"{path}{space}{line.rpartition('/')[2]}"


def _packed(dumps: Sequence[Dump]) -> str:
    """Texts and histories of the dumps, gzipped, in base64."""
    limit = min(
        max((len(dump.text) for dump in dumps), default=0),
        _MAX_PACKED_BYTES * _PACKING // (_RAW * max(1, len(dumps))),
    )
    paths: dict[str, int] = {}
    lines = [
        [[paths.setdefault(op.loc.path, len(paths)), op_line(op), str(op.loc)]
         for op in beginning(dump.module, limit // _CHARACTERS).entry.ops if op.name != "free"]
        for dump in dumps
    ]  # fmt: skip
    while True:
        payload: list[dict[str, Any]] = []
        for dump, ops in zip(dumps, lines, strict=True):
            cut = "" if len(dump.text) <= limit else "\n// cut: the rest is in the folder ir/"
            payload.append({
                "name": dump.name, "level": dump.module.level, "text": dump.text[:limit] + cut,
                "ops": ops[: limit // _CHARACTERS],
            })  # fmt: skip
        body = json.dumps({"paths": list(paths), "dumps": payload}).encode()
        packed = base64.b64encode(gzip.compress(body, 6, mtime=0)).decode()
        if len(packed) <= _MAX_PACKED_BYTES or limit < 1000:
            return packed
        limit //= 2


def render_report(
    title: str,
    subtitle: str,
    summary: Sequence[tuple[str, str]],
    dumps: Sequence[Dump],
    timeline: Timeline,
    cluster: Cluster,
) -> str:
    """The page as text.

    Args:
        summary: rows of the first table.
        dumps: the module after each pass; the last ones at placed and spmd level are described.
        timeline: the predicted step.
        cluster: prices the alternatives.
    """
    by_level = {dump.module.level: dump.module for dump in dumps}
    spmd = by_level["spmd"]
    mesh = spmd.mesh or Mesh()
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["human"] = human_bytes
    environment.filters["time"] = human_time
    environment.filters["place"] = _place
    source = files("weft.frontend").joinpath("report.html.j2").read_text(encoding="utf-8")
    ranks = [
        (rank, ", ".join(f"{n}={c}" for n, c in zip(mesh.names, mesh.coord(rank), strict=True)))
        for rank in range(min(mesh.size, _MAX_RANKS))
    ]
    owners = memory_by_owner(timeline.at_peak)
    resident = sum(size for kind, _, size in owners if kind not in MADE)
    timeline_picture, tracks = timeline_svg(timeline)
    counts = [(d, sum(len(f.ops) for f in d.module.functions)) for d in dumps]
    return environment.from_string(source).render(
        title=title,
        subtitle=subtitle,
        summary=summary,
        axes=mesh.axes,
        columns=_columns(mesh.sizes),
        ranks=ranks,
        hidden_ranks=max(0, mesh.size - _MAX_RANKS),
        step=human_time(timeline.step_us),
        step_us=timeline.step_us,
        peak=human_bytes(timeline.peak_bytes),
        exposed=human_time(sum(timeline.exposed_us.values())),
        sent=human_bytes(sum(row.bytes for row in collectives(spmd))),
        owners=owners[:_MAX_ROWS],
        largest=max((size for _, _, size in owners), default=1) or 1,
        memory_svg=memory_svg(timeline, resident),
        timeline_svg=timeline_picture,
        tracks=tracks,
        collectives=collectives(spmd)[:_MAX_ROWS],
        heavy=heavy_ops(by_level["placed"], cluster) if "placed" in by_level else [],
        whole=[(op_line(op), str(op.loc)) for op in replicated(spmd)][:_MAX_ROWS],
        fallbacks=fallbacks(spmd)[:_MAX_ROWS],
        parameters=parameters(spmd)[:_MAX_ROWS],
        hidden_parameters=max(0, len(parameters(spmd)) - _MAX_ROWS),
        passes=[
            (d.name, d.module.level, len(d.module.functions), count, d.note) for d, count in counts
        ],
        packed=_packed(dumps),
    )
