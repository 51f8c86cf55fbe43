"""Lower bounds for cost networks: sequential reweighted message passing.

Messages move cost between pairwise and unary terms without changing any total; the sum of all
minima is a lower bound. A variable first pulls what its pairwise terms guarantee each of its
states, then pushes its cost on to the terms ahead in the order, in equal shares; neither step ever
lowers the bound (Kolmogorov, A new look at reweighted message passing, 2015; TRW-S, 2006). Deciding
the variables one by one against the moved costs gives good assignments. Reduced costs then exclude
states: one whose own bound exceeds the cost of a known assignment is in no better assignment.
"""

from __future__ import annotations

import numpy as np

from .place_network import FORBIDDEN, Array, Network

#: the bound is looked at every so many sweeps; a smaller relative gain than this ends them
_EVERY, _GAIN = 5, 1e-4


Messages = dict[tuple[int, int], Array]


def tighten(network: Network, sweeps: int) -> tuple[float, dict[int, int]]:
    """Reparametrise in place; returns (lower bound, assignment of positions decoded on the way)."""
    order = _order(network)
    rank = {v: n for n, v in enumerate(order)}
    back = {v: -n for v, n in rank.items()}
    messages: Messages = {
        (i, j): np.zeros(table.shape[1])
        for i, row in network.near.items()
        for j, table in row.items()
    }
    share = {}
    for v in order:
        later = sum(rank[u] > rank[v] for u in network.near[v])
        share[v] = 1.0 / max(1, later, len(network.near[v]) - later)
    best_cost, bound = np.inf, -np.inf
    best: dict[int, int] = {}
    for sweep in range(max(1, sweeps)):
        _pass(network, order, rank, share, messages)
        _pass(network, order[::-1], back, share, messages)
        if sweep % _EVERY == _EVERY - 1 or sweep == sweeps - 1:
            found = _polish(network, _decode(network, order, messages))
            cost = network.cost(found)
            if cost < best_cost:
                best_cost, best = cost, found
            after = _bound(network, messages)
            if after - bound <= _GAIN * max(1.0, abs(after)):
                break
            bound = after
    _absorb(network, messages)
    return lower_bound(network), best


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
    return changed  # the bound has only risen meanwhile: what was excluded stays excluded


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


def _belief(network: Network, v: int, messages: Messages) -> Array:
    total = network.unary[v]
    for u in network.near[v]:
        total = total + messages[u, v]
    return total


def _pass(
    network: Network,
    order: list[int],
    rank: dict[int, int],
    share: dict[int, float],
    messages: Messages,
) -> None:
    for v in order:
        ahead = []
        for u, table in network.near[v].items():
            messages[u, v] = (table - messages[v, u][None, :]).min(axis=1)
            if rank[u] > rank[v]:
                ahead.append(u)
        if ahead:
            part = share[v] * _belief(network, v, messages)
            for u in ahead:
                messages[u, v] = messages[u, v] - part


def _decode(network: Network, order: list[int], messages: Messages) -> dict[int, int]:
    found: dict[int, int] = {}
    for v in order:
        costs = _belief(network, v, messages)
        for u in network.near[v]:
            moved = _moved(network, messages, v, u)
            costs = costs + (moved[:, found[u]] if u in found else moved.min(axis=1))
        found[v] = int(np.argmin(costs))
    return found


def _moved(network: Network, messages: Messages, i: int, j: int) -> Array:
    return network.near[i][j] - messages[j, i][:, None] - messages[i, j][None, :]


def _bound(network: Network, messages: Messages) -> float:
    total = network.constant
    for i, row in network.near.items():
        total += float(_belief(network, i, messages).min())
        total += sum(float(_moved(network, messages, i, j).min()) for j in row if i < j)
    return total


def _absorb(network: Network, messages: Messages) -> None:
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
