"""Finding the blocks of a sequence of ops: candidates by their words, proofs by their dataflow."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from ..ir.module import Op
from .outline_core import Instance, Wiring, color_key, common_prefix, foreign, is_update, wiring
from .outline_words import Colors, Costs, best_cut, occurrences, repeats

#: repeats looked at before giving up; the useful ones come first
_CANDIDATES = 100


class Finder:
    """Finds the blocks of a sequence of ops: lists of instances with equal dataflow."""

    def __init__(self, core: Sequence[Op]) -> None:
        self.core = core
        table: dict[object, int] = {}
        colors = [table.setdefault(color_key(op), len(table)) for op in core]
        self.colors: Colors = np.array(colors, dtype=np.int32)
        self.covered = 0
        self.crossing, self.widths = self._live()
        self.agreement = self._agreement()

    def _live(self) -> tuple[Costs, list[int]]:
        """Bytes and number of the values that are live before each position, and at the end."""
        made: dict[str, int] = {}
        last: dict[str, int] = {}
        size: dict[str, int] = {}
        for position, op in enumerate(self.core):
            for value in op.operands:
                last[value.name] = position
            for value in op.results:
                made[value.name], size[value.name] = position, value.type.bytes
        steps = np.zeros((2, len(self.core) + 2), dtype=np.int64)
        for name, position in made.items():
            if name in last:
                steps[:, position + 1] += (size[name], 1)
                steps[:, last[name] + 1] -= (size[name], 1)
        total = np.cumsum(steps, axis=1)
        return total[0], total[1].tolist()

    def _agreement(self) -> Costs:
        """Leading module path components that the ops around each position share."""
        shared = np.zeros(len(self.core) + 2, dtype=np.int64)
        paths = [op.loc.path.split(".") if op.loc.path else [] for op in self.core]
        for position in range(1, len(paths)):
            shared[position] = len(common_prefix(paths[position - 1 : position + 1]))
        return shared

    def find(self, min_ops: int, min_apart: int) -> list[list[Instance]]:
        """The instances of each block; blocks and instances in program order."""
        blocks: list[list[Instance]] = []
        rejected: set[bytes] = set()
        while True:
            found: list[list[Instance]] = []
            for repeat in repeats(self.colors, min_ops, min_apart)[:_CANDIDATES]:
                start, stop = best_cut(repeat, self.crossing, self.agreement, self.widths)
                word = self.colors[start:stop].copy()
                if word.tobytes() in rejected:
                    continue
                found = self._groups(word, min_apart)
                if found:
                    break
                rejected.add(word.tobytes())
            if not found:
                return sorted(blocks)
            for group in found:
                for instance in group:
                    self._cover(instance)
            blocks += [self._extend(word, group) for group in found]

    def _groups(self, word: Colors, min_apart: int) -> list[list[Instance]]:
        """Copies of a word, grouped by their dataflow."""
        classes: dict[Wiring, list[Instance]] = {}
        for start in occurrences(self.colors, word):
            instance = tuple(range(start, start + len(word)))
            classes.setdefault(wiring(self.core, instance), []).append(instance)
        return [
            group
            for group in classes.values()
            if len(group) > 1
            and (len(word) >= min_apart or self._updates(group[0]) or self._chained(group))
        ]

    def _updates(self, instance: Instance) -> bool:
        return all(is_update(self.core[position]) for position in instance)

    def _chained(self, group: Sequence[Instance]) -> bool:
        """Does each copy read a result of an earlier one?"""
        made: set[str] = set()
        for instance in group:
            read = {value.name for position in instance for value in self.core[position].operands}
            if made and not made & read:
                return False
            made |= {value.name for position in instance for value in self.core[position].results}
        return True

    def _cover(self, instance: Iterable[int]) -> None:
        for position in instance:
            self.covered += 1
            self.colors[position] = -self.covered

    def _extend(self, word: Colors, group: list[Instance]) -> list[Instance]:
        """Add neighbours that are copies but for foreign ops in between."""
        target = wiring(self.core, group[0])
        group = list(group)
        for step, start in ((-1, group[0][0] - 1), (1, group[-1][-1] + 1)):
            while True:
                instance = self._match(word, start, step)
                if instance is None or wiring(self.core, instance) != target:
                    break
                if foreign(self.core, instance) is None:
                    break
                hull = range(instance[0], instance[-1] + 1)
                self._cover(hull)
                group.append(instance)
                start = hull[0] - 1 if step < 0 else hull[-1] + 1
        return sorted(group)

    def _match(self, word: Colors, start: int, step: int) -> Instance | None:
        """The word as a subsequence from `start` on, read in the direction of `step`."""
        wanted = word[::step].tolist()
        slack = len(wanted) // 2 + 8  # more foreign ops than that make it another block
        out: list[int] = []
        position = start
        while len(out) < len(wanted):
            if not 0 <= position < len(self.colors) or slack < 0 or self.colors[position] < 0:
                return None
            if self.colors[position] == wanted[len(out)]:
                out.append(position)
            else:
                slack -= 1
            position += step
        return tuple(out[::step])
