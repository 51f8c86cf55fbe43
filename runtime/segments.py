"""Cuts a rank's actions into segments without communication, to be compiled each as one function.

A segment is a pure function: it reads values and makes new ones. Transfers, their waits, updates in
place and frees stay actions of their own:

    before:  a, b, start(c), d, update(p, e), f, wait(c), g
    after:   [a b] start(c) [d f] update(p, e) wait(c) [g]

A transfer of a value that was there before the open segment starts ahead of it, if it does not write
the value; one of a value that the segment makes ends it. An update waits for the end of the segment,
unless the segment reads its result. The order of transfers, and of everything else that has an
effect, stays.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ..ir.module import Op
from .comm import COMMUNICATION

Action = tuple[int, Op]


@dataclass
class Segment:
    """Actions that run as one function.

    Attributes:
        takes: values that it reads and does not make, in the order of their first use.
        gives: values that it makes and others read, in the order they are made.
        run: the compiled function, `run(*takes) -> gives`.
    """

    actions: list[Action]
    takes: list[str] = field(default_factory=list)
    gives: list[str] = field(default_factory=list)
    run: Callable[..., Sequence[Tensor]] | None = None


#: a segment, or actions that run one by one
Piece = Segment | list[Action]


class _Cutter:
    def __init__(self) -> None:
        self.pieces: list[Piece] = []
        self.open: list[Action] = []  # actions of the segment
        self.made: set[str] = set()  # by the segment
        self.behind: list[Action] = []  # updates and frees that follow the segment
        self.late: set[str] = set()  # results of those updates

    def add(self, action: Action) -> None:
        op = action[1]
        if op.name == "free" or op.attrs.get("inplace"):
            if not self.open:
                self.plain([action])
                return
            self.behind.append(action)
            self.late.update(value.name for value in op.results)
            return
        reads = {value.name for value in op.operands}
        if op.name in COMMUNICATION or op.name == "wait":
            # an all_reduce may write its operand, which the open segment may read
            ahead = op.name in COMMUNICATION and op.name != "all_reduce"
            if not ahead or reads & (self.made | self.late):
                self.close()
            self.plain([action])
            return
        if reads & self.late:
            self.close()
        self.open.append(action)
        self.made.update(value.name for value in op.results)

    def plain(self, actions: list[Action]) -> None:
        """Actions ahead of the open segment."""
        if self.pieces and isinstance(self.pieces[-1], list):
            self.pieces[-1].extend(actions)
        elif actions:
            self.pieces.append(list(actions))

    def close(self) -> None:
        if self.open:
            self.pieces.append(Segment(self.open))
        self.plain(self.behind)
        self.open, self.behind = [], []
        self.made, self.late = set(), set()


def segments(actions: Sequence[Action], kept: Collection[str]) -> list[Piece]:
    """The pieces of a section.

    Args:
        kept: values that are read after the actions: results, and what is handed on.
    """
    cutter = _Cutter()
    for action in actions:
        cutter.add(action)
    cutter.close()
    readers: dict[str, set[int]] = {}
    for index, op in actions:
        if op.name != "free":
            for value in op.operands:
                readers.setdefault(value.name, set()).add(index)
    for piece in cutter.pieces:
        if isinstance(piece, Segment):
            _bind(piece, readers, kept)
    return cutter.pieces


def _bind(segment: Segment, readers: dict[str, set[int]], kept: Collection[str]) -> None:
    """Fill in what a segment takes and gives."""
    inside = {index for index, _ in segment.actions}
    made: set[str] = set()
    for _, op in segment.actions:
        for value in op.operands:
            if value.name not in made and value.name not in segment.takes:
                segment.takes.append(value.name)
        for value in op.results:
            made.add(value.name)
            if value.name in kept or readers.get(value.name, set()) - inside:
                segment.gives.append(value.name)


__all__ = ["Action", "Piece", "Segment", "segments"]
