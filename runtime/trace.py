"""The real run as a timeline for Perfetto (ui.perfetto.dev) or chrome://tracing.

Times are CLOCK_MONOTONIC, which the processes of a host share, so that the traces of its ranks can
be laid side by side (`merge`). `ir/trace_events.py` has the form of the files.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..ir.module import Function, Op
from ..ir.opdef import OPS
from ..ir.trace_events import (
    COMPUTE,
    PAIR_TRACK,
    Event,
    RankEvents,
    group_track,
    merge,
    read_events,
    write_events,
)
from .comm import Comm, Pending

Clock = Callable[[int, "Pending | None"], None]
#: collectives that gloo runs at the same time in one group: its thread pool has two threads
GLOO_AT_ONCE = 2

__all__ = ["Clock", "Event", "Trace", "merge", "read_events"]


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
    steps: int = 0
    _log: RankEvents = field(init=False)

    def __post_init__(self) -> None:
        self._log = RankEvents(self.rank)

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
        started: dict[str, tuple[int, float]] = {}
        lanes: dict[str, list[float]] = {}  # group -> when each of its lanes is free
        for index, start, end in zip(indices, times, times[1:], strict=False):
            op = function.ops[index]
            self._log.slice(COMPUTE, op, index, self.steps, start, end - start)
            begun = None
            if op.name == "wait":
                begun = started.pop(op.operands[0].name, None)
            elif op.attrs.get("async"):
                started[op.results[0].name] = (index, start)
            elif OPS[op.name].family == "collective":
                begun = (index, start)
            if begun is None:
                continue
            number, start = begun
            transfer = function.ops[number]
            known = transfers.get(transfer.results[0].name)
            until = known.end_us if known is not None and known.end_us else end
            track = self._group(transfer, comm)
            free = lanes.setdefault(track, [0.0] * (1 if comm.nccl else GLOO_AT_ONCE))
            lane = free.index(min(free))
            start = max(start, free[lane])  # a group runs no more of them at once
            free[lane] = max(until, start)
            track = f"{track}, lane {lane + 1}" if lane else track
            self._log.slice(track, transfer, number, self.steps, start, free[lane] - start)

    @staticmethod
    def _group(op: Op, comm: Comm) -> str:
        axis = op.attrs.get("axis")
        return PAIR_TRACK if axis is None else group_track(str(axis), comm.members(str(axis)))

    def all_events(self) -> list[Event]:
        """The events with the names of the tracks."""
        return self._log.all_events()

    def write(self, path: str | Path) -> Path:
        """Write `.json`, or `.json.gz` when the name says so."""
        return write_events(path, self.all_events())
