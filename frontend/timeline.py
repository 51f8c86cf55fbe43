"""The predicted timeline of a step as a Perfetto trace (Chrome trace events).

A first replay: one compute stream and one communication stream per mesh axis, in program order;
an asynchronous collective occupies its axis, and its `wait` holds the compute stream until then.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..ir.module import Module, Op
from ..ir.opdef import OPS
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
    """

    slices: list[tuple[str, str, str, float, float]] = field(default_factory=list)
    step_us: float = 0.0
    exposed_us: dict[str, float] = field(default_factory=dict)
    peak_bytes: int = 0

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


def predict(module: Module, op_time_us: OpTime) -> Timeline:
    """Replay a schedule-level module. Memory counts the largest shard of each value until its free.

    Args:
        op_time_us: time of an action, kernel calls included.
    """
    mesh = module.mesh or Mesh()
    timeline = Timeline()
    clock, free_at = 0.0, dict.fromkeys(mesh.names, 0.0)
    done: dict[str, tuple[float, str]] = {}
    moved: set[str] = set()  # pending results whose memory is that of their `wait` now
    live = sum(local_bytes(value.type, mesh) for value in module.entry.params)
    timeline.peak_bytes = live
    for op in module.entry.ops:
        if op.name == "free":
            live -= sum(local_bytes(v.type, mesh) for v in op.operands if v.name not in moved)
            continue
        if op.name == "wait":
            ready, axis = done.pop(op.operands[0].name, (clock, ""))
            moved.add(op.operands[0].name)
            if ready > clock:
                timeline.exposed_us[axis] = timeline.exposed_us.get(axis, 0.0) + ready - clock
                clock = ready
            continue
        if not op.attrs.get("inplace"):
            live += sum(local_bytes(v.type, mesh) for v in op.results)
        timeline.peak_bytes = max(timeline.peak_bytes, live)
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
    return timeline
