"""Exact minimum of a cost network: reductions, bounds, elimination, and branching where needed.

    1. reduce (`place_network`), cheaply before the first bounds are known
    2. tighten: lower bound and a first assignment (`place_bound`), exclude states by reduced cost
    3. improve the assignment: exact elimination with only the best few states of each variable
    4. eliminate on a tree decomposition if its tables fit (`place_eliminate`): done
    5. else branch on a variable, cheapest bound first, and solve each part the same way

Every step is exact, so the result is the optimum unless time runs out; then the gap to the lower
bound says how far it can be off. Branch and bound with soft local consistency follows Cooper et
al., Soft arc consistency revisited, 2010.
"""

from __future__ import annotations

import time
from collections.abc import Hashable
from dataclasses import dataclass
from math import inf

import numpy as np

from .place_bound import SINGLE, exclude, lower_bound, tighten
from .place_eliminate import order_of, solve_by_elimination
from .place_network import FORBIDDEN, WITNESSES, Network, reduce

#: largest table of an elimination in entries: 1e7 doubles and as many choices take 120 MB
TABLE_LOG10 = 7.0
#: most additions of an elimination: about 2 s
WORK_LOG10 = 8.7
#: (most sweeps, radius of the classes) of the rounds of tightening: in networks of few variables,
#: and in others, where classes are refined from round to round
_FEW = ((100, 1), (60, 1), (60, 1), (60, 1), (60, 1))
_MANY = ((20, 1), *((10, 1),) * 24)
#: a candidate so close to the bound is not improved on before states have been excluded
_NEAR = 1e-5
#: states are excluded again where so small a part of them is left
_FEWER = 0.95
#: the round after one that gained nothing
_WIDE = (40, 4)
#: passes over all variables that settle an assignment; two or three do
_PASSES = 20
#: a round of many gained nothing if it raised the bound by a smaller part
_STALLED = 1e-3

@dataclass(frozen=True)
class Solution:
    """An assignment and what is known about it.

    Attributes:
        states: state number of each variable.
        cost: its cost.
        lower_bound: no assignment costs less.
        variables: size of the network.
        core_variables: variables left after the first reductions.
        width: of the elimination order that was used, 0 where bounds were enough.
        nodes: branch-and-bound nodes.
        time_s: seconds taken.
    """

    states: dict[int, int]
    cost: float
    lower_bound: float
    variables: int
    core_variables: int
    width: int
    nodes: int
    time_s: float

    @property
    def exact(self) -> bool:
        """Whether the cost is the least up to rounding."""
        return self.cost - self.lower_bound <= 1e-6 * max(1.0, abs(self.cost))


def solve(network: Network, limit_s: float = 30.0, enough: float = 0.0) -> Solution | None:
    """The cheapest assignment, or None where every one is forbidden. The network is not changed.

    Args:
        limit_s: seconds after which the best so far is returned.
        enough: relative gap to the lower bound at which the search may stop, in networks of more
            than `SINGLE` variables; smaller ones are always solved to the end.
    """
    start = time.perf_counter()
    search = _Search(start + limit_s, enough if len(network.unary) > SINGLE else 0.0)
    search.visit(network.rounded())
    if search.best is None:
        return None
    search.bound = min(search.bound, search.upper)
    at = {v: int(np.searchsorted(network.states[v], s)) for v, s in search.best.items()
          if v in network.unary}  # fmt: skip
    settle(network, at)
    cost = network.cost(at)
    states = network.complete({v: int(network.states[v][k]) for v, k in at.items()})
    return Solution(
        states, cost, min(search.bound, cost), len(network.unary), search.core_variables,
        search.width, search.nodes, time.perf_counter() - start,
    )  # fmt: skip


def settle(network: Network, at: dict[int, int]) -> None:
    """Give one variable after the other its best position for those of the others.

    A search that ends early, or at a tolerance, may leave a value with copies that no reader needs,
    or readers with copies of their own of what they could share: a plan is never written like that.
    """
    known: dict[Hashable, int] = {}
    for _ in range(_PASSES):
        changed = False
        for v, costs in network.unary.items():
            near = network.near[v]
            key = (id(costs), at[v], *sorted([(id(table), at[u]) for u, table in near.items()]))
            best = known.get(key)
            if best is None:
                for u, table in near.items():
                    costs = costs + table.array[:, at[u]]
                best = int(np.argmin(costs))
                if costs[best] >= costs[at[v]]:
                    best = at[v]
                known[key] = best
            if best != at[v]:
                at[v], changed = best, True
        if not changed:
            return


class _Search:
    def __init__(self, deadline: float, enough: float) -> None:
        self.deadline, self.enough = deadline, enough
        self.upper, self.best = inf, None  # type: float, dict[int, int] | None
        self.bound = inf  #: least bound of what was not searched to its end
        self.nodes = self.core_variables = self.width = 0

    def offer(self, network: Network, found: dict[int, int]) -> None:
        """A candidate: positions of the variables that are left."""
        cost = network.cost(found)
        if cost < self.upper and cost < FORBIDDEN / 2:
            self.upper = cost
            self.best = network.complete(
                {v: int(network.states[v][position]) for v, position in found.items()}
            )

    def closed(self, network: Network) -> bool:
        """Whether nothing better, or nothing that is enough better, can be in this part."""
        if not network.feasible():
            return True
        bound = lower_bound(network)
        if bound >= self.upper - self.tolerance:
            return True
        if bound >= self.upper - self.enough * abs(self.upper):
            self.bound = min(self.bound, bound)
            return True
        return False

    @property
    def tolerance(self) -> float:
        """Differences below it are rounding."""
        return 1e-9 * max(1.0, abs(self.upper)) if self.upper < inf else 0.0

    def visit(self, network: Network) -> None:
        """Search one part. Changes the network."""
        self.nodes += 1
        reduce(network, WITNESSES if self.nodes > 1 else 0)
        if self.nodes == 1:
            self.core_variables = len(network.unary)
        if not network.feasible():
            return
        if self._solved(network):
            return
        self._squeeze(network)
        if self.closed(network) or self._solved(network):
            return
        if time.perf_counter() > self.deadline:
            self.bound = min(self.bound, lower_bound(network))
            return
        self._branch(network)

    def _solved(self, network: Network) -> bool:
        """Is nothing left, or little enough for elimination? Then the part is done."""
        if not network.unary:
            self.offer(network, {})
            return True
        return self._eliminate(network)

    def _squeeze(self, network: Network) -> None:
        """Bounds, candidates and exclusions until they change nothing."""
        many = len(network.unary) > SINGLE
        idle = 0
        for number, (sweeps, radius) in enumerate(_MANY if many else _FEW):
            if not network.unary:
                return
            wide = _WIDE if many and idle else (sweeps, radius)
            before = lower_bound(network)
            now, found = tighten(network, *wide)
            self.offer(network, found)
            near = self.upper - lower_bound(network) <= _NEAR * abs(self.upper)
            if self.nodes <= 64 and not near and (not many or number % 8 == 7):
                self._restricted(network)
            if self.closed(network):
                return
            excluded = self._exclude(network)
            if not network.feasible():
                return
            idle = idle + 1 if now - before <= _STALLED * abs(now) else 0
            if (idle > 3 if many else not excluded) and number >= 2:
                break
        reduce(network)  # dead-end elimination is the dearest step, so it waits for the last round

    def _exclude(self, network: Network) -> bool:
        """Drop states by their reduced costs as long as many go; was there any?"""
        first = left = sum(map(len, network.states.values()))
        while exclude(network, self.upper, self.tolerance) and network.feasible():
            reduce(network, 0)
            before, left = left, sum(map(len, network.states.values()))
            if left > _FEWER * before:
                break
        return left < first

    def _restricted(self, network: Network) -> None:
        """A better candidate: the optimum over the few most promising states of each variable."""
        for count in (8, 6, 4, 3, 2):
            small = network.clone()
            for v in list(small.unary):
                promise = small.unary[v] + sum(t.low for t in small.near[v].values())
                small.keep(v, np.sort(np.argsort(promise, kind="stable")[:count]))
            reduce(small)
            if not small.feasible():
                continue
            order = order_of(small, TABLE_LOG10)
            if order.table_log10 <= TABLE_LOG10 - 1 and order.work_log10 <= WORK_LOG10 - 1:
                _, found = solve_by_elimination(small, order.vertices)
                self.offer(small, found)
                return

    def _eliminate(self, network: Network) -> bool:
        """Solve this part by elimination if its tables fit."""
        order = order_of(network, TABLE_LOG10)
        if order.table_log10 > TABLE_LOG10 or order.work_log10 > WORK_LOG10:
            return False
        self.width = max(self.width, order.width)
        _, found = solve_by_elimination(network, order.vertices)
        self.offer(network, found)
        return True

    def _branch(self, network: Network) -> None:
        """Split the states of the variable that costs elimination most."""
        v = max(network.unary, key=lambda v: (
            np.log(len(network.unary[v])) * len(network.near[v]), -v))  # fmt: skip
        promise = network.unary[v] + sum(t.low for t in network.near[v].values())
        ranked = np.argsort(promise, kind="stable")
        middle = max(1, len(ranked) // 2)
        for half in (ranked[:middle], ranked[middle:]):
            part = network.clone()
            part.keep(v, np.sort(half))
            if time.perf_counter() > self.deadline:
                self.bound = min(self.bound, lower_bound(part))
            elif not self.closed(part):
                self.visit(part)
