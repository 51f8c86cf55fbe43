"""Pipeline schedules: in which order a stage computes its micro-batches.

Each schedule gives, for each rank group (stage), a list of slots: the forward or the backward of a
micro-batch on one of its chunks. With virtual stages a stage has several chunks of the program:
chunk c of stage s is part c * stages + s of the program's chain of parts.

* GPipe: all forwards, then all backwards (Huang et al., 2019). All micro-batches are in flight.
* 1F1B: a warm-up of forwards, then forward and backward in turn (Narayanan et al., PipeDream, 2019).
  Stage s of p has min(m, p - s) micro-batches in flight.
* interleaved 1F1B: the same over chunks (Narayanan et al., Megatron-LM, 2021): groups of `stages`
  micro-batches go through the chunks in turn; a smaller bubble for more transfers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from ..ir.errors import CompileError

FORWARD, BACKWARD = "forward", "backward"


class Slot(NamedTuple):
    """One unit of a stage's work.

    Attributes:
        phase: `forward` or `backward`.
        micro: the micro-batch.
        chunk: which of the stage's chunks; 0 without virtual stages.
    """

    phase: str
    micro: int
    chunk: int = 0


Order = tuple[Slot, ...]


def gpipe(stages: int, micro: int, chunks: int = 1) -> tuple[Order, ...]:
    """All forwards, then all backwards, the last first."""
    forward = [Slot(FORWARD, k, c) for c in range(chunks) for k in range(micro)]
    backward = [Slot(BACKWARD, k, c) for _, k, c in reversed(forward)]
    return ((*forward, *backward),) * stages


def one_f_one_b(stages: int, micro: int, chunks: int = 1) -> tuple[Order, ...]:
    """A warm-up of `stages - 1 - stage` forwards, then forward and backward in turn.

    Raises CompileError W0404 for chunks: see `interleaved`.
    """
    if chunks != 1:
        raise CompileError(
            "W0404", f"1F1B has no virtual stages, {chunks} are asked for",
            reason="the interleaved schedule is 1F1B over them", hint='order="interleaved"',
        )  # fmt: skip
    orders = []
    for stage in range(stages):
        warm = min(micro, stages - 1 - stage)
        order = [Slot(FORWARD, k) for k in range(warm)]
        for k in range(micro - warm):
            order += [Slot(FORWARD, warm + k), Slot(BACKWARD, k)]
        order += [Slot(BACKWARD, k) for k in range(micro - warm, micro)]
        orders.append(tuple(order))
    return tuple(orders)


def interleaved(stages: int, micro: int, chunks: int = 1) -> tuple[Order, ...]:
    """1F1B over chunks.

    The micro-batches go through in groups of `stages` (the last one may be smaller): a group's
    forwards on chunk 0, then on chunk 1, and so on. The warm-up of stage s is
    2 * (stages - 1 - s) + (chunks - 1) * stages forwards.
    """
    if chunks == 1:
        return one_f_one_b(stages, micro)
    forward = [
        Slot(FORWARD, k, c)
        for first in range(0, micro, stages)
        for c in range(chunks)
        for k in range(first, min(micro, first + stages))
    ]
    backward = [
        Slot(BACKWARD, k, chunks - 1 - c)
        for first in range(0, micro, stages)
        for c in range(chunks)
        for k in range(first, min(micro, first + stages))
    ]
    orders = []
    for stage in range(stages):
        warm = min(len(forward), 2 * (stages - 1 - stage) + (chunks - 1) * stages)
        order = forward[:warm]
        for one, two in zip(forward[warm:], backward, strict=False):
            order += [one, two]
        order += backward[len(forward) - warm :]
        orders.append(tuple(order))
    return tuple(_repaired(orders, stages, micro, chunks))


def _repaired(orders: Sequence[Sequence[Slot]], stages: int, micro: int, chunks: int) -> list[Order]:
    """The orders as they are where they run to their end; else with the smallest changes that do.

    The interleaved order is made for micro-batches in whole groups. A last group that is smaller
    may let a stage wait for a slot behind its own: then a slot that can run is taken first.
    """
    done: set[tuple[str, int, int]] = set()
    left = [list(order) for order in orders]
    out: list[list[Slot]] = [[] for _ in orders]
    while any(left):
        ready = []
        for stage, slots in enumerate(left):
            if slots and _runs(slots[0], stage, stages, chunks, done):
                ready.append((stage, slots[0]))
        if not ready:
            stage, slot = next(
                (stage, slot)
                for stage, slots in enumerate(left)
                for slot in slots
                if _runs(slot, stage, stages, chunks, done)
            )
            ready.append((stage, slot))
        for stage, slot in ready:
            left[stage].remove(slot)
            out[stage].append(slot)
        done.update((slot.phase, slot.micro, slot.chunk * stages + stage) for stage, slot in ready)
    return [tuple(order) for order in out]


def _runs(
    slot: Slot, stage: int, stages: int, chunks: int, done: set[tuple[str, int, int]]
) -> bool:
    """Has the part of the program before a slot's been computed?"""
    part = slot.chunk * stages + stage
    if slot.phase == FORWARD:
        return part == 0 or (FORWARD, slot.micro, part - 1) in done
    if (FORWARD, slot.micro, part) not in done:
        return False
    return part == stages * chunks - 1 or (BACKWARD, slot.micro, part + 1) in done


#: name -> the orders of all stages, from (stages, micro-batches, chunks of a stage)
ORDERS: dict[str, Callable[[int, int, int], tuple[Order, ...]]] = {
    "gpipe": gpipe, "1f1b": one_f_one_b, "interleaved": interleaved,
}  # fmt: skip


def orders_of(name: str, stages: int, micro: int, chunks: int = 1) -> tuple[Order, ...]:
    """The orders of all stages under a schedule. Raises CompileError W1001, W0404."""
    found = ORDERS.get(name.lower())
    if found is None:
        raise CompileError(
            "W1001", f"there is no pipeline schedule {name!r}", reason=f"known: {', '.join(ORDERS)}",
            hint='order="1f1b"',
        )  # fmt: skip
    return found(stages, micro, chunks)


def in_flight(order: Sequence[Slot]) -> int:
    """The most (micro-batch, chunk) pairs whose forward is done and whose backward is not."""
    live = most = 0
    for slot in order:
        live += 1 if slot.phase == FORWARD else -1
        most = max(most, live)
    return most


def forward_only(orders: Sequence[Order]) -> tuple[Order, ...]:
    """The orders of a program that has no backward."""
    return tuple(tuple(slot for slot in order if slot.phase == FORWARD) for order in orders)


__all__ = ["BACKWARD", "FORWARD", "ORDERS", "Order", "Slot", "forward_only", "gpipe", "in_flight",
           "interleaved", "one_f_one_b", "orders_of"]  # fmt: skip
