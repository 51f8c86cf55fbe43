"""Values with several readers: the producer's placement and the shared copies, as one variable.

A value that two readers need in another placement is resharded once, so the cost of its reshards
is not a sum over readers. A hub has a state for each placement of the producer and each set of
shared copies of it; given that state, the readers' costs are independent: nothing for a reader that
needs what is there, its own reshard for any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from .place_network import FORBIDDEN, Array, Index

#: states of a hub above which it gets room for one copy only
_MOST_STATES = 400


@dataclass(frozen=True)
class Hub:
    """States of a hub; `targets` are the placements that readers may need.

    Attributes:
        source: for each state the number of the producer's placement.
        copies: (state, target): is it a shared copy?
        there: (state, target): is it the producer's placement or a copy?
    """

    source: Index
    copies: NDArray[np.bool_]
    there: NDArray[np.bool_]

    def copy_costs(self, table: Array) -> Array:
        """Cost of making the copies, from a table (source, target)."""
        return np.asarray(np.where(self.copies, table[self.source], 0.0).sum(axis=1))

    def reader_costs(self, table: Array) -> Array:
        """(state, target): cost for a reader that needs the target."""
        return np.where(self.there, 0.0, table[self.source])

    def agreement(self, held: Index) -> Array:
        """(state, producer's state): forbidden where the placements differ."""
        return np.where(self.source[:, None] == held[None, :], 0.0, FORBIDDEN)

    def copy_bytes(self, sizes: Array) -> Array:
        """Bytes of the shared copies, from the bytes of each target."""
        return np.asarray(self.copies @ sizes, dtype=np.float64)

    def reader_bytes(self, sizes: Array) -> Array:
        """(state, target): bytes of a copy that one reader has for itself."""
        return np.where(self.there, 0.0, sizes[None, :])


def make_hub(same: NDArray[np.bool_], table: Array, wishes: Sequence[Sequence[int]]) -> Hub:
    """The hub of a value.

    Args:
        same: (source, target): are they the same placement?
        table: (source, target): cost of the reshard.
        wishes: for each reader the targets that it may need.

    A copy is of use where two readers may want it and it is not free. Two copies are offered for
    values with four readers or more, as long as the hub stays small.
    """
    wanted = np.zeros(table.shape[1], dtype=int)
    for targets in wishes:
        wanted[list(set(targets))] += 1
    useful = (table > 0) & (table < FORBIDDEN / 2) & (wanted > 1)[None, :]
    single: list[tuple[int, tuple[int, ...]]] = []
    double: list[tuple[int, tuple[int, ...]]] = []
    for source in range(table.shape[0]):
        paid = np.flatnonzero(useful[source]).tolist()
        single += [(source, ()), *((source, (target,)) for target in paid)]
        if len(wishes) >= 4:
            double += [(source, pair) for pair in combinations(paid, 2)]
    states = single + double if len(single) + len(double) <= _MOST_STATES else single
    numbers = np.array([source for source, _ in states])
    copies = np.zeros((len(states), table.shape[1]), dtype=bool)
    for row, (_, targets) in enumerate(states):
        copies[row, list(targets)] = True
    return Hub(numbers, copies, copies | same[numbers])
