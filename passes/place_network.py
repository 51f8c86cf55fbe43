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

Equal parts of a network, such as the layers of a deep model, hold the same arrays and tables, by
identity, and every step is computed once for all of them (`Memo`). So that equal parts stay equal
in whatever order their costs are added, `rounded` makes all costs multiples of one power of two
that is small enough for every sum to be exact.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Index = NDArray[np.intp]
Result = TypeVar("Result")

#: cost of what is forbidden; finite, so that differences stay defined. Real costs are far below:
#: 1e12 us are eleven days
FORBIDDEN = 1e12
#: a variable between two neighbours is eliminated if the new table has at most so many entries, or
#: is not larger than `_GROWTH` times the two that it replaces: large tables slow all that follows
_SMALL_TABLE = 4096
_GROWTH = 1.0
#: states tried as replacement of the others in one sweep of dead-end elimination
WITNESSES = 32
#: results of this many bytes are remembered before a memo starts anew
_MEMO_BYTES = 256e6


class Table:
    """Costs (own state, other state) of an edge as one of its ends sees them; never changed.

    Attributes:
        array: the costs.
        flip: the same edge as the other end sees it.
        number: in the order of creation, so that it orders tables alike in every run.
    """

    __slots__ = ("_high", "_low", "array", "flip", "number")
    _numbers = count()

    def __init__(self, array: Array, flip: Table | None = None) -> None:
        self.array, self.number = array, next(Table._numbers)
        self._low: Array | None = None
        self._high: Array | None = None
        self.flip: Table = flip if flip is not None else Table(array.T, self)

    @property
    def low(self) -> Array:
        """Least cost of each own state."""
        if self._low is None:
            self._low = self.array.min(axis=1, initial=4 * FORBIDDEN)
        return self._low

    @property
    def high(self) -> Array:
        """Greatest cost of each own state."""
        if self._high is None:
            self._high = self.array.max(axis=1, initial=-4 * FORBIDDEN)
        return self._high

    @property
    def least(self) -> float:
        """Least cost of all."""
        return float(self.low.min(initial=4 * FORBIDDEN))


class Memo:
    """Results of functions of arrays and tables, by the identity of their arguments."""

    def __init__(self) -> None:
        self._table: dict[Hashable, tuple[Any, Any]] = {}
        self._bytes = 0.0

    def call(self, name: Hashable, function: Callable[..., Result], *given: Any) -> Result:
        """`function(*given)`, computed once for the same objects under the same name."""
        key = (name, *map(id, given))
        known = self._table.get(key)
        if known is not None:
            result: Result = known[0]
            return result
        result = self.same(function(*given))
        if self._bytes > _MEMO_BYTES:
            self._table.clear()
            self._bytes = 0.0
        self._table[key] = result, given  # what is given stays alive, so that no identity is reused
        return result

    def same(self, result: Any) -> Any:
        """The object that stands for all with the content of an array or table."""
        array = result.array if isinstance(result, Table) else result
        key = ("content", array.dtype.char, array.shape, array.tobytes(), isinstance(result, Table))
        known = self._table.get(key)
        if known is not None:
            return known[0]
        self._table[key] = result, None
        self._bytes += 2 * array.nbytes
        if isinstance(result, Table):
            other = result.flip.array
            flipped = ("content", other.dtype.char, other.shape, other.tobytes(), True)
            self._table.setdefault(flipped, (result.flip, None))
            self._bytes += 2 * array.nbytes
        return result

    def rows(self, chosen: NDArray[np.bool_] | Index) -> Index:
        """The same object for equal sets of rows."""
        rows = np.flatnonzero(chosen) if chosen.dtype == np.bool_ else np.asarray(chosen)
        key = ("rows", rows.tobytes())
        known = self._table.setdefault(key, (rows, None))
        found: Index = known[0]
        return found


@dataclass(frozen=True)
class Removed:
    """An eliminated variable: its state is the argmin, given the states of its neighbours."""

    variable: int
    states: Index
    unary: Array
    neighbours: tuple[tuple[int, Index, Table], ...]  #: (variable, its states, costs (own, its))


@dataclass
class Network:
    """A cost network under reduction. Arrays are never changed in place, so clones share them.

    Attributes:
        unary: variable -> costs of its states.
        near: variable -> neighbour -> costs (own state, neighbour's state); kept symmetric.
        states: variable -> original numbers of its states, ascending.
        constant: cost that no choice changes.
        removed: eliminated variables, in order.
        memo: what was computed for this network and its clones.
        quantum: all costs are multiples of it; 0 where that is not known.
        blocks: variable that was grafted -> number of the graft, and what was grafted.
        units: variable -> the blocks that it belongs to (`place_classes`); None until asked for.
    """

    unary: dict[int, Array] = field(default_factory=dict)
    near: dict[int, dict[int, Table]] = field(default_factory=dict)
    states: dict[int, Index] = field(default_factory=dict)
    constant: float = 0.0
    removed: list[Removed] = field(default_factory=list)
    memo: Memo = field(default_factory=Memo)
    quantum: float = 0.0
    blocks: dict[int, tuple[int, Network]] = field(default_factory=dict)
    units: Mapping[int, int] | None = None

    def add_variable(self, costs: Sequence[float] | Array) -> int:
        """A new variable with a cost for each of its states; returns its number."""
        number = len(self.unary) + len(self.removed)
        given = np.asarray(costs, dtype=np.float64)
        self.unary[number] = self.memo.call("capped", _capped, given)
        self.near[number] = {}
        self.states[number] = self.memo.rows(np.arange(len(given)))
        return number

    def add_unary(self, variable: int, costs: Array) -> None:
        """Add to the costs of a variable's states."""
        self.unary[variable] = self.memo.call("sum", _sum, self.unary[variable], costs)

    def add_cost(self, left: int, right: int, costs: Array | Table) -> None:
        """Add a cost table (left state, right state); for one variable twice, its diagonal."""
        if left == right:
            array = costs.array if isinstance(costs, Table) else costs
            self.add_unary(left, self.memo.call("diagonal", _diagonal, array))
            return
        table = costs if isinstance(costs, Table) else self.memo.call("table", _table, costs)
        known = self.near[left].get(right)
        if known is not None:
            table = self.memo.call("both", _both, known, table)
        self.near[left][right] = table
        self.near[right][left] = table.flip

    def graft(self, other: Network) -> dict[int, int]:
        """Add the variables of another network; returns their numbers here.

        Costs are shared, and states keep their original numbers there.
        """
        first = len(self.unary) + len(self.removed)
        numbers = {v: first + n for n, v in enumerate(other.unary)}
        for v, new in numbers.items():
            self.unary[new], self.states[new] = other.unary[v], other.states[v]
            self.near[new] = {numbers[u]: table for u, table in other.near[v].items()}
            self.blocks[new] = first, other
        self.constant += other.constant
        return numbers

    def clone(self) -> Network:
        """An independent copy."""
        return Network(
            dict(self.unary),
            {i: dict(row) for i, row in self.near.items()},
            dict(self.states),
            self.constant,
            list(self.removed),
            self.memo,
            self.quantum,
            self.blocks,
            self.units,
        )

    def rounded(self) -> Network:
        """The same network with costs that are multiples of a power of two.

        The largest sum of costs is below 2^50 of them, so sums are exact, and the cost of an
        assignment changes by less than 2^-50 of that sum for each term.
        """
        most = 1.0
        seen: dict[int, float] = {}
        for part in self._parts():
            if id(part) not in seen:
                array = part.array if isinstance(part, Table) else part
                finite = array[array < FORBIDDEN / 2]
                seen[id(part)] = float(np.abs(finite).max(initial=0.0))
            most += seen[id(part)]
        quantum = 2.0 ** (np.ceil(np.log2(most)) - 50)
        out = Network(
            states=dict(self.states), removed=list(self.removed), quantum=quantum,
            blocks=self.blocks, units=self.units,
        )  # fmt: skip
        out.constant = round(self.constant / quantum) * quantum
        step = np.full(1, quantum)
        for i, costs in self.unary.items():
            out.unary[i] = out.memo.call("round", _round, costs, step)
            out.near[i] = {}
        for i, row in self.near.items():
            for j, table in row.items():
                if i < j:
                    exact = out.memo.call("round", _round_table, table, step)
                    out.near[i][j], out.near[j][i] = exact, exact.flip
        return out

    def _parts(self) -> Iterator[Array | Table]:
        yield from self.unary.values()
        for i, row in self.near.items():
            yield from (table for j, table in row.items() if i < j)

    def keep(self, variable: int, chosen: NDArray[np.bool_] | Index) -> None:
        """Keep only some states of a variable."""
        call, rows = self.memo.call, self.memo.rows(chosen)
        self.unary[variable] = call("take", _take, self.unary[variable], rows)
        self.states[variable] = call("take", _take, self.states[variable], rows)
        for other, table in self.near[variable].items():
            cut = call("cut", _cut, table, rows)
            self.near[variable][other] = cut
            self.near[other][variable] = cut.flip

    def cost(self, assignment: dict[int, int]) -> float:
        """Cost of an assignment of positions (not original state numbers) to all variables."""
        total = self.constant
        for i, costs in self.unary.items():
            own = assignment[i]
            total += float(costs[own])
            for j, table in self.near[i].items():
                if i < j:
                    total += float(table.array[own, assignment[j]])
        return total

    def feasible(self) -> bool:
        """Whether every variable still has a state, at a real cost."""
        return self.constant < FORBIDDEN / 2 and all(len(s) for s in self.states.values())

    def complete(self, assignment: dict[int, int]) -> dict[int, int]:
        """Original state numbers of all variables, given those of the variables still there."""
        full = dict(assignment)
        known: dict[Hashable, int] = {}
        for step in reversed(self.removed):
            beside = [full[other] for other, _, _ in step.neighbours]
            key = (id(step.unary), id(step.states), *beside,
                   *((id(s), id(t)) for _, s, t in step.neighbours))  # fmt: skip
            state = known.get(key)
            if state is None:
                costs = step.unary
                for (_, states, table), own in zip(step.neighbours, beside, strict=True):
                    costs = costs + table.array[:, int(np.searchsorted(states, own))]
                state = known[key] = int(step.states[int(np.argmin(costs))])
            full[step.variable] = state
        return full

    def eliminate(self, variable: int) -> None:
        """Minimise out a variable with at most two neighbours."""
        neighbours = list(self.near.pop(variable).items())
        unary = self.unary.pop(variable)
        states = self.states.pop(variable)
        self.removed.append(
            Removed(variable, states, unary, tuple((j, self.states[j], t) for j, t in neighbours))
        )
        for j, _ in neighbours:
            del self.near[j][variable]
        if not neighbours:
            self.constant += float(unary.min())
        elif len(neighbours) == 1:
            ((j, table),) = neighbours
            self.add_unary(j, self.memo.call("out", _out, unary, table))
        else:
            (j, left), (k, right) = neighbours
            self.add_cost(j, k, self.memo.call("join", _join, unary, left, right))


def _capped(costs: Array) -> Array:
    return np.minimum(costs, FORBIDDEN)


def _round(costs: Array, step: Array) -> Array:
    return np.asarray(np.minimum(np.round(costs / step) * step, FORBIDDEN), dtype=np.float64)


def _round_table(table: Table, step: Array) -> Table:
    return Table(_round(table.array, step))


def _sum(left: Array, right: Array) -> Array:
    return np.minimum(left + right, FORBIDDEN)


def _diagonal(costs: Array) -> Array:
    return np.ascontiguousarray(np.diagonal(costs))


def _table(costs: Array) -> Table:
    return Table(np.minimum(costs, FORBIDDEN))


def _both(left: Table, right: Table) -> Table:
    return Table(np.minimum(left.array + right.array, FORBIDDEN))


def _take(values: Any, rows: Index) -> Any:
    return values[rows]


def _cut(table: Table, rows: Index) -> Table:
    return Table(np.ascontiguousarray(table.array[rows]))


def _out(unary: Array, table: Table) -> Array:
    """The least cost of a variable, for each state of its only neighbour."""
    return np.asarray((unary[:, None] + table.array).min(axis=0), dtype=np.float64)


def _join(unary: Array, left: Table, right: Table) -> Table:
    """The least cost of a variable, for each pair of states of its two neighbours."""
    first, second = unary[:, None] + left.array, right.array
    best = np.full((first.shape[1], second.shape[1]), 4 * FORBIDDEN)
    for row_left, row_right in zip(first, second, strict=True):
        np.minimum(best, row_left[:, None] + row_right[None, :], out=best)
    return Table(np.minimum(best, FORBIDDEN))


def reduce(
    network: Network, witnesses: int = WITNESSES, kept: frozenset[int] | set[int] = frozenset()
) -> None:
    """Apply all reductions in place until none applies; without witnesses, only the cheap ones.

    Args:
        kept: variables that have costs outside of this network: they stay, and lose only states
            that are infeasible here.
    """
    queue, waiting = deque(network.unary), set(network.unary)

    def look_again(variables: Sequence[int]) -> None:
        for other in variables:
            if other not in waiting:
                waiting.add(other)
                queue.append(other)

    survivors: dict[Hashable, Index | None] = {}
    alive: list[Any] = []  # keys are identities: what they stand for stays
    while queue:
        variable = queue.popleft()
        waiting.discard(variable)
        if variable not in network.unary:
            continue
        near = network.near[variable]
        others, unary = list(near), network.unary[variable]
        fixed = variable in kept
        key = (fixed, id(unary), *sorted(map(id, near.values())))
        if key not in survivors:
            tables = list(near.values())
            alive.append((unary, tables))
            survivors[key] = _survivors(unary, tables, 0 if fixed else witnesses, not fixed)
        rows = survivors[key]
        if rows is not None:
            network.keep(variable, rows)
            look_again(others)
        left = len(network.states[variable])
        if not left:
            network.constant = FORBIDDEN
            return
        if fixed:
            continue
        if len(others) <= 1 or (len(others) == 2 and _worthwhile(network, variable)):
            network.eliminate(variable)
            look_again(others)
        elif left == 1:
            _fix(network, variable)
            look_again(others)


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
        network.add_unary(j, network.memo.call("only", _only, table))


def _only(table: Table) -> Array:
    row: Array = table.array[0]
    return row


def _survivors(
    unary: Array, tables: Sequence[Table], witnesses: int, dominance: bool
) -> Index | None:
    """The states that are neither infeasible nor dominated; None where all stay."""
    bad = unary >= FORBIDDEN / 2
    for table in tables:
        if table.array.shape[1]:
            bad = bad | (table.low >= FORBIDDEN / 2)
    rows = np.flatnonzero(~bad)
    arrays = [table.array for table in tables]
    low, high = [table.low for table in tables], [table.high for table in tables]
    if len(rows) < len(unary):
        arrays = [array[rows] for array in arrays]
        low, high = [values[rows] for values in low], [values[rows] for values in high]
        unary = unary[rows]
    if dominance and len(rows) > 1:
        alive = _undominated(unary, arrays, unary + sum(low), unary + sum(high), witnesses)
        rows = rows[alive]
    return rows if len(rows) < len(bad) else None


def _undominated(
    unary: Array, tables: Sequence[Array], promise: Array, worst: Array, witnesses: int
) -> NDArray[np.bool_]:
    alive: NDArray[np.bool_] = promise <= worst.min()  # the cheap test first: its worst case beats their best
    for witness in np.argsort(worst, kind="stable")[:witnesses]:
        if not alive[witness]:
            continue
        rows = np.flatnonzero(alive)
        if len(rows) == 1:
            break
        gain = unary[rows] - unary[witness]
        for table in tables:
            mine, its = table[rows], table[witness]
            # a neighbour's state that neither may stand beside does not matter
            both = (mine >= FORBIDDEN / 2) & (its >= FORBIDDEN / 2)
            gain += np.where(both, np.inf, mine - its).min(axis=1, initial=np.inf)
        dead = gain >= 0
        dead[rows == witness] = False
        alive[rows[dead]] = False
    return alive
