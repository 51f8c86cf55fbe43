"""Values with several readers: the producer's placement and the shared copies, as one variable.

A value that two readers need in another placement is resharded once, so the cost of its reshards
is not a sum over readers. A hub has a state for each placement of the producer and each set of
shared copies of it; given that state, the readers' costs are independent: nothing for a reader that
needs what is there, its own reshard for any other.

Where the sets of copies are too many, the hub has the producer's placement only, and each of the n
readers that may want a placement pays an n-th of its reshard: a lower bound, however many share it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from .place_network import FORBIDDEN, Array, Index

#: states of a hub with room for two copies above which it is relaxed
_MOST_STATES = 1000
#: with r readers at most r/2 copies are shared; hubs have room for two
_MOST_READERS = 5


@dataclass(frozen=True)
class Hub:
    """States of a hub; `targets` are the placements that readers may need.

    Attributes:
        source: for each state the number of the producer's placement.
        copies: (state, target): is it a shared copy?
        there: (state, target): is it the producer's placement or a copy?
        divisor: for each target, what a reader's own reshard is divided by; 1 unless relaxed.
    """

    source: Index
    copies: NDArray[np.bool_]
    there: NDArray[np.bool_]
    divisor: Array

    @property
    def relaxed(self) -> bool:
        """Are the costs lower bounds only?"""
        return bool((self.divisor > 1).any())

    def copy_costs(self, table: Array) -> Array:
        """Cost of making the copies, from a table (source, target)."""
        return np.asarray(np.where(self.copies, table[self.source], 0.0).sum(axis=1))

    def reader_costs(self, table: Array) -> Array:
        """(state, target): cost for a reader that needs the target."""
        own = table[self.source]
        own = np.where(own >= FORBIDDEN / 2, FORBIDDEN, own / self.divisor)
        return np.where(self.there, 0.0, own)

    def agreement(self, held: Index) -> Array:
        """(state, producer's state): forbidden where the placements differ."""
        return np.where(self.source[:, None] == held[None, :], 0.0, FORBIDDEN)

    def copy_bytes(self, sizes: Array) -> Array:
        """Bytes of the shared copies, from the bytes of each target."""
        return np.asarray(self.copies @ sizes, dtype=np.float64)


def make_hub(
    same: NDArray[np.bool_], table: Array, wishes: Sequence[Sequence[int]], again: float = 1.0
) -> Hub:
    """The hub of a value.

    Args:
        same: (source, target): are they the same placement?
        table: (source, target): cost of the reshard.
        wishes: for each reader the targets that it may need.
        again: how often a reader's own reshard runs for each time that a copy is made: gathered
            once for all micro-batches, or in each.

    A copy is of use where it is not free, and two readers may want it or it saves repetitions.
    """
    alone = 1 if again > 1 else 2
    wanted = np.zeros(table.shape[1], dtype=int)
    for targets in wishes:
        wanted[list(set(targets))] += 1
    useful = (table > 0) & (table < FORBIDDEN / 2) & (wanted >= alone)[None, :]
    bare: list[tuple[int, tuple[int, ...]]] = [(source, ()) for source in range(table.shape[0])]
    states = list(bare)
    most = max(len(wishes) // alone, 1)
    for source in range(table.shape[0]):
        paid = np.flatnonzero(useful[source]).tolist()
        for size in range(1, min(most, 2) + 1):
            states += [(source, picked) for picked in combinations(paid, size)]
    divisor = np.ones(table.shape[1])
    large = most > 1 and len(states) > _MOST_STATES
    if useful.any() and (most > 2 or len(wishes) > _MOST_READERS or large):
        states, divisor = bare, np.maximum(divisor, wanted * again)
    numbers = np.array([source for source, _ in states])
    copies = np.zeros((len(states), table.shape[1]), dtype=bool)
    for row, (_, targets) in enumerate(states):
        copies[row, list(targets)] = True
    return Hub(numbers, copies, copies | same[numbers], divisor)
