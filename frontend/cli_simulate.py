"""`weft simulate`: a step of an artifact replayed, on its cluster or on another."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..costmodel.cluster import parse_cluster
from ..costmodel.cluster_json import cluster_of
from ..costmodel.simulate import PARTS, Simulation, simulate
from ..costmodel.simulate_compare import Comparison
from ..ir.errors import CompileError, RunError, WeftError
from ..ir.trace_events import Event, read_events
from ..runtime.artifact import Artifact
from .describe import human_bytes, human_time, memory_by_owner, star

console = Console(highlight=False)
_WHAT_IF = re.compile(r"(\w+)=(\d+(?:\.\d*)?|\.\d+)x?")
_FILE = click.Path(path_type=Path, dir_okay=False)


def parse_what_if(text: str) -> tuple[str, float]:
    """`inter=2x` as ("inter", 2.0). Raises CompileError W1001."""
    match = _WHAT_IF.fullmatch(text.strip())
    if match is None or match[1] not in PARTS:
        raise CompileError(
            "W1001", f"--what-if {text!r} is not understood",
            reason=f"it is PART=FACTORx, the parts are {', '.join(PARTS)}",
            hint="write for example --what-if inter=2x",
        )  # fmt: skip
    return match[1], float(match[2])


def read_trace(paths: Sequence[Path]) -> list[Event]:
    """The events of the files of one or more ranks. Raises RunError W1201."""
    events: list[Event] = []
    for path in paths:
        try:
            events += read_events(path)
        except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
            raise RunError(
                "W1201", f"the trace {path} cannot be read", reason=str(error) or repr(error),
                hint="write one with: weft run OUT --trace FILE",
            ) from None  # fmt: skip
    return events


def critical_rows(simulation: Simulation) -> list[tuple[str, str, int, float]]:
    """The critical path by kind of action: (what, where, count, us), longest first; repeated
    blocks together."""
    times: defaultdict[tuple[str, str], float] = defaultdict(float)
    counts: Counter[tuple[str, str]] = Counter()
    for step in simulation.critical_path:
        name = f"{step.op.name} over {step.axis}" if step.axis else step.op.name
        key = str(step.op.attrs.get("callee", name)), star(step.op.loc.path)
        times[key] += step.duration_us
        counts[key] += 1
    longest = sorted(times.items(), key=lambda item: -item[1])
    return [(*key, counts[key], time_us) for key, time_us in longest]


def as_json(simulation: Simulation, limit: int) -> dict[str, Any]:
    """What the command prints, for programs."""
    step_us = simulation.step_us
    return {
        "cluster": str(simulation.cluster),
        "ranks": simulation.ranks,
        "classes": len(simulation.classes),
        "step_us": step_us,
        "exposed_us": simulation.exposed_us,
        "bubble": simulation.bubble,
        "peak_bytes": simulation.peak_bytes,
        "at_peak": [
            {"kind": kind, "owner": owner, "bytes": size}
            for kind, owner, size in memory_by_owner(simulation.at_peak)[:limit]
        ],
        "critical_path": [
            {"action": what, "where": where, "count": count, "us": time_us,
             "share": time_us / step_us if step_us else 0.0}
            for what, where, count, time_us in critical_rows(simulation)[:limit]
        ],
    }  # fmt: skip


def _overview(simulation: Simulation) -> None:
    table = Table(show_header=False)
    step_us = simulation.step_us
    table.add_row("cluster", f"{simulation.cluster}, {simulation.ranks} ranks, "
                  f"{len(simulation.classes)} different")  # fmt: skip
    table.add_row("step", human_time(step_us))
    for axis, time_us in simulation.exposed_us.items():
        shown = f"{human_time(time_us)}, {_share(time_us, step_us)}"
        table.add_row(f"exposed communication, {axis}", shown)
    table.add_row("bubble", f"{simulation.bubble:.1%}")
    table.add_row("peak memory of a rank", human_bytes(simulation.peak_bytes))
    console.print(table)


def _share(time_us: float, step_us: float) -> str:
    return f"{time_us / step_us:.1%}" if step_us else "0.0%"


def _more(count: int) -> None:
    if count > 0:
        console.print(f"and {count} more (--limit)")


def _tables(simulation: Simulation, limit: int) -> None:
    owners = memory_by_owner(simulation.at_peak)
    table = Table("owner", "", "bytes of a rank", title="memory at the peak")
    for kind, owner, size in owners[:limit]:
        table.add_row(kind, escape(owner), human_bytes(size))
    console.print(table)
    _more(len(owners) - limit)
    rows = critical_rows(simulation)
    table = Table("action", "where", "count", "time", "share", title="critical path")
    for what, where, count, time_us in rows[:limit]:
        share = _share(time_us, simulation.step_us)
        table.add_row(what, escape(where), str(count), human_time(time_us), share)
    console.print(table)
    _more(len(rows) - limit)


def _compared(comparison: Comparison, limit: int) -> None:
    """The kinds of actions whose prediction is off by most, repeated blocks together."""
    predicted: defaultdict[tuple[str, str], float] = defaultdict(float)
    measured: defaultdict[tuple[str, str], float] = defaultdict(float)
    for row in comparison.rows:
        name = f"{row.op.name}, transfer" if row.transfer else row.op.name
        key = name, star(row.op.loc.path)
        predicted[key] += row.predicted_us
        measured[key] += row.measured_us
    table = Table("action", "where", "predicted", "measured", "predicted / measured",
                  title="against the trace, all ranks of it together")  # fmt: skip
    rows = sorted(measured, key=lambda key: -abs(predicted[key] - measured[key]))
    cells = (comparison.predicted_us, comparison.measured_us)
    table.add_row("step", "", *map(human_time, cells), _ratio(*cells))
    for key in rows[:limit]:
        times = (predicted[key], measured[key])
        table.add_row(key[0], escape(key[1]), *map(human_time, times), _ratio(*times))
    console.print(table)
    _more(len(rows) - limit)


def _ratio(predicted_us: float, measured_us: float) -> str:
    return f"{predicted_us / measured_us:.2f}" if measured_us else "-"


def _compared_json(comparison: Comparison) -> dict[str, Any]:
    return {
        "predicted_us": comparison.predicted_us,
        "measured_us": comparison.measured_us,
        "actions": [
            {"rank": row.rank, "action": row.index, "op": row.op.name, "where": row.op.loc.path,
             "transfer": row.transfer, "predicted_us": row.predicted_us,
             "measured_us": row.measured_us, "ratio": row.ratio if row.measured_us else None}
            for row in comparison.rows
        ],
    }  # fmt: skip


@click.command("simulate")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--cluster", default="", help="Another cluster of as many devices. Default: the plan's.")
@click.option("--what-if", "what_if", multiple=True, metavar="PART=FACTORx",
              help="device, intra or inter, so many times as fast: inter=2x. Repeat for more.")  # fmt: skip
@click.option("--perfetto", type=_FILE, default=None, help="Write a timeline for ui.perfetto.dev.")
@click.option("--chakra", type=click.Path(path_type=Path, file_okay=False), default=None,
              help="Write Chakra execution traces into this folder.")  # fmt: skip
@click.option("--trace", "traces", type=_FILE, multiple=True,
              help="Compare with a measured trace of this plan; repeat for more ranks.")  # fmt: skip
@click.option("--json", "as_json_", is_flag=True, help="Print JSON.")
@click.option("--limit", default=12, show_default=True, help="Rows of each table.")
def simulate_command(
    folder: Path, cluster: str, what_if: Sequence[str], perfetto: Path | None, chakra: Path | None,
    traces: Sequence[Path], as_json_: bool, limit: int,
) -> None:  # fmt: skip
    """Replay a step: its time, memory, critical path, and where it waits for communication."""
    try:
        asked = [parse_what_if(text) for text in what_if]
        artifact = Artifact.open(folder)
        where = parse_cluster(cluster) if cluster else cluster_of(artifact.info)
        simulation = simulate(artifact.schedules(), where)
        events = read_trace(traces)
        comparison = simulation.compare(events) if traces else None
        others = [(part, factor, _faster(simulation, part, factor)) for part, factor in asked]
        if perfetto is not None:
            simulation.save_perfetto(perfetto, measured=events)
        if chakra is not None:
            simulation.save_chakra(chakra)
    except WeftError as error:
        Console(stderr=True, highlight=False).print(error.render(), markup=False, soft_wrap=True)
        raise SystemExit(2) from None
    if as_json_:
        found = as_json(simulation, limit)
        found["what_if"] = {f"{part}={factor:g}x": other.step_us for part, factor, other in others}
        if comparison is not None:
            found["trace"] = _compared_json(comparison)
        click.echo(json.dumps(found, indent=1))
        return
    _overview(simulation)
    for part, factor, other in others:
        gain = simulation.step_us / other.step_us if other.step_us else 1.0
        console.print(f"{part} {factor:g} times as fast: {human_time(other.step_us)} a step, "
                      f"{gain:.2f} times as fast")  # fmt: skip
    _tables(simulation, limit)
    if comparison is not None:
        _compared(comparison, limit)
    for path in (perfetto, chakra):
        if path is not None:
            console.print(f"written  {path}", markup=False, soft_wrap=True)


def _faster(simulation: Simulation, part: str, factor: float) -> Simulation:
    if part == "device":
        return simulation.what_if(device=True, factor=factor)
    return simulation.what_if(part, factor)
