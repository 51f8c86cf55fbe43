"""A plain cut into stages: units in the order of the program, stages of about equal time."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from ..costmodel.cluster import Cluster
from ..costmodel.estimate import op_time_us
from ..ir.errors import CompileError
from ..ir.module import Module, Op
from ..ir.types import Mesh
from .micro import TimeSplit
from .search_units import units_of


def balanced(split: TimeSplit, clusters: Sequence[Cluster]) -> tuple[int, ...]:
    """The part of each op of the program, for `stages.cut`; ops that are left open are -1.

    Args:
        clusters: the devices of each part (a stage, or a virtual stage). Their number and kind gives
            the times of its ops, so that fast stages get more of them.

    Raises CompileError W0404 for more parts than the program has blocks.
    """
    entry = split.module.entry
    units, parts = units_of(split), len(clusters)
    if parts > units.count:
        raise CompileError(
            "W0404", f"the program cannot be cut into {parts} stages",
            reason=f"it has {units.count} blocks that can be computed one after the other",
            hint=f"ask for at most {units.count} stages (times chunks)",
        )  # fmt: skip
    weights: dict[Cluster, list[float]] = {}
    for cluster in clusters:
        if cluster in weights:
            continue
        alone, times = Mesh((), cluster.groups[0].kind), dict[str, float]()
        weights[cluster] = [0.0] * units.count
        for op, unit, phase in zip(entry.ops, units.stage_of, split.phases, strict=True):
            if unit >= 0 and phase == "forward":
                time_us = _time_us(split.module, op, alone, cluster, times)
                weights[cluster][unit] += time_us / cluster.ranks
    first = _cuts([weights[cluster] for cluster in clusters])
    part_of = [sum(unit >= start for start in first) for unit in range(units.count)]
    return tuple(
        part_of[unit] if unit >= 0 and phase == "forward" else -1
        for unit, phase in zip(units.stage_of, split.phases, strict=True)
    )


def _time_us(
    module: Module, op: Op, alone: Mesh, cluster: Cluster, known: dict[str, float]
) -> float:
    if op.name != "call":
        return op_time_us(op, (), alone, cluster)
    name = str(op.attrs["callee"])
    if name not in known:
        ops = module.function(name).ops
        known[name] = sum(_time_us(module, inner, alone, cluster, known) for inner in ops)
    return known[name]


def _cuts(weights: Sequence[Sequence[float]]) -> list[int]:
    """Where parts 1, 2, ... begin, so that the largest sum is least (linear partition).

    Args:
        weights: for each part the weight that each unit has on it.
    """
    totals = [[0.0, *accumulate(own)] for own in weights]
    count, parts = len(weights[0]), len(weights)
    best = [[float("inf")] * (count + 1) for _ in range(parts + 1)]
    came = [[0] * (count + 1) for _ in range(parts + 1)]
    best[0][0] = 0.0
    for part, total in enumerate(totals, start=1):
        for end in range(part, count + 1):
            for start in range(part - 1, end):
                cost = max(best[part - 1][start], total[end] - total[start])
                if cost < best[part][end]:
                    best[part][end], came[part][end] = cost, start
    ends, end = [], count
    for part in range(parts, 1, -1):
        end = came[part][end]
        ends.append(end)
    return ends[::-1]


__all__ = ["balanced"]
