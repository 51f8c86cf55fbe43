"""Cost tables between a value's producer and its readers, computed once for equal values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import NamedTuple

import numpy as np

from ..costmodel.cluster import Cluster
from ..costmodel.collectives import collective_cost
from ..ir.types import B, Mesh, TensorType, local_bytes
from .place_hub import Hub, make_hub
from .place_network import FORBIDDEN, Array, Index
from .place_states import State
from .reshard import Placements, StepCost, reshard_table_us


class End(NamedTuple):
    """A variable (or -1: fixed) and the placement that each of its states gives or asks for."""

    variable: int
    options: tuple[Placements, ...]


@dataclass
class Edge:
    """The reshards of a value.

    Attributes:
        table: (source, target): us of the cheapest reshard, `FORBIDDEN` where there is none.
        sources: distinct placements that the producer may give.
        targets: distinct placements that a reader may need.
        held: the number of the source, for each state of the producer.
        wishes: for each reader the number of the target, for each of its states.
        hub: None for a value with one reader that never keeps a copy.
    """

    table: Array
    sources: tuple[Placements, ...]
    targets: tuple[Placements, ...]
    held: Index
    wishes: tuple[Index, ...]
    hub: Hub | None
    _made: dict[object, Array] = field(default_factory=dict)

    def direct(self, weight: float) -> Array:
        """(producer's state, the only reader's state): us."""
        return self._once(("direct", weight), lambda: self.table[
            np.ix_(self.held, self.wishes[0])] * weight)  # fmt: skip

    def copies(self, weight: float) -> Array:
        """Us of the shared copies of each state of the hub."""
        hub = self._hub()
        return self._once(("copies", weight), lambda: hub.copy_costs(self.table) * weight)

    def agreement(self) -> Array:
        """(hub's state, producer's state): forbidden where the placements differ."""
        hub = self._hub()
        return self._once("agreement", lambda: hub.agreement(self.held))

    def reader(self, number: int, weight: float) -> Array:
        """(hub's state, reader's state): us of its own reshard."""
        hub, wish = self._hub(), self.wishes[number]
        return self._once(("reader", wish.tobytes(), weight), lambda: np.minimum(
            hub.reader_costs(self.table)[:, wish] * weight, FORBIDDEN))  # fmt: skip

    def copy_bytes(self, type: TensorType, mesh: Mesh) -> Array:
        """Bytes per rank of the shared copies of each state of the hub."""
        hub = self._hub()
        sizes = [local_bytes(type.placed(p), mesh) for p in self.targets]
        return self._once("bytes", lambda: hub.copy_bytes(np.array(sizes, dtype=np.float64)))

    def _hub(self) -> Hub:
        assert self.hub is not None, "a value with one reader has no hub"
        return self.hub

    def _once(self, key: object, make: Callable[[], Array]) -> Array:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


class Edges:
    """All edges of a module on a mesh."""

    def __init__(self, mesh: Mesh, cluster: Cluster) -> None:
        self.mesh, self.cost = mesh, collective_cost(cluster, mesh)
        self._same: dict[tuple[Placements, ...], tuple[Placements, ...]] = {}
        self.whole = self.same(((B,) * len(mesh.axes),))
        self._columns: dict[tuple[int, str, int], tuple[Placements, ...]] = {}
        self._alive: list[tuple[State, ...]] = []  # identities in `_columns` stay
        self._edges: dict[object, Edge] = {}

    def same(self, placements: Sequence[Placements]) -> tuple[Placements, ...]:
        """One object for equal placements."""
        found = tuple(placements)
        return self._same.setdefault(found, found)

    def column(self, states: tuple[State, ...], side: str, index: int) -> tuple[Placements, ...]:
        """The placements of an operand or result in all states of an op."""
        key = (id(states), side, index)
        if key not in self._columns:
            self._alive.append(states)
            self._columns[key] = self.same([getattr(state, side)[index] for state in states])
        return self._columns[key]

    def edge(
        self,
        type: TensorType,
        options: tuple[Placements, ...],
        needs: Sequence[tuple[Placements, ...]],
        again: float = 1.0,
        cost: StepCost | None = None,
    ) -> Edge:
        """The reshards from what a producer gives to what each reader needs.

        Args:
            options, needs: objects of `same` or `column`.
            again: how often a reader's own reshard runs for each time that a copy is made.
            cost: of collectives, where it is not the usual one.
        """
        cost = cost or self.cost
        key = (type.dtype, type.shape, id(options), *map(id, needs), again, cost)
        if key not in self._edges:
            self._edges[key] = self._new(type, options, needs, again, cost)
        return self._edges[key]

    def _new(
        self,
        type: TensorType,
        options: tuple[Placements, ...],
        needs: Sequence[tuple[Placements, ...]],
        again: float,
        cost: StepCost,
    ) -> Edge:
        sources = tuple(dict.fromkeys(options))
        targets = tuple(dict.fromkeys(p for need in needs for p in need))
        table = reshard_table_us(type, self.mesh, sources, targets, cost)
        table = np.where(table == inf, FORBIDDEN, table)
        row = {placement: i for i, placement in enumerate(sources)}
        column = {placement: j for j, placement in enumerate(targets)}
        held = np.array([row[p] for p in options])
        wishes = tuple(np.array([column[p] for p in need]) for need in needs)
        hub = None
        if len(needs) > 1 or again > 1:
            same = np.array([[source == target for target in targets] for source in sources])
            hub = make_hub(same, table, [wish.tolist() for wish in wishes], again)
        return Edge(table, sources, targets, held, wishes, hub)
