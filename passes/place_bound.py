"""Lower bounds for cost networks: sequential tree-reweighted message passing (TRW-S).

Messages move cost between pairwise and unary terms without changing any total. The sum of all
minima is then a lower bound, and it never falls from sweep to sweep (Kolmogorov, Convergent
tree-reweighted message passing, 2006). On the way back each variable in turn takes its best state
given those before it: a good feasible assignment. Reduced costs then exclude states: one whose own
bound exceeds the cost of a known assignment is in no better assignment.
"""

from __future__ import annotations

import numpy as np

from .place_network import FORBIDDEN, Array, Network

#: sweeps without this relative gain of the bound are the last
_GAIN = 1e-5


def tighten(network: Network, sweeps: int) -> tuple[float, dict[int, int]]:
    """Reparametrise in place; returns (lower bound, assignment of positions decoded on the way)."""
    order = _order(network)
    rank = {v: n for n, v in enumerate(order)}
    messages: dict[tuple[int, int], Array] = {
        (i, j): np.zeros(table.shape[1])
        for i, row in network.near.items()
        for j, table in row.items()
    }
    share = {}
    for v in order:
        later = sum(rank[u] > rank[v] for u in network.near[v])
        share[v] = 1.0 / max(1, later, len(network.near[v]) - later)
    bound, best_cost = -np.inf, np.inf
    best: dict[int, int] = {}
    for sweep in range(max(1, sweeps)):
        _pass(network, order, rank, share, messages)
        _pass(network, order[::-1], {v: -n for v, n in rank.items()}, share, messages)
        found = _decode(network, order, rank, messages)
        cost = network.cost(found)
        if cost < best_cost:
            best_cost, best = cost, found
        if sweep % 4 == 3:
            after = _bound(network, messages)
            if after - bound <= _GAIN * max(1.0, abs(after)):
                break
            bound = after
    _absorb(network, messages)
    return lower_bound(network), _polish(network, best)


def lower_bound(network: Network) -> float:
    """Constant and the sum of all minima."""
    total = network.constant + sum(float(u.min()) for u in network.unary.values())
    for i, row in network.near.items():
        total += sum(float(table.min()) for j, table in row.items() if i < j)
    return total


def exclude(network: Network, upper: float, tolerance: float) -> bool:
    """Drop states whose bound is above `upper`; True when any was dropped."""
    bound, changed = lower_bound(network), False
    for i in list(network.unary):
        own = network.unary[i] - network.unary[i].min()
        for table in network.near[i].values():
            own = own + (table.min(axis=1) - table.min())
        good = bound + own <= upper + tolerance
        if not good.all():
            network.keep(i, good)
            changed = True
            if not good.any():
                network.constant = FORBIDDEN
                return True
            bound = lower_bound(network)
    return changed


def _order(network: Network) -> list[int]:
    """Breadth first from the variable with the most neighbours, so that chains stay chains."""
    left = dict.fromkeys(sorted(network.unary, key=lambda v: -len(network.near[v])))
    order: list[int] = []
    while left:
        queue = [next(iter(left))]
        del left[queue[0]]
        for v in queue:
            for u in network.near[v]:
                if u in left:
                    del left[u]
                    queue.append(u)
        order += queue
    return order


def _belief(network: Network, v: int, messages: dict[tuple[int, int], Array]) -> Array:
    total = network.unary[v]
    for u in network.near[v]:
        total = total + messages[u, v]
    return total


def _pass(
    network: Network,
    order: list[int],
    rank: dict[int, int],
    share: dict[int, float],
    messages: dict[tuple[int, int], Array],
) -> None:
    for v in order:
        part = share[v] * _belief(network, v, messages)
        for u, table in network.near[v].items():
            if rank[u] > rank[v]:
                out = ((part - messages[u, v])[:, None] + table).min(axis=0)
                messages[v, u] = np.minimum(out - out.min(), FORBIDDEN)


def _decode(
    network: Network,
    order: list[int],
    rank: dict[int, int],
    messages: dict[tuple[int, int], Array],
) -> dict[int, int]:
    found: dict[int, int] = {}
    for v in order:
        costs = network.unary[v]
        for u, table in network.near[v].items():
            costs = costs + (table[:, found[u]] if rank[u] < rank[v] else messages[u, v])
        found[v] = int(np.argmin(costs))
    return found


def _moved(network: Network, messages: dict[tuple[int, int], Array], i: int, j: int) -> Array:
    return network.near[i][j] - messages[j, i][:, None] - messages[i, j][None, :]


def _bound(network: Network, messages: dict[tuple[int, int], Array]) -> float:
    total = network.constant
    for i, row in network.near.items():
        total += float(_belief(network, i, messages).min())
        total += sum(float(_moved(network, messages, i, j).min()) for j in row if i < j)
    return total


def _absorb(network: Network, messages: dict[tuple[int, int], Array]) -> None:
    unary = {v: _belief(network, v, messages) for v in network.unary}
    for i in list(network.near):
        for j in network.near[i]:
            if i < j:
                table = _moved(network, messages, i, j)
                network.near[i][j] = table
                network.near[j][i] = table.T
    network.unary = unary


def _polish(network: Network, found: dict[int, int]) -> dict[int, int]:
    """Iterated conditional modes: change one variable at a time while that helps."""
    found = dict(found)
    for _ in range(8):
        changed = False
        for v, costs in network.unary.items():
            for u, table in network.near[v].items():
                costs = costs + table[:, found[u]]
            best = int(np.argmin(costs))
            if costs[best] < costs[found[v]] - 1e-9:
                found[v], changed = best, True
        if not changed:
            break
    return found
