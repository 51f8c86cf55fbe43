"""Timelines of actions as files for Perfetto (ui.perfetto.dev) or chrome://tracing.

Chrome trace event format: one process for each rank, in it one track for compute and one for each
process group. Measured (`runtime/trace.py`) and predicted (`costmodel/simulate_export.py`) steps
share this form, so that the two can be laid side by side; hence it lives below both.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .module import Op

Event = dict[str, Any]
COMPUTE = "compute"
#: added to the rank for the process of a predicted step: more than any cluster has ranks
PREDICTED = 1 << 20


@dataclass
class RankEvents:
    """The events of one rank, tracks numbered in the order of their first use."""

    rank: int
    predicted: bool = False
    events: list[Event] = field(default_factory=list)
    tracks: dict[str, int] = field(default_factory=dict)

    @property
    def process(self) -> int:
        """The number of the rank's process in the file."""
        return self.rank + (PREDICTED if self.predicted else 0)

    def slice(
        self, track: str, op: Op, index: int, step: int, start_us: float, duration_us: float
    ) -> None:
        """Add an action of a step: its position in the entry function, and when it ran."""
        if track not in self.tracks:
            self.tracks[track] = len(self.tracks)
        args: Event = {"action": index, "step": step}
        if op.results:
            args["result"], args["type"] = str(op.results[0]), str(op.results[0].type)
        if op.loc.file:
            args["source"] = f"{op.loc.file}:{op.loc.line}"
        self.events.append({
            "name": event_name(op), "cat": "compute" if track == COMPUTE else "transfer", "ph": "X",
            "ts": start_us, "dur": max(0.0, duration_us), "pid": self.process,
            "tid": self.tracks[track], "args": args,
        })  # fmt: skip

    def all_events(self) -> list[Event]:
        """The events with the names of the process and its tracks."""
        name = f"rank {self.rank}, predicted" if self.predicted else f"rank {self.rank}"
        named: list[Event] = [{"name": "process_name", "ph": "M", "pid": self.process, "tid": 0,
                               "args": {"name": name}}]  # fmt: skip
        for track, number in self.tracks.items():
            named.append({"name": "thread_name", "ph": "M", "pid": self.process, "tid": number,
                          "args": {"name": track}})  # fmt: skip
        return named + self.events


def event_name(op: Op) -> str:
    """The name of an action's slice: where it comes from, and what it does."""
    return f"{op.loc.path}: {op.name}" if op.loc.path else op.name


def group_track(axis: str, ranks: Iterable[int]) -> str:
    """The name of the track of a process group."""
    return f"axis {axis}, ranks {', '.join(map(str, ranks))}"


#: the track of transfers between pipeline stages
PAIR_TRACK = "send and receive"


def trace_text(events: list[Event]) -> str:
    """The file's text."""
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})


def write_events(path: str | Path, events: list[Event]) -> Path:
    """Write `.json`, or `.json.gz` when the name says so; a file that is there stays whole until
    the new one is."""
    path = Path(path)
    data = trace_text(events).encode()
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
        os.replace(temporary, path)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        raise
    return path


def read_events(path: str | Path) -> list[Event]:
    """The events of a trace file."""
    data = Path(path).read_bytes()
    text = gzip.decompress(data) if Path(path).suffix == ".gz" else data
    events: list[Event] = json.loads(text)["traceEvents"]
    return events


def from_zero(events: Iterable[Event]) -> list[Event]:
    """The events moved in time so that the first one starts at 0."""
    found = list(events)
    first = min((e["ts"] for e in found if "ts" in e), default=0.0)
    return [{**e, "ts": e["ts"] - first} if "ts" in e else e for e in found]


def merge(paths: Iterable[str | Path], target: str | Path) -> Path:
    """One trace of several files."""
    return write_events(target, [event for path in paths for event in read_events(path)])
