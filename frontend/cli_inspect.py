"""`weft inspect`: levels, passes, differences between passes, one op's history, the page."""

from __future__ import annotations

import webbrowser
from collections import Counter
from pathlib import Path

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..costmodel.cluster_json import cluster_of
from ..costmodel.simulate import simulate
from ..ir.errors import RunError, WeftError
from ..ir.module import Module, Op
from ..passes.traffic import Traffic, leftovers, traffic_of
from ..runtime.artifact import Artifact
from ..runtime.kernel_manifest import kernel_folder, kernel_manifest
from .describe import (
    collectives,
    diff,
    fallbacks,
    human_bytes,
    human_time,
    matching,
    memory_by_owner,
    op_line,
    parameters,
    replicated,
)
from .explain_text import explain_path

console = Console(highlight=False)


def _spmd(artifact: Artifact) -> Module:
    """The last dump at spmd level."""
    for path in reversed(artifact.dumps):
        module = artifact.module(path)
        if module.level == "spmd":
            return module
    return artifact.module()


def _overview(artifact: Artifact) -> None:
    info = artifact.info
    table = Table(show_header=False)
    for key in ("target", "cluster", "mesh", "weft", "torch"):
        table.add_row(key, str(info.get(key, "")))
    table.add_row("predicted step", human_time(info["predicted"]["step_us"]))
    table.add_row("predicted memory of a rank", human_bytes(info["predicted"]["memory_bytes"]))
    console.print(table)
    passes = Table("dump", "level", "functions", "ops", "made by")
    for path, made_by in zip(artifact.dumps, info["made_by"], strict=True):
        module = artifact.module(path)
        count = sum(len(f.ops) for f in module.functions)
        passes.add_row(
            path.name, module.level, str(len(module.functions)), str(count), escape(made_by)
        )
    console.print(passes)


def _tables(spmd: Module, limit: int) -> None:
    rows = collectives(spmd)
    table = Table(
        "collective", "axis", "count", "bytes", "carries", "tensor", "where",
        title="collectives of a step",
    )  # fmt: skip
    for row in rows[:limit]:
        size = human_bytes(row.bytes)
        cells = (row.name, row.axis, str(row.count), size, row.carries, row.tensor, row.where)
        table.add_row(*map(escape, cells))
    console.print(table)
    if len(rows) > limit:
        console.print(f"and {len(rows) - limit} more (--limit)")
    params = parameters(spmd)
    table = Table("role", "name", "type and placement", "bytes of a rank", title="parameters")
    for param in params[:limit]:
        shown = escape(str(param.type))
        table.add_row(param.role, param.name, shown, human_bytes(param.bytes))
    console.print(table)
    if len(params) > limit:
        console.print(f"and {len(params) - limit} more (--limit)")
    for target, where, count in fallbacks(spmd):
        console.print(f"falls back to ATen: {target} x {count} at {where}", markup=False)
    for op in replicated(spmd)[:limit]:
        line = f"replicated on every rank: {op_line(op)} at {op.loc}"
        console.print(line, markup=False, soft_wrap=True)


def _memory(artifact: Artifact, limit: int) -> None:
    simulation = simulate(artifact.schedules(), cluster_of(artifact.info))
    table = Table("owner", "", "bytes of a rank", title="memory at the predicted peak")
    rows = memory_by_owner(simulation.at_peak)
    for kind, owner, size in rows[:limit]:
        table.add_row(kind, escape(owner), human_bytes(size))
    console.print(table)
    if len(rows) > limit:
        console.print(f"and {len(rows) - limit} more (--limit)")


def _kernels(artifact: Artifact, limit: int) -> None:
    """What each block's kernels move and compute, and what the manifest says of each kernel."""
    table = Table(
        "block", "kernels", "traffic", "in kernels", "FLOPs in kernels", "rows fused",
        "rows moved", "of the bound", title="a step of one rank",
    )  # fmt: skip
    total, left = Traffic(), Counter[str]()
    for module in artifact.schedules():
        found = traffic_of(module)
        left.update(leftovers(module))
        for block, traffic in found.items():
            total.add(traffic)
            table.add_row(*_traffic_row(block, traffic))
    table.add_section()
    table.add_row(*_traffic_row("all", total))
    console.print(table)
    if left:
        rows = ", ".join(f"{name} {human_bytes(size)}" for name, size in left.most_common(limit))
        console.print(f"rows outside of kernels: {rows}", markup=False)
    needs = Table("kernel", "walks", "moves", "registers", "spills", "shared", "runs as")
    stages = len(artifact.schedules())
    entries = [
        entry
        for stage in range(stages)
        for entry in kernel_manifest(kernel_folder(artifact.path, stages, stage))["kernels"]
    ]
    entries.sort(key=lambda entry: -entry.get("bytes_moved", 0))
    for entry in entries[:limit]:
        cells = [str(entry.get(key, "")) for key in ("registers", "spill_bytes", "shared_bytes")]
        runs = entry["reason"] or ("binary" if "binary" in entry else "source")
        moves = human_bytes(entry["bytes_moved"]) if "bytes_moved" in entry else ""
        needs.add_row(entry["name"], entry.get("kind", ""), moves, *cells, escape(runs))
    console.print(needs)
    if len(entries) > limit:
        console.print(f"and {len(entries) - limit} more (--limit)")


def _traffic_row(block: str, traffic: Traffic) -> list[str]:
    def share(part: float, whole: float) -> str:
        return f"{100 * part / whole:.0f} %" if whole else ""

    ratio = f"{traffic.rows_moved / traffic.rows_bound:.2f}x" if traffic.rows_bound else ""
    return [
        escape(block), str(traffic.kernels), human_bytes(traffic.moved),
        share(traffic.moved_in_kernels, traffic.moved), share(traffic.flops_in_kernels, traffic.flops),
        share(traffic.rows_in_kernels, traffic.rows), human_bytes(traffic.rows_moved), ratio,
    ]  # fmt: skip


def _explain(artifact: Artifact, path: str, limit: int) -> None:
    """Placement, cost and runner-up, where the artifact has a placed level and the path is there."""
    modules = [artifact.module(dump) for dump in artifact.dumps]
    placed = next((m for m in reversed(modules) if m.level == "placed"), None)
    if placed is None:
        return
    text = explain_path(placed, _spmd(artifact), cluster_of(artifact.info), path, limit)
    console.print(text, markup=False, soft_wrap=True)


def _origin(op: Op) -> str:
    return f"\n      from {op.loc}" if str(op.loc) else ""


def _history(artifact: Artifact, path: str, limit: int) -> None:
    before: list[str] = []
    for dump in artifact.dumps:
        ops = [op for _, op in matching(artifact.module(dump), path)]
        if not ops:
            continue
        console.rule(dump.name)
        lines = [f"  {op_line(op)}{_origin(op)}" for op in ops]
        if lines == before:
            console.print("  as before")
            continue
        before = lines
        console.print("\n".join(lines[:limit]), markup=False, soft_wrap=True)
        if len(ops) > limit:
            console.print(f"  and {len(ops) - limit} more (--limit)")
    if not before:
        raise RunError(
            "W1001",
            f"no op of this plan matches {path!r}",
            hint="use a part of a module path, an op name, or a value's name",
        )


def _dump(artifact: Artifact, name: str) -> Path:
    for path in artifact.dumps:
        if name in (path.name, path.stem, path.stem.split("-")[0], path.stem.partition("-")[2]):
            return path
    names = ", ".join(path.stem for path in artifact.dumps)
    raise RunError("W1001", f"there is no dump {name!r}", hint=f"the dumps are {names}")


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--ir", "dump", default="", metavar="DUMP", help="Print one dump, by number or pass.")
@click.option(
    "--diff", "pair", nargs=2, default=None, metavar="A B", help="Differences of two dumps."
)
@click.option(
    "--op", "path", default="", metavar="PATH", help="Placement, cost and history of a module path."
)
@click.option("--kernels", is_flag=True, help="What generated kernels move, block by block.")
@click.option("--html", is_flag=True, help="Open the report page.")
@click.option("--limit", default=20, show_default=True, help="Rows of each table.")
def inspect(
    folder: Path, dump: str, pair: tuple[str, str] | None, path: str, kernels: bool, html: bool,
    limit: int,
) -> None:  # fmt: skip
    """Show what an artifact holds: levels, collectives, placements, an op's history."""
    try:
        artifact = Artifact.open(folder)
        if dump:
            click.echo(_dump(artifact, dump).read_text(encoding="utf-8"), nl=False)
        elif pair:
            before, after = _dump(artifact, pair[0]), _dump(artifact, pair[1])
            text = diff(artifact.module(before), artifact.module(after), (before.name, after.name))
            click.echo(text)
        elif path:
            _explain(artifact, path, limit)
            _history(artifact, path, limit)
        elif kernels:
            _kernels(artifact, limit)
        elif html:
            page = (artifact.path / "report.html").resolve()
            console.print(str(page), markup=False, soft_wrap=True)
            webbrowser.open(page.as_uri())
        else:
            _overview(artifact)
            _tables(_spmd(artifact), limit)
            _memory(artifact, limit)
    except WeftError as error:
        Console(stderr=True, highlight=False).print(error.render(), markup=False, soft_wrap=True)
        raise SystemExit(2) from None
