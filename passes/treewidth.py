"""Elimination orders of graphs, and the width and table sizes that they lead to.

Eliminating a vertex joins its neighbours; the largest number of neighbours met is the width of the
order, and the least width over all orders is the treewidth, which is NP-hard to find. The greedy
rules min-fill (fewest edges to add) and min-weight (smallest table) are within 1 of the best known
width on most benchmark graphs. Bodlaender and Koster, Treewidth computations I, 2010; Dechter,
Bucket elimination, 1999.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import inf, log10


@dataclass(frozen=True)
class Order:
    """An elimination order.

    Attributes:
        vertices: all vertices, first eliminated first.
        width: most neighbours that a vertex has when it is eliminated.
        table_log10: logarithm of the largest table that elimination leaves (neighbours' states).
        work_log10: logarithm of the number of additions in all.
    """

    vertices: tuple[int, ...]
    width: int
    table_log10: float
    work_log10: float


def eliminate(
    graph: Mapping[int, Iterable[int]],
    sizes: Mapping[int, int],
    rule: str = "min-fill",
    most_log10: float = inf,
) -> Order:
    """The order that a greedy rule finds; ties go to the earlier vertex.

    Args:
        graph: neighbours of each vertex, symmetric.
        sizes: number of states of each vertex.
        rule: `min-fill`, `min-weight` or `min-degree`.
        most_log10: the order ends at the first table that is larger.

    Raises:
        KeyError: for an unknown rule.
    """
    near = {v: set(others) - {v} for v, others in graph.items()}
    logs = {v: log10(max(1, sizes[v])) for v in near}
    score = _RULES[rule]
    rank = {v: number for number, v in enumerate(near)}
    heap = [(score(v, near, logs), rank[v], v) for v in near]
    heapq.heapify(heap)
    order: list[int] = []
    width, table, work = 0, 0.0, 0.0
    while heap:
        value, _, v = heapq.heappop(heap)
        if v not in near:
            continue
        current = score(v, near, logs)
        if current > value:  # an outdated entry: scores of neighbours' neighbours change lazily
            heapq.heappush(heap, (current, rank[v], v))
            continue
        others = near.pop(v)
        order.append(v)
        width = max(width, len(others))
        left = sum(logs[u] for u in others)
        table, work = max(table, left), work + 10.0 ** min(300.0, left + logs[v])
        if left > most_log10:
            break
        for u in others:
            near[u] |= others - {u}
            near[u].discard(v)
        for u in others:
            heapq.heappush(heap, (score(u, near, logs), rank[u], u))
    return Order(tuple(order), width, table, log10(max(work, 1.0)))


def best_order(
    graph: Mapping[int, Iterable[int]], sizes: Mapping[int, int], most_log10: float = inf
) -> Order:
    """The order with the least work among those of the greedy rules; see `eliminate`."""
    found = [eliminate(graph, sizes, rule, most_log10) for rule in _RULES]
    return min(found, key=lambda order: (order.table_log10 > most_log10, order.work_log10))


def _fill(v: int, near: Mapping[int, set[int]], logs: Mapping[int, float]) -> float:
    others = near[v]
    linked = sum(len(near[u] & others) for u in others)
    return (len(others) * (len(others) - 1) - linked) / 2


def _weight(v: int, near: Mapping[int, set[int]], logs: Mapping[int, float]) -> float:
    return logs[v] + sum(logs[u] for u in near[v])


def _degree(v: int, near: Mapping[int, set[int]], logs: Mapping[int, float]) -> float:
    return float(len(near[v]))


_RULES: Mapping[str, Callable[..., float]] = {
    "min-fill": _fill,
    "min-weight": _weight,
    "min-degree": _degree,
}
