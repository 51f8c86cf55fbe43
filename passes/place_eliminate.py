"""Bucket elimination: the exact minimum of a cost network, through a tree decomposition.

Variables are minimised out in an elimination order; each leaves a table over its neighbours (its
separator in the tree decomposition), so time and memory are d^(w+1) and d^w for d states and width
w. Dechter, Bucket elimination: a unifying framework for reasoning, 1999.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import numpy as np
from numpy.typing import NDArray

from .place_network import Array, Network
from .treewidth import Order, best_order, eliminate

#: variables above which one greedy rule has to do
_LARGE = 1000


@dataclass(frozen=True)
class _Factor:
    scope: tuple[int, ...]
    table: Array


def order_of(network: Network, most_log10: float = inf) -> Order:
    """The best elimination order that the greedy rules find; the quickest rule in large networks.

    It ends at the first table with more entries than `most_log10` says.
    """
    sizes = {v: len(u) for v, u in network.unary.items()}
    if len(network.unary) > _LARGE:
        return eliminate(network.near, sizes, "min-degree", most_log10)
    return best_order(network.near, sizes, most_log10)


def solve_by_elimination(network: Network, order: Sequence[int]) -> tuple[float, dict[int, int]]:
    """The least cost and an assignment of positions that has it."""
    factors = [_Factor((v,), costs) for v, costs in network.unary.items()]
    for i, row in network.near.items():
        factors += [_Factor((i, j), table.array) for j, table in row.items() if i < j]
    total = network.constant
    buckets: dict[int, list[_Factor]] = {v: [] for v in order}
    rank = {v: n for n, v in enumerate(order)}
    for factor in factors:
        buckets[min(factor.scope, key=rank.__getitem__)].append(factor)
    decisions: list[tuple[int, tuple[int, ...], NDArray[np.int32]]] = []
    for v in order:
        scope, table, choice = _minimise(v, buckets.pop(v), len(network.unary[v]), rank)
        decisions.append((v, scope, choice))
        if scope:
            buckets[scope[0]].append(_Factor(scope, table))
        else:
            total += float(table)
    found: dict[int, int] = {}
    for v, scope, choice in reversed(decisions):
        found[v] = int(choice[tuple(found[u] for u in scope)])
    return total, found


def _minimise(
    v: int, factors: Sequence[_Factor], count: int, rank: dict[int, int]
) -> tuple[tuple[int, ...], Array, NDArray[np.int32]]:
    """Table and argmin over the other variables of the factors, one state of `v` at a time.

    The separator's table is never expanded by the states of `v`.
    """
    scope = tuple(sorted({u for f in factors for u in f.scope} - {v}, key=rank.__getitem__))
    sizes: dict[int, int] = {}
    parts = []
    for factor in factors:
        axes = sorted(range(len(factor.scope)), key=lambda a: rank[factor.scope[a]])
        table = factor.table.transpose(axes)  # `v` comes first: it is the earliest of all
        names = [factor.scope[a] for a in axes]
        sizes.update(zip(names, table.shape, strict=True))
        shape = [count, *(sizes[u] if u in names else 1 for u in scope)]
        parts.append(table.reshape(shape))
    parts.sort(key=lambda part: part.size)
    full = tuple(sizes[u] for u in scope)
    best = np.full(full, np.inf)
    choice = np.zeros(full, dtype=np.int32)
    for state in range(count):
        row: Array = np.zeros((1,) * len(scope))
        for part in parts:
            row = row + part[state]
        better = row < best
        np.copyto(choice, state, where=better)
        np.copyto(best, np.broadcast_to(row, full), where=better)
    return scope, best, choice
