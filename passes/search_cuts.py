"""Where to cut: units over blocks of devices, by dynamic programming over down-sets and devices.

State: (down-set of units that stages so far have, devices used so far, stages still to come). The
stage that comes next takes the units between two nested down-sets and a block of devices. The
number of stages still to come gives the micro-batches in flight under 1F1B, so memory is exact.
The objective is the largest time of a stage per micro-batch, of which a step has as many as there
are micro-batches; fill, drain and transfers are counted when the few results are evaluated.

Related: Alpa's stage DP (Zheng et al., 2022) over a line of operators; here over down-sets of a
graph (Tarnawski et al., Piper, 2021), with recompute as a choice of each stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .search_costs import Array, UnitCosts
from .search_units import Units


@dataclass(frozen=True)
class Block:
    """Devices that may be a stage.

    Attributes:
        start, stop: positions in the line of devices.
        costs: of the units on them.
        memory_bytes: what a rank may fill.
    """

    start: int
    stop: int
    costs: UnitCosts
    memory_bytes: float


@dataclass(frozen=True)
class Part:
    """A stage of a cut: its block, its units as a boolean row, and whether it computes its
    activations again in the backward pass."""

    block: Block
    units: NDArray[np.bool_]
    recompute: bool


@dataclass(frozen=True)
class Cut:
    """A way to cut: the largest time of a stage per micro-batch, and the stages."""

    bottleneck_us: float
    parts: tuple[Part, ...]


class Cutter:
    """The program's down-sets, and what a stage between two of them costs on a block."""

    def __init__(self, units: Units, micro: int, recompute: bool = True) -> None:
        self.units, self.micro, self.recompute = units, micro, recompute
        ideals = units.ideals
        self.sets = ideals.astype(np.float64)
        sizes = ideals.sum(1)
        common = self.sets @ self.sets.T
        #: [a, b]: b has all of a and more
        self.nested = (common == sizes[:, None]) & (sizes[:, None] < sizes[None, :])
        self._tables: dict[tuple[int, float, int], tuple[Array, NDArray[np.bool_]]] = {}
        self._kept: list[UnitCosts] = []  # so that ids stay valid

    def between(self, row: Array) -> Array:
        """Sums of a row of the units between each two down-sets, shape (sets, sets)."""
        sums = self.sets @ row
        return np.asarray(sums[None, :] - sums[:, None])

    def table(self, block: Block, behind: int) -> tuple[Array, NDArray[np.bool_]]:
        """(time per micro-batch, is recomputed) of a stage with `behind` stages behind it.

        Infinite where it does not fit, or is no stage.
        """
        in_flight = min(self.micro, behind + 1)
        key = id(block.costs), block.memory_bytes, in_flight
        if key not in self._tables:
            self._kept.append(block.costs)
            costs = block.costs
            time_us = self.between(costs.loop_us + costs.update_us / self.micro)
            held = self.between(costs.persistent_bytes) + float(costs.transient_bytes.max(initial=0))
            fits = held + in_flight * self.between(costs.saved_bytes) <= block.memory_bytes
            again = np.zeros_like(fits)
            if self.recompute:
                # the unit that is computed again has its saved values once
                most = float(costs.saved_bytes.max(initial=0))
                frugal = held + in_flight * self.between(costs.kept_bytes) + most
                again = (frugal <= block.memory_bytes) & ~fits
                time_us = np.where(again, time_us + self.between(costs.forward_us), time_us)
            time_us = np.where(self.nested & (fits | again), np.maximum(time_us, 0.0), np.inf)
            self._tables[key] = time_us, again
        return self._tables[key]

    def best(self, blocks: Sequence[Block], most_stages: int, *, all_devices: bool = True) -> list[Cut]:
        """The best cut for each number of stages that has one, up to `most_stages`.

        Args:
            blocks: stages take blocks that follow one another from position 0.
            all_devices: whether the last block must end where the last of all blocks does.
        """
        end = max(block.stop for block in blocks)
        last = len(self.units.ideals) - 1
        #: (position) -> least bottleneck from each down-set on, with k stages to come
        empty = np.full(last + 1, np.inf)
        done = empty.copy()
        done[last] = 0.0
        level = {
            p: done for p in {b.stop for b in blocks} if p == end or not all_devices
        }
        trail: list[dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]]] = []
        found = []
        for behind in range(most_stages):
            now: dict[int, Array] = {}
            choice: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}
            for number, block in enumerate(blocks):
                after = level.get(block.stop)
                if after is None or not np.isfinite(after).any():
                    continue
                through = np.maximum(self.table(block, behind)[0], after[None, :])
                target = through.argmin(1)
                value = through[np.arange(last + 1), target]
                known = now.setdefault(block.start, empty.copy())
                rows = choice.setdefault(
                    block.start, (np.zeros(last + 1, np.int64), np.zeros(last + 1, np.int64))
                )
                better = value < known
                known[better], rows[0][better] = value[better], target[better]
                rows[1][better] = number
            trail.append(choice)
            level = now
            if 0 in level and np.isfinite(level[0][0]):
                found.append(Cut(float(level[0][0]), self._parts(blocks, trail)))
        return found

    def _parts(
        self,
        blocks: Sequence[Block],
        trail: Sequence[dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]]],
    ) -> tuple[Part, ...]:
        at = position = 0
        parts = []
        for behind in reversed(range(len(trail))):
            targets, numbers = trail[behind][position]
            block, target = blocks[int(numbers[at])], int(targets[at])
            again = bool(self.table(block, behind)[1][at, target])
            rows = self.units.ideals
            parts.append(Part(block, rows[target] & ~rows[at], again))
            at, position = target, block.stop
        return tuple(parts)
