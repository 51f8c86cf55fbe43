"""The predicted timeline of a step as a Perfetto trace (Chrome trace events).

A first replay: one compute stream and one communication stream per mesh axis, in program order;
an asynchronous collective occupies its axis, and its `wait` holds the compute stream until then.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..costmodel.estimate import VIEWS
from ..ir.module import Function, Module, Op
from ..ir.opdef import OPS
from ..ir.ops.optimizer import OVERWRITES
from ..ir.types import Mesh, local_bytes

#: time of an op in microseconds on one rank
OpTime = Callable[[Op], float]


@dataclass
class Timeline:
    """A predicted step of one rank.

    Attributes:
        slices: (track, name, path, start_us, duration_us).
        step_us: when the last action ends.
        exposed_us: time that the compute stream waits for communication, per axis.
        peak_bytes: largest sum of live values, parameters included, on the largest rank.
        memory: (time_us, bytes) at each change.
        at_peak: what is held at the peak: (kind, owner, bytes), where the kind is the role of an
            entry parameter or `activations`, and the owner its name or a module path.
    """

    slices: list[tuple[str, str, str, float, float]] = field(default_factory=list)
    step_us: float = 0.0
    exposed_us: dict[str, float] = field(default_factory=dict)
    peak_bytes: int = 0
    memory: list[tuple[float, int]] = field(default_factory=list)
    at_peak: list[tuple[str, str, int]] = field(default_factory=list)

    def to_json(self) -> str:
        """Chrome trace JSON, which ui.perfetto.dev opens."""
        tracks = {name: i for i, name in enumerate(dict.fromkeys(s[0] for s in self.slices))}
        events: list[dict[str, Any]] = [
            {"ph": "M", "name": "thread_name", "pid": 0, "tid": i, "args": {"name": track}}
            for track, i in tracks.items()
        ]
        for track, name, path, start, duration in self.slices:
            events.append({
                "ph": "X", "pid": 0, "tid": tracks[track], "name": name, "ts": round(start, 3),
                "dur": round(duration, 3), "args": {"path": path},
            })  # fmt: skip
        return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})


class _Memory:
    """Live bytes of the largest rank, and who owns them; views share what they show."""

    def __init__(self, entry: Function, mesh: Mesh) -> None:
        self.mesh = mesh
        self.storage: dict[str, str] = {}  # value -> the value whose memory it is
        self.users: Counter[str] = Counter()  # memory -> values that are not freed yet
        self.held: dict[str, tuple[str, str, int]] = {}
        self.live = self.peak = 0
        self.at_peak: list[tuple[str, str, int]] = []
        for value, attrs in zip(entry.params, entry.param_attrs, strict=True):
            role, name = str(attrs.get("role", "")), str(attrs.get("name", value.name))
            self._take(value.name, (role or "other", name, local_bytes(value.type, mesh)))

    def _take(self, name: str, row: tuple[str, str, int]) -> None:
        self.storage[name] = name
        self.users[name] += 1
        self.held[name] = row
        self.live += row[2]
        if self.live > self.peak:
            self.peak, self.at_peak = self.live, []

    def make(self, op: Op) -> None:
        """The results of an op begin to live."""
        shares = op.name in VIEWS or op.name == "wait"
        for index, value in enumerate(op.results):
            root = self.storage.get(op.operands[0].name) if shares else None
            if op.attrs.get("inplace"):
                root = self.storage.get(op.operands[OVERWRITES[op.name][index]].name)
            if root is not None and root in self.held:
                self.storage[value.name] = root
                self.users[root] += 1
            else:
                size = local_bytes(value.type, self.mesh)
                self._take(value.name, ("activations", op.loc.path, size))
        if self.live == self.peak and not self.at_peak:
            self.at_peak = list(self.held.values())

    def free(self, op: Op) -> None:
        """The operands of a `free` end."""
        for value in op.operands:
            root = self.storage.pop(value.name, value.name)
            self.users[root] -= 1
            if not self.users[root] and root in self.held:
                self.live -= self.held.pop(root)[2]


def predict(module: Module, op_time_us: OpTime) -> Timeline:
    """Replay a schedule-level module. Memory counts the largest shard of each value until its free.

    Args:
        op_time_us: time of an action, kernel calls included.
    """
    mesh = module.mesh or Mesh()
    timeline = Timeline()
    clock, free_at = 0.0, dict.fromkeys(mesh.names, 0.0)
    done: dict[str, tuple[float, str]] = {}
    memory = _Memory(module.entry, mesh)
    timeline.memory.append((0.0, memory.live))
    for op in module.entry.ops:
        before = memory.live
        if op.name == "free":
            memory.free(op)
        else:
            memory.make(op)
        if memory.live != before:
            timeline.memory.append((clock, memory.live))
        if op.name == "free":
            continue
        if op.name == "wait":
            ready, axis = done.pop(op.operands[0].name, (clock, ""))
            if ready > clock:
                timeline.exposed_us[axis] = timeline.exposed_us.get(axis, 0.0) + ready - clock
                clock = ready
            continue
        duration = op_time_us(op)
        name = str(op.attrs.get("callee", op.name))
        if OPS[op.name].family == "collective":
            axis = str(op.attrs.get("axis", "stage"))
            start = max(clock, free_at.get(axis, 0.0))
            free_at[axis] = start + duration
            timeline.slices.append((f"axis {axis}", name, op.loc.path, start, duration))
            if op.attrs.get("async"):
                done[op.results[0].name] = (start + duration, axis)
            else:
                waited = start + duration - clock
                timeline.exposed_us[axis] = timeline.exposed_us.get(axis, 0.0) + waited
                clock = start + duration
        elif duration > 0:
            timeline.slices.append(("compute", name, op.loc.path, clock, duration))
            clock += duration
    timeline.step_us = max([clock, *free_at.values()])
    timeline.memory.append((timeline.step_us, memory.live))
    timeline.peak_bytes = memory.peak
    timeline.at_peak = memory.at_peak or list(memory.held.values())
    return timeline
