"""The graph of who waits for whom: part of the static check (`schedule_check.py`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

Node = tuple[object, ...]


@dataclass(frozen=True, slots=True)
class Event:
    """A step of a rank that another rank can hold up: the start of a transfer, or a wait for it.

    `group` is the mesh axis of a collective, or ("send" | "recv", the partner's stage), where that has
    a mesh of another shape ("send across" | "recv across", the stage); `number` counts the transfers
    of that group in this program.
    """

    index: int
    start: bool
    group: str | tuple[str, int]
    number: int


class Progress:
    """The graph of starts, transfers and waits of all classes of ranks (see `schedule_check`)."""

    def __init__(self) -> None:
        self.after: dict[Node, set[Node]] = {}
        self.shown: dict[Node, tuple[int, Event]] = {}

    def _edge(self, before: Node, after: Node) -> None:
        self.after.setdefault(before, set()).add(after)
        self.after.setdefault(after, set())

    def add_program(
        self,
        rank: int,
        events: Sequence[Event],
        channel: Callable[[Event], tuple[object, ...]],
    ) -> None:
        """Add the events of one representative rank."""
        previous: Node | None = None
        for position, event in enumerate(events):
            name = channel(event)
            done: Node = ("done", name, event.number)
            merged = event.start and isinstance(event.group, str)
            node: Node = ("start", name, event.number) if merged else ("event", rank, position)
            self.shown.setdefault(node, (rank, event))
            if event.start:
                self._edge(node, done)
                if event.number:
                    self._edge(("done", name, event.number - 1), done)
            else:
                self._edge(done, node)
            if previous is not None:
                self._edge(previous, node)
            previous = node

    def cycle(self) -> list[tuple[int, Event]]:
        """The events on a cycle, each waiting for the next; empty when there is none."""
        pending = dict.fromkeys(self.after, 0)
        for targets in self.after.values():
            for node in targets:
                pending[node] += 1
        ready = [node for node, count in pending.items() if not count]
        while ready:
            node = ready.pop()
            del pending[node]
            for target in self.after[node]:
                pending[target] -= 1
                if not pending[target]:
                    ready.append(target)
        if not pending:
            return []
        before = {t: n for n in pending for t in self.after[n] if t in pending}
        node = next(iter(before))
        path: dict[Node, None] = {}
        while node not in path:
            path[node] = None
            node = before[node]
        found = list(path)
        return [self.shown[n] for n in found[found.index(node) :] if n in self.shown]
