"""Where a sequence of ops repeats: candidates for outlining, found by structure alone.

A program is a word over colours (an op's name, attributes and types). For each shift `d`, the
positions where the word equals itself shifted by `d` form runs; a run of at least `d` positions is
a tandem repeat `w w ... w` of period `d`, a shorter one is a pair of equal subwords. All runs of
all shifts take O(n^2) comparisons in numpy: 0.2 s for 6,000 ops. (Suffix structures do it in
O(n log n), Kolpakov and Kucherov 1999, at the price of several times the code.)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Colors = npt.NDArray[np.int32]
Costs = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Repeat:
    """Positions [start, start + length) repeat with `period`; copies overlap when it is tandem.

    `saving` is how many ops disappear when all of its copies, here and elsewhere, become calls.
    """

    start: int
    length: int
    period: int
    saving: int

    @property
    def tandem(self) -> bool:
        """Do the copies stand one behind the other?"""
        return self.length >= 2 * self.period


def repeats(colors: Colors, min_ops: int, min_apart: int) -> list[Repeat]:
    """Candidates, the largest saving first.

    `min_ops` is the smallest period of a tandem repeat, `min_apart` the smallest length of a pair.
    """
    groups: dict[tuple[int, ...], list[tuple[int, int, int]]] = defaultdict(list)
    found: list[Repeat] = []
    count = len(colors)
    for period in range(min_ops, count):
        same = colors[period:] == colors[:-period]
        least = min(period, min_apart)
        if int(np.count_nonzero(same)) < least:
            continue
        edges = np.flatnonzero(np.diff(np.concatenate(([0], same.view(np.int8), [0]))))
        for start, stop in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
            run = stop - start
            if run >= period:
                word = colors[start : start + period]
                groups[(period, *np.sort(word).tolist())].append((start, run, period))
            elif run >= min_apart:
                found.append(Repeat(start, run, period, run))
    for (period, *_), runs in groups.items():
        copies = sum(run // period + 1 for _, run, _ in runs)
        start, run, _ = max(runs, key=lambda item: (item[1], -item[0]))
        found.append(Repeat(start, run + period, period, (copies - 1) * period))
    return sorted(found, key=lambda r: (-r.saving, r.period, r.start))


def best_cut(
    repeat: Repeat, crossing: Costs, agreement: Costs, widths: Sequence[int]
) -> tuple[int, int]:
    """The subword [start, stop) that becomes the function.

    Of the rotations of a tandem repeat the one where the fewest bytes live across the boundaries of
    copies, then the one with most copies, then the one that agrees best with the user's modules.
    `crossing[t]` is the number of live bytes before position t, `widths[t]` the number of values,
    `agreement[t]` the number of module path components that positions t - 1 and t share: a good
    boundary shares few. Of a pair, up to a quarter on either end is trimmed for a better boundary.
    """
    start, period = repeat.start, repeat.period
    stop = start + repeat.length
    if not repeat.tandem:
        quarter = repeat.length // 4
        first = min(range(start, start + quarter + 1), key=lambda t: (crossing[t], widths[t], t))
        ends = range(stop - quarter, stop + 1)
        last = min(ends, key=lambda t: (crossing[t], widths[t], -t))
        return first, last

    def cost(offset: int) -> tuple[int, int, int, int, int]:
        copies = (repeat.length - offset) // period
        cuts = range(start + offset + period, start + offset + copies * period, period)
        shared = int(sum(agreement[t] for t in cuts))
        return (
            max(int(crossing[t]) for t in cuts),
            max(widths[t] for t in cuts),
            -copies,
            shared,
            offset,
        )

    offsets = [s for s in range(period) if (repeat.length - s) // period >= 2]
    offset = min(offsets, key=cost)
    return start + offset, start + offset + period


def occurrences(colors: Colors, word: Colors) -> list[int]:
    """Starts of the non-overlapping copies of `word`, from the left."""
    data, pattern = colors.tobytes(), word.tobytes()
    width = colors.itemsize
    starts: list[int] = []
    position = data.find(pattern)
    while position >= 0:
        if position % width:
            position = data.find(pattern, position + 1)
            continue
        starts.append(position // width)
        position = data.find(pattern, position + len(pattern))
    return starts
