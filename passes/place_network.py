"""Cost networks: discrete variables with unary and pairwise costs, and exact reductions of them.

    minimise   constant + sum_i u_i(x_i) + sum_(i,j) e_ij(x_i, x_j)

Reductions keep the minimum and remember how to undo themselves:
    infeasible states    are dropped (arc consistency);
    dominated states     dead-end elimination: drop a if some b is never worse, whatever the
                         neighbours do: u(a) - u(b) + sum_j min_t (e(a,t) - e(b,t)) >= 0
                         (Goldstein, 1994);
    few neighbours       a variable with at most 2 neighbours is minimised out, its cost becomes a
                         cost of the neighbours (Bertele and Brioschi, Nonserial dynamic
                         programming, 1972).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Index = NDArray[np.intp]

#: cost of what is forbidden; finite, so that differences stay defined. Real costs are far below:
#: 1e12 us are eleven days
FORBIDDEN = 1e12
#: a variable between two neighbours is eliminated if the new table has at most so many entries, or
#: is not larger than `_GROWTH` times the two that it replaces: large tables slow all that follows
_SMALL_TABLE = 4096
_GROWTH = 1.0
#: states tried as replacement of the others in one sweep of dead-end elimination
WITNESSES = 32


@dataclass(frozen=True)
class Removed:
    """An eliminated variable: its state is the argmin, given the states of its neighbours."""

    variable: int
    states: Index
    unary: Array
    neighbours: tuple[tuple[int, Index, Array], ...]  #: (variable, its states, costs (own, its))


@dataclass
class Network:
    """A cost network under reduction. Arrays are never changed in place, so clones share them.

    Attributes:
        unary: variable -> costs of its states.
        near: variable -> neighbour -> costs (own state, neighbour's state); kept symmetric.
        states: variable -> original numbers of its states, ascending.
        constant: cost that no choice changes.
        removed: eliminated variables, in order.
    """

    unary: dict[int, Array] = field(default_factory=dict)
    near: dict[int, dict[int, Array]] = field(default_factory=dict)
    states: dict[int, Index] = field(default_factory=dict)
    constant: float = 0.0
    removed: list[Removed] = field(default_factory=list)

    def add_variable(self, costs: Iterable[float]) -> int:
        """A new variable with a cost for each of its states; returns its number."""
        number = len(self.unary) + len(self.removed)
        values = np.minimum(np.asarray(list(costs), dtype=np.float64), FORBIDDEN)
        self.unary[number] = values
        self.near[number] = {}
        self.states[number] = np.arange(len(values))
        return number

    def add_unary(self, variable: int, costs: Array) -> None:
        """Add to the costs of a variable's states."""
        self.unary[variable] = np.minimum(self.unary[variable] + costs, FORBIDDEN)

    def add_cost(self, left: int, right: int, costs: Array) -> None:
        """Add a cost table (left state, right state); for one variable twice, its diagonal."""
        if left == right:
            self.add_unary(left, np.diagonal(costs))
            return
        known = self.near[left].get(right)
        table = np.minimum(costs if known is None else known + costs, FORBIDDEN)
        self.near[left][right] = table
        self.near[right][left] = table.T

    def clone(self) -> Network:
        """An independent copy."""
        return Network(
            dict(self.unary),
            {i: dict(row) for i, row in self.near.items()},
            dict(self.states),
            self.constant,
            list(self.removed),
        )

    def keep(self, variable: int, chosen: NDArray[np.bool_] | Index) -> None:
        """Keep only some states of a variable."""
        self.unary[variable] = self.unary[variable][chosen]
        self.states[variable] = self.states[variable][chosen]
        for other, table in self.near[variable].items():
            cut = table[chosen]
            self.near[variable][other] = cut
            self.near[other][variable] = cut.T

    def cost(self, assignment: dict[int, int]) -> float:
        """Cost of an assignment of positions (not original state numbers) to all variables."""
        total = self.constant
        for i, costs in self.unary.items():
            total += float(costs[assignment[i]])
            for j, table in self.near[i].items():
                if i < j:
                    total += float(table[assignment[i], assignment[j]])
        return total

    def feasible(self) -> bool:
        """Whether every variable still has a state, at a real cost."""
        return self.constant < FORBIDDEN / 2 and all(len(s) for s in self.states.values())

    def complete(self, assignment: dict[int, int]) -> dict[int, int]:
        """Original state numbers of all variables, given those of the variables still there."""
        full = dict(assignment)
        for step in reversed(self.removed):
            costs = step.unary
            for other, states, table in step.neighbours:
                costs = costs + table[:, int(np.searchsorted(states, full[other]))]
            full[step.variable] = int(step.states[int(np.argmin(costs))])
        return full

    def eliminate(self, variable: int) -> None:
        """Minimise out a variable with at most two neighbours."""
        neighbours = list(self.near[variable].items())
        unary = self.unary.pop(variable)
        states = self.states.pop(variable)
        self.removed.append(
            Removed(variable, states, unary, tuple((j, self.states[j], t) for j, t in neighbours))
        )
        del self.near[variable]
        for j, _ in neighbours:
            del self.near[j][variable]
        if not neighbours:
            self.constant += float(unary.min())
        elif len(neighbours) == 1:
            ((j, table),) = neighbours
            self.add_unary(j, (unary[:, None] + table).min(axis=0))
        else:
            (j, left), (k, right) = neighbours
            left = unary[:, None] + left
            best = np.full((left.shape[1], right.shape[1]), 4 * FORBIDDEN)
            for row_left, row_right in zip(left, right, strict=True):
                np.minimum(best, row_left[:, None] + row_right[None, :], out=best)
            self.add_cost(j, k, best)


def reduce(network: Network, witnesses: int = WITNESSES) -> None:
    """Apply all reductions in place until none applies; without witnesses, only the cheap ones."""
    pending = dict.fromkeys(network.unary)
    while pending:
        variable = next(iter(pending))
        del pending[variable]
        if variable not in network.unary:
            continue
        others = list(network.near[variable])
        changed = _drop_infeasible(network, variable)
        if changed | _drop_dominated(network, variable, witnesses):
            pending.update(dict.fromkeys(others))
        if not len(network.states[variable]):
            network.constant = FORBIDDEN
            return
        if len(others) <= 1 or (len(others) == 2 and _worthwhile(network, variable)):
            network.eliminate(variable)
            pending.update(dict.fromkeys(others))
        elif len(network.states[variable]) == 1:
            _fix(network, variable)
            pending.update(dict.fromkeys(others))


def _worthwhile(network: Network, variable: int) -> bool:
    """Whether joining the two neighbours of a variable keeps tables small."""
    left, right = (len(network.unary[j]) for j in network.near[variable])
    old = len(network.unary[variable]) * (left + right)
    return left * right <= max(_SMALL_TABLE, _GROWTH * old)


def _fix(network: Network, variable: int) -> None:
    """Remove a variable with a single state: its costs become costs of its neighbours."""
    unary, neighbours = network.unary.pop(variable), network.near.pop(variable)
    network.removed.append(Removed(variable, network.states.pop(variable), unary, ()))
    network.constant += float(unary[0])
    for j, table in neighbours.items():
        del network.near[j][variable]
        network.add_unary(j, table[0])


def _drop_infeasible(network: Network, variable: int) -> bool:
    bad = network.unary[variable] >= FORBIDDEN / 2
    for table in network.near[variable].values():
        if table.shape[1]:
            bad |= table.min(axis=1) >= FORBIDDEN / 2
    if bad.any():
        network.keep(variable, ~bad)
        return True
    return False


def _drop_dominated(network: Network, variable: int, witnesses: int) -> bool:
    unary, tables = network.unary[variable], list(network.near[variable].values())
    count = len(unary)
    if count < 2:
        return False
    promise = unary + sum(table.min(axis=1) for table in tables)
    worst = unary + sum(table.max(axis=1) for table in tables)
    alive = promise <= worst.min()  # the cheap test first: its worst case beats their best
    for witness in np.argsort(worst, kind="stable")[:witnesses]:
        if not alive[witness]:
            continue
        rows = np.flatnonzero(alive)
        if len(rows) == 1:
            break
        gain = unary[rows] - unary[witness]
        for table in tables:
            difference = table[rows] - table[witness]
            # a neighbour's state that neither may stand beside does not matter
            both = (table[rows] >= FORBIDDEN / 2) & (table[witness] >= FORBIDDEN / 2)
            gain += np.where(both, np.inf, difference).min(axis=1, initial=np.inf)
        dead = gain >= 0
        dead[rows == witness] = False
        alive[rows[dead]] = False
    if alive.all():
        return False
    network.keep(variable, alive)
    return True
