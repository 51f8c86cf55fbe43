"""The real run as a timeline for Perfetto (ui.perfetto.dev) or chrome://tracing.

Chrome trace event format: one process for each rank, in it one track for compute and one for each
process group. Times are CLOCK_MONOTONIC, which the processes of a host share, so that the traces of
its ranks can be laid side by side (`merge`).
"""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..ir.module import Function, Op
from .comm import COMMUNICATION, Comm, Pending

Clock = Callable[[int, "Pending | None"], None]
Event = dict[str, Any]


@dataclass
class _Transfer:
    """An asynchronous transfer: when it started and, where the backend says so, when it ended."""

    start_us: float
    end_us: float = 0.0

    def done(self, _: object) -> None:
        """Called by the backend's thread."""
        self.end_us = time.perf_counter_ns() / 1e3


@dataclass
class Trace:
    """The events of one rank, over any number of steps."""

    rank: int = 0
    events: list[Event] = field(default_factory=list)
    steps: int = 0
    _tracks: dict[str, int] = field(default_factory=dict)

    @contextmanager
    def step(self, function: Function, comm: Comm, cuda: bool = False) -> Iterator[Clock]:
        """Record one step: the clock that it gives is to be read after each action.

        On CUDA the times are those of the device, and a transfer lasts until its wait.
        """
        marks: list[tuple[int, Any]] = []
        transfers: dict[str, _Transfer] = {}

        def now() -> Any:
            if not cuda:
                return time.perf_counter_ns() / 1e3
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            return event

        def clock(index: int, pending: Pending | None) -> None:
            marks.append((index, now()))
            if pending is not None and not cuda:
                transfer = _Transfer(marks[-1][1])
                transfers[function.ops[index].results[0].name] = transfer
                for work in pending.works:
                    work.get_future().add_done_callback(transfer.done)

        host_us, first = time.perf_counter_ns() / 1e3, now()
        try:
            yield clock
        finally:
            times = [first, *(mark for _, mark in marks)]
            if cuda:
                torch.cuda.synchronize()
                times = [host_us + first.elapsed_time(mark) * 1e3 for mark in times]
            self._record(function, comm, [index for index, _ in marks], times, transfers)
            self.steps += 1

    def _record(
        self,
        function: Function,
        comm: Comm,
        indices: Sequence[int],
        times: Sequence[float],
        transfers: dict[str, _Transfer],
    ) -> None:
        started: dict[str, tuple[Op, float]] = {}
        busy: dict[str, float] = {}
        for index, start, end in zip(indices, times, times[1:], strict=False):
            op = function.ops[index]
            self._slice("compute", op, start, end, index)
            begun = None
            if op.name == "wait":
                begun = started.pop(op.operands[0].name, None)
            elif op.attrs.get("async"):
                started[op.results[0].name] = (op, start)
            elif op.name in COMMUNICATION and "axis" in op.attrs:
                begun = (op, start)
            if begun is None:
                continue
            transfer, start = begun
            known = transfers.get(transfer.results[0].name) if op.name == "wait" else None
            until = known.end_us if known is not None and known.end_us else end
            track = self._group(transfer, comm)
            start = max(start, busy.get(track, 0.0))  # a group runs its transfers one by one
            busy[track] = max(until, start)
            self._slice(track, transfer, start, busy[track], index)

    @staticmethod
    def _group(op: Op, comm: Comm) -> str:
        axis = op.attrs.get("axis")
        if axis is None:
            return "send and receive"
        return f"axis {axis}, ranks {', '.join(map(str, comm.members(str(axis))))}"

    def _slice(self, track: str, op: Op, start_us: float, end_us: float, index: int) -> None:
        if track not in self._tracks:
            self._tracks[track] = len(self._tracks)
        name = f"{op.loc.path}: {op.name}" if op.loc.path else op.name
        args: Event = {"action": index, "step": self.steps}
        if op.results:
            args["result"], args["type"] = str(op.results[0]), str(op.results[0].type)
        if op.loc.file:
            args["source"] = f"{op.loc.file}:{op.loc.line}"
        self.events.append({
            "name": name, "cat": "compute" if track == "compute" else "transfer", "ph": "X",
            "ts": start_us, "dur": max(0.0, end_us - start_us), "pid": self.rank,
            "tid": self._tracks[track], "args": args,
        })  # fmt: skip

    def all_events(self) -> list[Event]:
        """The events with the names of the tracks."""
        named: list[Event] = [{
            "name": "process_name", "ph": "M", "pid": self.rank, "tid": 0,
            "args": {"name": f"rank {self.rank}"},
        }]  # fmt: skip
        for track, number in self._tracks.items():
            named.append({"name": "thread_name", "ph": "M", "pid": self.rank, "tid": number,
                          "args": {"name": track}})  # fmt: skip
        return named + self.events

    def write(self, path: str | Path) -> Path:
        """Write `.json`, or `.json.gz` when the name says so."""
        return _write(path, self.all_events())


def _write(path: str | Path, events: list[Event]) -> Path:
    path = Path(path)
    data = json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}).encode()
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
    return path


def read_events(path: str | Path) -> list[Event]:
    """The events of a trace file."""
    data = Path(path).read_bytes()
    text = gzip.decompress(data) if Path(path).suffix == ".gz" else data
    events: list[Event] = json.loads(text)["traceEvents"]
    return events


def merge(paths: Iterable[str | Path], target: str | Path) -> Path:
    """One trace of several ranks' files."""
    return _write(target, [event for path in paths for event in read_events(path)])
