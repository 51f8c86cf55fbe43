"""When each stage does what: rounds, and the places of sends, receives and waits.

All stages run their slots in rounds: a slot runs in the first round in which its stage is free and
what it reads was made in an earlier one. The rounds are one order of everything that happens, and
every wait is put behind what it waits for in that order, so no two stages wait for each other:

* a receive starts a slot ahead of its reader, in the order of the sends of its channel;
* a send starts behind the slot that makes its value, and is waited for ahead of the first slot of a
  later round than its reader's: what it holds is freed early, and the sender does not stand still
  while the receiver is busy with the slot before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..ir.errors import CompileError
from .orders import Order, Slot


@dataclass(frozen=True)
class Message:
    """A value of one micro-batch that goes from one stage to another.

    Attributes:
        value: its name.
        source, target: the parts of the program (virtual stages).
        micro: the micro-batch; -1 for what is sent once a step.
        made, read: the slots that make and first read it.
    """

    value: str
    source: int
    target: int
    micro: int
    made: Slot
    read: Slot


@dataclass
class Clock:
    """Places of all transfers inside of the loop.

    Attributes:
        rounds: stage -> the round of each slot.
        starts: stage -> position of a slot -> receives that start ahead of it.
        sends: stage -> position of a slot -> sends that start behind it.
        waits: stage -> position of a slot -> sends that are waited for ahead of it; the position
            behind the last slot stands for the end of the loop.
    """

    rounds: list[list[int]]
    starts: list[dict[int, list[Message]]]
    sends: list[dict[int, list[Message]]]
    waits: list[dict[int, list[Message]]]


def stage_of(part: int, stages: int) -> int:
    """The stage that computes a part of the program."""
    return part % stages


def clock(orders: Sequence[Order], messages: Sequence[Message]) -> Clock:
    """Place all transfers between stages.

    Args:
        messages: in the order in which a slot makes them. Those of one stage with itself only
            decide the rounds.

    Raises CompileError W0404 where the orders wait for each other.
    """
    stages = len(orders)
    places = [{slot: i for i, slot in enumerate(order)} for order in orders]
    rounds = _rounds(orders, messages)
    out = Clock(rounds, [{} for _ in orders], [{} for _ in orders], [{} for _ in orders])
    channels: dict[tuple[int, int], list[Message]] = {}
    for message in messages:
        one, two = stage_of(message.source, stages), stage_of(message.target, stages)
        if one != two:
            channels.setdefault((one, two), []).append(message)
    for (one, two), sent in channels.items():
        order = sorted(range(len(sent)), key=lambda i: (places[one][sent[i].made], i))
        in_order = [sent[i] for i in order]
        start = len(orders[two])
        starts: list[int] = []
        for message in reversed(in_order):  # none starts behind a later one of its channel
            start = min(start, max(0, places[two][message.read] - 1))
            starts.append(start)
        for message, at in zip(in_order, reversed(starts), strict=True):
            made = places[one][message.made]
            out.starts[two].setdefault(at, []).append(message)
            out.sends[one].setdefault(made, []).append(message)
            read = rounds[two][places[two][message.read]]
            later = (i for i in range(made + 1, len(orders[one])) if rounds[one][i] > read)
            out.waits[one].setdefault(next(later, len(orders[one])), []).append(message)
    return out


def _rounds(orders: Sequence[Order], messages: Sequence[Message]) -> list[list[int]]:
    stages = len(orders)
    reads: dict[tuple[int, Slot], list[tuple[int, Slot]]] = {}
    for message in messages:
        reads.setdefault((stage_of(message.target, stages), message.read), []).append(
            (stage_of(message.source, stages), message.made)
        )
    done: dict[tuple[int, Slot], int] = {}
    rounds: list[list[int]] = [[] for _ in orders]
    number = 0
    while any(len(r) < len(o) for r, o in zip(rounds, orders, strict=True)):
        ready = [
            (stage, order[len(r)])
            for stage, (r, order) in enumerate(zip(rounds, orders, strict=True))
            if len(r) < len(order)
            and all(need in done for need in reads.get((stage, order[len(r)]), ()))
        ]
        if not ready:
            stuck = next(i for i, (r, o) in enumerate(zip(rounds, orders, strict=True)) if len(r) < len(o))
            slot = orders[stuck][len(rounds[stuck])]
            raise CompileError(
                "W0404", f"the order of the stages deadlocks at stage {stuck}",
                reason=f"the {slot.phase} of micro-batch {slot.micro} waits for what comes later",
                hint="use one of the known orders",
            )  # fmt: skip
        for stage, slot in ready:
            done[stage, slot] = number
            rounds[stage].append(number)
        number += 1
    return rounds


__all__ = ["Clock", "Message", "clock", "stage_of"]

