"""Pipelines in numbers: when a step ends, and how many micro-batches are in flight.

A pipeline is an order of slots for each stage, and the times of its chunks (a stage's part of the
model; several a stage where stages are virtual). Nothing of a program is needed, so that a search
evaluates thousands of pipelines at once: all times may carry further dims in front, one pipeline
each, and only the loop over slots is Python. What comes out is what the event simulator gives for
the same slots where each boundary has a link of its own and no stage waits for its sends; where
transfers meet at a stage's ports it is less (`tests/costmodel/test_pipeline.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ..ir.errors import CompileError

Array = NDArray[np.float64]
#: (`forward` or `backward`, micro-batch, chunk of the stage from 0 on)
Slot = tuple[str, int, int]
#: the slots of each stage, in the order in which it runs them
Order = tuple[tuple[Slot, ...], ...]


@dataclass(frozen=True)
class ChunkTimes:
    """Times in us of one micro-batch; chunk `c` of stage `s` of `S` is number `c * S + s`.

    Attributes:
        forward, backward: of each chunk, shape (..., chunks).
        activation, gradient: of the transfers from chunk i to i + 1, and back, shape
            (..., chunks - 1). They run beside compute; each boundary has a link of its own in each
            direction, which carries one transfer at a time.
        update: of each stage after its last slot, shape (..., stages).
    """

    forward: Array
    backward: Array
    activation: Array
    gradient: Array
    update: Array


def step_us(order: Order, times: ChunkTimes) -> Array:
    """Time of a step of each pipeline, shape (...). Raises CompileError W0404 for a deadlock."""
    stages = len(order)
    batch = np.broadcast_shapes(
        times.forward.shape[:-1], times.backward.shape[:-1], times.update.shape[:-1]
    )
    free = [np.zeros(batch) for _ in range(stages)]
    done: dict[Slot, Array] = {}
    link: dict[tuple[str, int], Array] = {}
    for stage, (phase, micro, chunk) in _sequence(order):
        number = chunk * stages + stage
        start = free[stage]
        before = _before(phase, number, times.forward.shape[-1])
        if before is not None:
            ready = done.pop((phase, micro, before))
            sent = (times.activation[..., before] if phase == "forward"
                    else times.gradient[..., number])  # fmt: skip
            if before % stages != stage:
                # a link carries one transfer at a time
                ready = np.maximum(ready, link.get((phase, before), ready)) + sent
                link[phase, before] = ready
            start = np.maximum(start, ready)
        own = times.forward if phase == "forward" else times.backward
        end = start + own[..., number]
        free[stage] = end
        done[phase, micro, number] = end
    ends = [free[stage] + times.update[..., stage] for stage in range(stages)]
    return np.asarray(np.maximum.reduce(ends))


def _before(phase: str, number: int, chunks: int) -> int | None:
    """The chunk whose result a slot of chunk `number` waits for, in the same phase."""
    if phase == "forward":
        return number - 1 if number else None
    return number + 1 if number + 1 < chunks else None


@lru_cache(maxsize=256)
def _sequence(order: Order) -> tuple[tuple[int, Slot], ...]:
    """All slots such that each comes behind what it waits for. Raises CompileError W0404."""
    stages = len(order)
    chunks = 1 + max(chunk * stages + s for s, slots in enumerate(order) for _, _, chunk in slots)
    next_of = [0] * stages
    out: list[tuple[int, Slot]] = []
    done: set[Slot] = set()
    while len(out) < sum(map(len, order)):
        before_round = len(out)
        for stage, slots in enumerate(order):
            while next_of[stage] < len(slots):
                phase, micro, chunk = slots[next_of[stage]]
                number = chunk * stages + stage
                before = _before(phase, number, chunks)
                ready = before is None or (phase, micro, before) in done
                if phase == "backward":
                    ready = ready and ("forward", micro, number) in done
                if not ready:
                    break
                done.add((phase, micro, number))
                out.append((stage, slots[next_of[stage]]))
                next_of[stage] += 1
        if len(out) == before_round:
            raise CompileError(
                "W0404", "the order of the stages' slots waits for itself",
                reason=f"stage {next(s for s in range(stages) if next_of[s] < len(order[s]))} waits "
                "for a slot that waits for it", hint="use gpipe, 1f1b or interleaved",
            )  # fmt: skip
    return tuple(out)


def in_flight(order: Order) -> tuple[tuple[int, ...], ...]:
    """For each stage and chunk, how many micro-batches' activations are held where most chunks'
    are held at once. Backwards free them when they end."""
    found = []
    for slots in order:
        chunks = 1 + max(chunk for _, _, chunk in slots)
        held, best = [0] * chunks, [0] * chunks
        for phase, _, chunk in slots:
            if phase == "forward":
                held[chunk] += 1
                if sum(held) > sum(best):
                    best = list(held)
            else:
                held[chunk] -= 1
        found.append(tuple(best))
    return tuple(found)


def lower_bound_us(micro: int, stages: int, times: ChunkTimes) -> Array:
    """No order of the slots of `micro` micro-batches ends earlier, shape (...).

    Each stage runs all of its slots, cannot begin before the first micro-batch has come through
    the chunks ahead of its first one, and after its last backward the gradient goes back through
    them. Besides, one micro-batch goes through everything.
    """
    f, b, a, g = times.forward, times.backward, times.activation, times.gradient
    chunks = f.shape[-1]
    if stages == 1:  # nothing is sent
        a, g = a * 0, g * 0
    there = _sums_before(f, chunks) + _sums_before(a, chunks)
    back = _sums_before(b, chunks) + _sums_before(g, chunks)
    bounds = []
    for stage in range(stages):
        work = micro * (f[..., stage::stages].sum(-1) + b[..., stage::stages].sum(-1))
        # the updates of stages ahead may be longer than what is left of them
        after = [back[..., stage] - back[..., s] + times.update[..., s]
                 for s in range(stage + 1)]  # fmt: skip
        bounds.append(there[..., stage] + work + np.maximum.reduce(after))
    through = (f + b).sum(-1) + (a + g).sum(-1) + times.update[..., 0]
    return np.asarray(np.maximum.reduce([*bounds, through]))


def _sums_before(values: Array, count: int) -> Array:
    """The sum of what stands before each of `count` entries, shape (..., count)."""
    zero = np.zeros((*values.shape[:-1], 1))
    return np.concatenate([zero, np.cumsum(values, -1)], -1)[..., :count]
