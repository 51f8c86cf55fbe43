"""Pipelines of stages in time and memory: a cut, its order, the transfers between its stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..costmodel.cluster import Cluster
from ..costmodel.collectives import Spread, collective_time_us
from ..costmodel.pipeline import ChunkTimes, in_flight, lower_bound_us, step_us
from ..ir.types import Mesh
from .orders import orders_of
from .search_cuts import Part


@dataclass(frozen=True)
class Stage:
    """One stage of a plan.

    Attributes:
        kind: of its devices.
        mesh: of its devices.
        first_rank: its ranks are numbered from here on.
        units: names of its units, in order.
        recompute: its activations are computed again in the backward pass.
        forward_us, backward_us: of a micro-batch; of it `moved_us` collectives.
        update_us: once a step; of it `moved_update_us` collectives.
        peak_bytes: of a rank; `memory_bytes` is what it may fill.
        in_flight: micro-batches (times chunks) whose activations it holds at most.
        own_bytes: of each chunk, what it holds with one micro-batch in flight.
    """

    kind: str
    mesh: Mesh
    first_rank: int
    units: tuple[str, ...]
    recompute: bool
    forward_us: float
    backward_us: float
    moved_us: float
    update_us: float
    moved_update_us: float
    peak_bytes: float
    memory_bytes: float
    in_flight: int
    own_bytes: tuple[float, ...]


@dataclass(frozen=True)
class Pipeline:
    """A plan in numbers.

    Attributes:
        stages: in the order of the forward pass; one where there is no pipeline.
        unit_stage: the stage (or with virtual stages the chunk) of each unit.
        micro: number of micro-batches.
        order: `gpipe`, `1f1b` or `interleaved`.
        chunks: of each stage; 1 without virtual stages.
        step_us: predicted time of a step.
        bound_us: no order of these stages' slots is faster.
        sent_us: the longest transfer between two stages.
    """

    stages: tuple[Stage, ...]
    unit_stage: tuple[int, ...]
    micro: int
    order: str
    chunks: int
    step_us: float
    bound_us: float
    sent_us: float

    @property
    def fits(self) -> bool:
        """Does each stage fit its devices?"""
        return all(stage.peak_bytes <= stage.memory_bytes for stage in self.stages)

    def losses_us(self) -> Mapping[str, float]:
        """Where the step goes, on its slowest stage: compute, collectives, waiting, update."""
        slowest = max(self.stages, key=lambda s: s.forward_us + s.backward_us)
        loop = self.micro * (slowest.forward_us + slowest.backward_us)
        moved = self.micro * slowest.moved_us
        return {
            "compute": loop - moved,
            "collectives": moved,
            "waiting for other stages": max(0.0, self.step_us - loop - slowest.update_us),
            "update and gradients": slowest.update_us,
        }


def evaluate(
    parts: Sequence[Part],
    names: Sequence[str],
    clusters: Mapping[int, Cluster],
    micro: int,
    order: str,
    chunks: int = 1,
) -> Pipeline:
    """Time and memory of a cut.

    Args:
        parts: of the chain; part `c * stages + s` is chunk c of stage s.
        clusters: by position of a block's first device.
    """
    stages = len(parts) // chunks
    slots = orders_of(order, stages, micro, chunks)
    flights = in_flight(slots)
    count = len(parts)
    loops = np.zeros((2, count))
    for number, part in enumerate(parts):
        costs = part.block.costs
        forward = float(costs.forward_us[part.units].sum())
        loops[:, number] = forward, float(costs.backward_us[part.units].sum())
        if part.recompute:
            loops[1, number] += forward
    edges = np.array([_sent_us(parts, i, clusters) for i in range(count - 1)])
    built = [
        _stage(parts[s::stages], flights[s], names, clusters[parts[s].block.start])
        for s in range(stages)
    ]
    times = ChunkTimes(
        loops[0], loops[1], edges, edges, np.array([stage.update_us for stage in built])
    )
    unit_stage = np.zeros(len(names), dtype=np.int64)
    for number, part in enumerate(parts):
        unit_stage[part.units] = number
    return Pipeline(
        tuple(built), tuple(int(s) for s in unit_stage), micro, order, chunks,
        float(step_us(slots, times)), float(lower_bound_us(micro, stages, times)),
        float(edges.max(initial=0.0)),
    )  # fmt: skip


def _stage(
    parts: Sequence[Part], flight: Sequence[int], names: Sequence[str], cluster: Cluster
) -> Stage:
    """A stage of one or several chunks."""
    block = parts[0].block
    costs = block.costs

    def total(row: NDArray[np.float64]) -> float:
        return float(sum(row[part.units].sum() for part in parts))

    transient, alone = float(costs.transient_bytes.max(initial=0.0)), []
    peak, forward, backward = 0.0, total(costs.forward_us), total(costs.backward_us)
    for part, held in zip(parts, flight, strict=True):
        saved = costs.kept_bytes if part.recompute else costs.saved_bytes
        peak += held * float(saved[part.units].sum())
        # activations that are computed again are there while they are
        rows = costs.persistent_bytes + costs.saved_bytes
        alone.append(float(rows[part.units].sum()) + transient)
    if any(part.recompute for part in parts):
        backward += float(sum(costs.forward_us[p.units].sum() for p in parts if p.recompute))
        peak += float(costs.saved_bytes.max(initial=0.0))
    peak += total(costs.persistent_bytes) + transient
    units = np.logical_or.reduce([part.units for part in parts])
    return Stage(
        cluster.device.kind, costs.mesh, block.start,
        tuple(name for name, mine in zip(names, units, strict=True) if mine),
        any(part.recompute for part in parts), forward, backward, total(costs.moved_us),
        total(costs.update_us), total(costs.moved_update_us), peak, block.memory_bytes, sum(flight),
        tuple(alone),
    )  # fmt: skip


def _sent_us(parts: Sequence[Part], number: int, clusters: Mapping[int, Cluster]) -> float:
    """Time of the activations that go from part `number` to the next one."""
    here, there = parts[number].block, parts[number + 1].block
    if here is there:
        return 0.0
    done = np.logical_or.reduce([part.units for part in parts[: number + 1]])
    moved = 0.0
    for block in (here, there):  # the side with fewer ranks holds more of a value
        crossing = [b for b, made, readers in block.costs.crossing
                    if done[made] and not all(done[r] for r in readers)]  # fmt: skip
        moved = max(moved, sum(crossing))
    times = []
    for cluster, block in ((clusters[here.start], here), (clusters[there.start], there)):
        other = there if block is here else here
        host = cluster.devices_per_host
        low, high = min(block.start, other.start), max(block.stop, other.stop)
        together = low // host == (high - 1) // host
        spread = Spread(2, 2 if together else 1)
        times.append(collective_time_us("send", moved, spread, cluster))
    return max(times)
