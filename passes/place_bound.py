"""Lower bounds for cost networks: sequential reweighted message passing, once per class of equals.

Messages move cost between pairwise and unary terms without changing any total; the sum of all
minima is a lower bound. A variable first pulls what its pairwise terms guarantee each of its
states, then pushes its cost on to the terms ahead in the order, in equal shares; neither step ever
lowers the bound (Kolmogorov, A new look at reweighted message passing, 2015; TRW-S, 2006). Deciding
the variables one by one against the moved costs gives good assignments. Reduced costs then exclude
states: one whose own bound exceeds the cost of a known assignment is in no better assignment.

Lifting: variables that look alike form a class with the same messages (`place_classes`), so that the
equal layers of a deep model cost as much as one. Any messages give a valid bound; the layers at the
ends of a stack stay apart, which is where the best messages differ. Edges of one variable that are
alike share a message as well: what it gives to one of them it gives to each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .place_classes import Colours, classes, ports
from .place_network import FORBIDDEN, Array, Network, Table

#: the bound is looked at every so many sweeps; a smaller relative gain than this ends them
_EVERY, _GAIN = 5, 1e-4
#: in networks of so few variables each is its own class
SINGLE = 1000


@dataclass(frozen=True)
class _Port:
    """An edge as all variables of a class have it.

    Attributes:
        table: costs (own state, other state).
        count: edges of each variable of the class that are alike.
        other: class and port that most of the edges lead to.
        across: the costs with the longer side last, in which numpy takes minima fastest.
    """

    table: Table
    count: int
    other: tuple[int, int]
    across: Array

    def pull(self, message: Array) -> Array:
        """The least cost of each own state, after the far end's message."""
        if self.across.shape == self.table.array.shape:
            return np.asarray(np.minimum.reduce(self.across - message, axis=1))
        return np.asarray(np.minimum.reduce(self.across - message[:, None], axis=0))


class _Lifted:
    """Classes of the variables of a network, and the messages of each port."""

    def __init__(self, network: Network, radius: int) -> None:
        self.network = network
        self.colour, before = _classes(network, radius)
        self.members = Counter(self.colour.values())
        self.port_of: dict[tuple[int, int], int] = {}  #: (variable, neighbour) -> port
        self.first: dict[int, int] = {}
        rows: dict[int, dict[tuple[int, int], tuple[int, Table, int]]] = {}
        for (v, u), key in ports(network, self.colour, before).items():
            c = self.colour[v]
            if self.first.setdefault(c, v) == v:
                row = rows.setdefault(c, {})
                p, _, count = row.get(key, (len(row), None, 0))
                row[key] = p, network.near[v][u], count + 1
            self.port_of[v, u] = rows[c][key][0]
        for v, c in self.colour.items():  # those without a neighbour
            self.first.setdefault(c, v)
        #: (class, port, class, port) -> number of edges; each edge is seen from both of its ends
        self.edges: Counter[tuple[int, int, int, int]] = Counter(
            (self.colour[v], p, self.colour[u], self.port_of[u, v])
            for (v, u), p in self.port_of.items()
        )
        ends = Counter((self.colour[v], p) for (v, _), p in self.port_of.items())
        if any(ends[c, p] != count * self.members[c]
               for c, row in rows.items() for p, _, count in row.values()):  # fmt: skip
            raise AssertionError("variables of one class differ in their edges")
        leading: dict[tuple[int, int], tuple[int, tuple[int, int]]] = {}
        for (c, p, d, q), count in self.edges.items():
            if count > leading.get((c, p), (0, (0, 0)))[0]:
                leading[c, p] = count, (d, q)
        self.ports = {
            c: [_Port(table, count, leading[c, p][1], _across(table.array))
                for p, table, count in rows.get(c, {}).values()]
            for c in self.first
        }  # fmt: skip
        #: ports that most edges of the port which they lead to do not lead back to
        self.minor = {
            (c, p) for c, row in self.ports.items() for p, port in enumerate(row)
            if leading[port.other][1] != (c, p)
        }  # fmt: skip
        self.unary = {c: network.unary[v] for c, v in self.first.items()}
        self.messages = {
            (c, p): np.zeros(len(self.unary[c]))
            for c, row in self.ports.items()
            for p in range(len(row))
        }
        self.swept = False
        self.order = self._order()
        self.rank = {c: n for n, c in enumerate(self.order)}

    def _order(self) -> list[int]:
        """Breadth first from the class with the most neighbours, so that chains stay chains."""
        left = dict.fromkeys(sorted(self.ports, key=lambda c: -len(self.ports[c])))
        order: list[int] = []
        while left:
            queue = [next(iter(left))]
            del left[queue[0]]
            for c in queue:
                for port in self.ports[c]:
                    if port.other[0] in left:
                        del left[port.other[0]]
                        queue.append(port.other[0])
            order += queue
        return order

    def belief(self, c: int) -> Array:
        """The costs of a class's states after the messages."""
        total = self.unary[c]
        for p, port in enumerate(self.ports[c]):
            message = self.messages[c, p]
            total = total + (message if port.count == 1 else port.count * message)
        return total

    def moved(self, c: int, p: int, end: tuple[int, int]) -> Array:
        """The costs of an edge after the messages, the far end being a class and port."""
        table = self.ports[c][p].table.array
        return table - self.messages[c, p][:, None] - self.messages[end][None, :]

    def sweep(self, order: list[int], rank: dict[int, int], share: dict[int, float]) -> None:
        """Pull and push once, class by class; sweeps go back and forth."""
        for c in order:
            ahead = []
            for p, port in enumerate(self.ports[c]):
                # what is pushed to a port that pulls from others would be lost
                pushes = rank[port.other[0]] > rank[c] and (c, p) not in self.minor
                if pushes:
                    ahead.append(p)
                # what is ahead has not changed since the last sweep, on its way back, pulled from it
                if not pushes or not self.swept:
                    self.messages[c, p] = port.pull(self.messages[port.other])
            if ahead:
                part = share[c] * self.belief(c)
                for p in ahead:
                    self.messages[c, p] = self.messages[c, p] - part
        self.swept = True

    def shares(self) -> dict[int, float]:
        """The part of its cost that a class pushes on to each edge ahead."""
        out = {}
        for c, row in self.ports.items():
            later = sum(port.count for port in row if self.rank[port.other[0]] > self.rank[c])
            out[c] = 1.0 / max(1, later, sum(port.count for port in row) - later)
        return out

    def settle(self) -> None:
        """Pull once more where the far end has changed since."""
        for c, p in self.minor:
            port = self.ports[c][p]
            self.messages[c, p] = port.pull(self.messages[port.other])

    def bound(self) -> float:
        """The sum of all minima after the messages."""
        self.settle()
        total = self.network.constant
        for c, count in self.members.items():
            total += count * float(self.belief(c).min())
        for (c, p, d, q), count in self.edges.items():
            if (c, p) <= (d, q):  # an edge between two like ports is counted from both ends
                part = 0.5 if (c, p) == (d, q) else 1.0
                total += part * count * float(self.moved(c, p, (d, q)).min())
        return total

    def decode(self) -> dict[int, int]:
        """A state for each class, one after the other against the moved costs, then polished."""
        found: dict[int, int] = {}
        for c in self.order:
            costs = self.belief(c)
            for p, port in enumerate(self.ports[c]):
                far, other = self.messages[port.other], found.get(port.other[0])
                least = port.pull(far) if other is None else port.table.array[:, other] - far[other]
                costs = costs + port.count * (least - self.messages[c, p])
            found[c] = int(np.argmin(costs))
        return self._polish(found)

    def _polish(self, found: dict[int, int]) -> dict[int, int]:
        """Iterated conditional modes: change one class at a time while that helps."""
        for _ in range(8):
            changed = False
            for c in self.order:
                costs = self.unary[c]
                for port in self.ports[c]:
                    if port.other[0] != c:
                        costs = costs + port.count * port.table.array[:, found[port.other[0]]]
                best = int(np.argmin(costs))
                if costs[best] < costs[found[c]] - 1e-9:
                    found[c], changed = best, True
            if not changed:
                break
        return found

    def absorb(self) -> None:
        """Write the messages into the network."""
        network = self.network
        if network.quantum:
            for end, message in self.messages.items():
                self.messages[end] = np.round(message / network.quantum) * network.quantum
        unary = {c: self.belief(c) for c in self.members}
        tables: dict[tuple[int, int, int, int], Table] = {}
        for (v, u), p in self.port_of.items():
            key = (self.colour[v], p, self.colour[u], self.port_of[u, v])
            if key not in tables:
                table = Table(self.moved(key[0], key[1], (key[2], key[3])))
                tables[key] = table
                tables[key[2], key[3], key[0], key[1]] = table.flip
            network.near[v][u] = tables[key]
            if key[:2] == key[2:]:  # like ports: both ends see the table from the same side
                network.near[u][v] = tables[key].flip
        network.unary = {v: unary[c] for v, c in self.colour.items()}


def _classes(network: Network, radius: int) -> tuple[Colours, Colours]:
    """A class for each variable, and the coarser classes of one step less."""
    if len(network.unary) <= SINGLE:
        own = {v: v for v in network.unary}
        return own, own
    return classes(network, radius)


def _across(table: Array) -> Array:
    rows, columns = table.shape
    return np.ascontiguousarray(table if rows <= columns else table.T)


def tighten(network: Network, sweeps: int, radius: int = 3) -> tuple[float, dict[int, int]]:
    """Reparametrise in place; returns (lower bound, assignment of positions decoded on the way).

    Args:
        radius: edges within which variables must look alike to form a class. What was told apart
            once stays apart, so that calls with a radius of 1 refine the classes step by step.
    """
    lifted = _Lifted(network, radius)
    back = {c: -n for c, n in lifted.rank.items()}
    share = lifted.shares()
    best_cost, bound = np.inf, lower_bound(network)
    best: dict[int, int] = {}
    kept = dict(lifted.messages)  # minor ports may make a sweep lower the bound
    last = bound
    for sweep in range(max(1, sweeps)):
        lifted.sweep(lifted.order, lifted.rank, share)
        lifted.sweep(lifted.order[::-1], back, share)
        if sweep % _EVERY == _EVERY - 1 or sweep == sweeps - 1:
            by_class = lifted.decode()
            found = {v: by_class[c] for v, c in lifted.colour.items()}
            cost = network.cost(found)
            if cost < best_cost:
                best_cost, best = cost, found
            after = lifted.bound()
            if after > bound:
                bound, kept = after, dict(lifted.messages)
            if abs(after - last) <= _GAIN * max(1.0, abs(after)):
                break
            last = after
    lifted.messages = kept
    lifted.absorb()
    return lower_bound(network), best


def lower_bound(network: Network) -> float:
    """Constant and the sum of all minima."""
    known: dict[int, float] = {}
    total = network.constant
    for costs in network.unary.values():
        least = known.get(id(costs))
        if least is None:
            least = known[id(costs)] = float(costs.min(initial=4 * FORBIDDEN))
        total += least
    for i, row in network.near.items():
        for j, table in row.items():
            if i < j:
                least = known.get(id(table))
                if least is None:
                    least = known[id(table)] = known[id(table.flip)] = table.least
                total += least
    return total


def exclude(network: Network, upper: float, tolerance: float) -> bool:
    """Drop states whose bound is above `upper`; True when any was dropped."""
    bound, changed = lower_bound(network), False
    slack = upper + tolerance - bound
    known: dict[Hashable, NDArray[np.bool_] | None] = {}
    alive = []  # keys are identities: what they stand for stays
    for i, costs in list(network.unary.items()):
        tables = network.near[i].values()
        key = (id(costs), *sorted(map(id, tables)))
        if key not in known:
            alive.append((costs, list(tables)))
            own = costs - costs.min()
            for table in tables:
                own = own + (table.low - table.least)
            good = own <= slack
            known[key] = None if good.all() else good
        mask = known[key]
        if mask is not None:
            network.keep(i, mask)
            changed = True
            if not mask.any():
                network.constant = FORBIDDEN
                return True
    return changed  # the bound has only risen meanwhile: what was excluded stays excluded
