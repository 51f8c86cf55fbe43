"""A measured step beside a predicted one, action by action."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from ..ir.errors import RunError
from ..ir.module import Op
from ..ir.trace_events import PREDICTED, Event, event_name
from .simulate_result import Result


@dataclass(frozen=True)
class Compared:
    """An action of a rank, or a transfer.

    Attributes:
        rank: the rank; of a transfer, the one that measured it shortest: it came last.
        index: position of the action in the rank's program.
        transfer: is this the transfer, not what its start or wait costs the rank?
        predicted_us: time in the simulation.
        measured_us: median over the steps of the trace.
    """

    rank: int
    index: int
    op: Op
    transfer: bool
    predicted_us: float
    measured_us: float

    @property
    def ratio(self) -> float:
        """Predicted over measured; 0 where nothing was predicted."""
        return self.predicted_us / self.measured_us if self.measured_us else float("inf")


@dataclass(frozen=True)
class Comparison:
    """A trace against its prediction.

    Attributes:
        rows: actions that took time in either, in program order.
        predicted_us: the step.
        measured_us: median over the steps of the trace, from the first start to the last end.
    """

    rows: list[Compared]
    predicted_us: float
    measured_us: float


def compare(result: Result, events: Sequence[Event]) -> Comparison:
    """Compare a simulation with the events of a trace of the same plan, of one or more ranks.

    Raises RunError W1201 where the trace is of another plan.
    """
    slices = [e for e in events if _is_measured(e)]
    if not slices:
        raise RunError(
            "W1201", "the trace holds no measured actions",
            hint="write one with: weft run OUT --trace FILE",
        )  # fmt: skip
    times: dict[tuple[int, int, bool], list[float]] = defaultdict(list)
    spans: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for event in slices:
        rank, index = _checked(result, event)
        times[rank, index, event["cat"] == "transfer"].append(float(event["dur"]))
        spans[int(event["args"].get("step", 0))].append((event["ts"], event["ts"] + event["dur"]))
    rows: list[Compared] = []
    shortest: dict[tuple[int, tuple[int, ...]], Compared] = {}
    predicted = {rank: _predicted(result, rank) for rank in {key[0] for key in times}}
    for (rank, index, transfer), found in sorted(times.items()):
        expected = predicted[rank].get((index, transfer), 0.0)
        op = result.program(rank).ops[index]
        row = Compared(rank, index, op, transfer, expected, median(found))
        if not transfer:
            rows.append(row)
            continue
        axis = str(op.attrs.get("axis", ""))
        members = tuple(result.members(rank, axis)) if axis in result.mesh(rank).names else (rank,)
        best = shortest.get((index, members))
        if best is None or row.measured_us < best.measured_us:
            shortest[index, members] = row
    rows += shortest.values()
    rows.sort(key=lambda row: (row.index, row.transfer, row.rank))
    lengths = [max(end for _, end in s) - min(start for start, _ in s) for s in spans.values()]
    return Comparison(rows, result.step_us, median(lengths))


def _is_measured(event: Event) -> bool:
    args = event.get("args")
    named = isinstance(args, dict) and "action" in args
    return event.get("ph") == "X" and named and int(event.get("pid", 0)) < PREDICTED


def _checked(result: Result, event: Event) -> tuple[int, int]:
    """Rank and position of an event's action, if the plan has it."""
    rank, index = int(event["pid"]), int(event["args"]["action"])
    if not 0 <= rank < result.ranks:
        raise _foreign(f"it has a rank {rank}", f"the plan has ranks 0 to {result.ranks - 1}")
    ops = result.program(rank).ops
    if not 0 <= index < len(ops):
        raise _foreign(f"it has an action {index}", f"rank {rank} has {len(ops)} actions")
    op = ops[index]
    name, shown = event_name(op), str(op.results[0]) if op.results else None
    type = str(op.results[0].type) if op.results else None
    args: Mapping[str, Any] = event["args"]
    if event.get("name") != name or args.get("result") != shown or args.get("type", type) != type:
        raise _foreign(
            f"its action {index} of rank {rank} is {args.get('result')} = {event.get('name')} : "
            f"{args.get('type')}",
            f"the plan's is {shown} = {name} : {type}",
        )
    return rank, index


def _foreign(what: str, reason: str) -> RunError:
    return RunError(
        "W1201", f"the trace does not match the plan: {what}", reason=reason,
        hint="trace the same artifact: weft run OUT --trace FILE",
    )  # fmt: skip


def _predicted(result: Result, rank: int) -> dict[tuple[int, bool], float]:
    times = {(index, False): end - start for index, start, end in result.actions(rank)}
    times.update(((i, True), end - start) for i, _, start, end in result.transfers(rank))
    return times
