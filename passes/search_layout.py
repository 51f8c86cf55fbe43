"""The plans of one layout: placed on a stage's mesh, cut, in each order, for each micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from math import inf

import numpy as np

from ..ir.errors import CompileError
from .place import MEMORY_SHARE, PlacementResult
from .search_cuts import Block, Cut, Cutter, Part
from .search_evaluate import evaluate
from .search_layouts import Layout
from .search_state import State
from .search_units import Units

#: micro-batches per stage that are tried: more shrink the bubble, and each of them
_PER_STAGE = (1, 2, 4, 8, 16)
#: chunks of a stage under the interleaved order
_CHUNKS = (2, 4)
#: slots of all stages' orders, one way, that a plan may have: a schedule has a body for each, and
#: writing down takes as long as searching from here on
_MOST_SLOTS = 1024
#: units times micro-batches that are written down in a second, verified and saved included: a
#: schedule has the ops of each (Llamas of 80 and 126 layers; 6 ms each on one core)
_WRITTEN_PER_S = 150
#: caps of the placed program's memory that are tried where nothing fits, as parts of what the
#: devices of all stages have
_CAPS = (0.5, 0.2)
#: share of a budget after which less memory is not tried where there is a plan: it takes several
#: placements
_CAP_SHARE = 0.3


def micros_of(state: State, layout: Layout) -> tuple[int, ...]:
    """Numbers of micro-batches that are tried, fewest first."""
    if state.wishes.micro is not None:
        return (state.wishes.micro,)
    can_split = state.programs.can_split
    counts = [1] if layout.stages == 1 else [layout.stages * k for k in _PER_STAGE]
    units = state.programs.units.count
    few = [
        count for count in counts
        if count * layout.stages <= _MOST_SLOTS and count * units <= _WRITTEN_PER_S * state.budget_s
    ] or counts[:1]  # fmt: skip
    legal = [count for count in few if can_split(count)]
    if not legal:
        legal = [count for count in range(layout.stages, 0, -1) if can_split(count)][:1]
    return tuple(legal)


def orders_of_layout(state: State, stages: int, micro: int) -> list[tuple[str, int]]:
    """(order, chunks of a stage) that are tried."""
    wanted = state.wishes.order
    rows = [("1f1b", 1), ("gpipe", 1)]
    rows += [
        ("interleaved", chunks) for chunks in _CHUNKS
        if micro % stages == 0 and (wanted or stages * micro * chunks <= _MOST_SLOTS)
    ]  # fmt: skip
    if stages == 1:
        rows = [("1f1b", 1)]
    return [row for row in rows if wanted in ("", row[0])] or [(wanted, 1)]


class LayoutSearch:
    """Evaluates the plans of a layout.

    Attributes:
        fastest_us: the fastest of its plans, whether it fits or not.
    """

    def __init__(self, state: State, layout: Layout, first: int | None = None) -> None:
        self.state, self.layout = state, layout
        micros = micros_of(state, layout)
        middle = micros[min(len(micros) - 1, 2)] if micros else 1
        #: the number that the layout is placed with comes first
        self.first = first if first in micros else middle
        self.micros = tuple(micro for micro in micros if micro != self.first)
        self.fastest_us = inf

    def run(self) -> None:
        """Place, and add all plans to the state."""
        state, layout = self.state, self.layout
        before = len(state.found)
        devices = layout.stages * layout.cluster.device.memory_bytes
        caps = [MEMORY_SHARE * devices] if layout.stages == 1 else [inf]
        caps += [devices * part for part in _CAPS] if layout.stages > 1 else []
        for number, cap in enumerate(caps):
            if number and (self._hopeless(before) or (state.found and state.over(_CAP_SHARE))):
                break
            self._capped(cap)
        if len(state.found) == before and layout.stages == 1 and state.wishes.micro is None:
            self._accumulate()

    def _capped(self, cap: float) -> None:
        placement = self.state.place(self.layout, self.first, cap)
        if placement is None:
            return
        for micro in (self.first, *self.micros):
            try:
                self._plans(placement, micro)
            except CompileError as error:
                if error.code not in ("W0401", "W0402"):
                    raise
                # too few rows for the splits of other micro-batches
                own = self.state.place(self.layout, micro, cap)
                if own is not None:
                    self._plans(own, micro)

    def _hopeless(self, before: int) -> bool:
        """Is less memory of no use? Plans fit as they are, or would be too slow if they did."""
        fits = self.state.found[before:]
        if fits and not any(s.recompute for f in fits for s in f.pipeline.stages):
            return True
        if fits and self.state.budget_s < inf:  # the next layout is worth more
            return True
        return self.state.over() or self.fastest_us >= self.state.best_us

    def _accumulate(self) -> None:
        """One stage that does not fit: smaller micro-batches, until it does."""
        micro, state = 2, self.state
        while state.programs.can_split(micro) and not state.over():
            cap = MEMORY_SHARE * self.layout.cluster.device.memory_bytes
            placement = state.place(self.layout, micro, cap)
            if placement is not None and self._plans(placement, micro):
                return
            micro *= 2

    def _plans(self, placement: PlacementResult, micro: int) -> bool:
        """Evaluate the cuts for a number of micro-batches. Does one fit?"""
        state, layout = self.state, self.layout
        costs = state.costs(layout, placement, micro)
        memory = state.room_bytes(layout.cluster)
        stages = layout.stages
        blocks = [
            Block(s * layout.ranks, (s + 1) * layout.ranks, costs, memory) for s in range(stages)
        ]
        clusters = {block.start: layout.cluster for block in blocks}
        units = state.programs.units
        cutter = Cutter(units, micro, state.wishes.recompute)
        fits = False
        for name, chunks in orders_of_layout(state, stages, micro):
            for parts in (_cut(cutter, blocks, chunks), even_parts(units, blocks, chunks)):
                if parts is None:
                    continue
                plan = evaluate(parts, units.names, clusters, micro, name, chunks)
                self.fastest_us = min(self.fastest_us, plan.step_us)
                fits = state.add(plan, layout, placement) or fits
        return fits


def even_parts(units: Units, blocks: Sequence[Block], chunks: int) -> tuple[Part, ...] | None:
    """Parts of a line of units such that the sums of the stages' chunks are even.

    The dynamic program makes the largest part as small as can be; the sum of a stage's parts is
    another matter: of 5 layers a stage, in two chunks, 2 and 3 are better than 3 and 3. None where
    units are no line, or there is one chunk.
    """
    stages, count = len(blocks), units.count
    if chunks == 1 or len(units.ideals) != count + 1 or count < stages * chunks:
        return None
    costs = blocks[0].costs
    line = np.concatenate([[0.0], np.cumsum(costs.loop_us)])
    loads, ends = np.zeros(stages), [0]
    for chunk in range(chunks):
        wanted = line[-1] / stages * (chunk + 1) / chunks - loads
        start = line[ends[-1]]
        for stage, until in enumerate(start + np.cumsum(wanted)):
            left = (chunks - chunk) * stages - stage - 1  #: parts behind this one
            end = int(np.abs(line - until).argmin())
            end = count - left if not left else min(max(end, ends[-1] + 1), count - left)
            loads[stage] += line[end] - line[ends[-1]]
            ends.append(end)
    rows = units.ideals
    return tuple(
        Part(blocks[i % stages], rows[b] & ~rows[a], False)
        for i, (a, b) in enumerate(pairwise(ends))
    )


def _cut(cutter: Cutter, blocks: Sequence[Block], chunks: int) -> tuple[Part, ...] | None:
    """The best parts; where nothing fits, those of unlimited memory, to say what is missing."""
    stages = len(blocks)
    chain = list(blocks) * chunks
    line = [
        replace(block, start=i, stop=i + 1,
                memory_bytes=block.memory_bytes if chunks == 1 else inf)
        for i, block in enumerate(chain)
    ]  # fmt: skip
    if cutter.units.count < len(line):
        return None
    best = _longest(cutter.best(line, len(line)), len(line))
    if best is None:
        line = [replace(block, memory_bytes=inf) for block in line]
        best = _longest(cutter.best(line, len(line)), len(line))
    if best is None:
        return None
    return tuple(replace(part, block=blocks[i % stages]) for i, part in enumerate(best.parts))


def _longest(cuts: Sequence[Cut], stages: int) -> Cut | None:
    return next((c for c in cuts if len(c.parts) == stages), None)


__all__ = ["LayoutSearch", "micros_of", "orders_of_layout"]
