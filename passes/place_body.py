"""The cost network of a function, calls included: what `place_model` is built from.

Each call of a function has variables of its own: the network of the callee is built and reduced
once for each weight and set of constraints, and grafted into the caller's for each call.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from ..costmodel.cluster import Cluster
from ..ir.module import Function, Module, Value
from ..ir.types import FLOATS, Mesh, TensorType, local_bytes
from .apply import ACCUMULATED, LOOP, FunctionChoices, batched
from .constraints import Rule, Selection
from .inline import rebase
from .joined import joins
from .place_edges import Edge, Edges, End
from .place_network import FORBIDDEN, Array, Network, reduce
from .place_states import State, states_of
from .reshard import Placements, legal_placements

#: entry parameters whose bytes stay for the whole run
PERSISTENT = frozenset({"param", "state", "buffer"})

Path = tuple[int, ...]  #: of a call: the indices of the call ops that lead to it from the entry


class Need(NamedTuple):
    """What a reader needs a value as: the op's index (~j for result j of the function), the end."""

    op: int
    end: End


@dataclass(frozen=True)
class Bytes:
    """Bytes per rank of each state of a variable."""

    variable: int
    bytes: Array
    persistent: bool = False


@dataclass(frozen=True)
class Sharing:
    """A value of the entry with several readers: to write down who shares a copy."""

    value: Value
    variable: int
    edge: Edge
    needs: tuple[tuple[Need, ...], ...]  #: of each reader of the edge
    weight: float  #: runs of a reader's own reshard
    shared_weight: float  #: runs of a shared copy's


@dataclass(frozen=True)
class Near:
    """A neighbourhood: what is chosen on all axes but the free ones stays."""

    chosen: Mapping[Path, FunctionChoices]
    free: frozenset[int]


class Session:
    """What the bodies of one module on one mesh have in common."""

    def __init__(
        self, module: Module, mesh: Mesh, cluster: Cluster, selection: Selection, near: Near | None
    ) -> None:
        self.mesh, self.cluster, self.selection, self.near = mesh, cluster, selection, near
        self.joins = joins(module)
        self.edges = Edges(mesh, cluster)
        self.functions = {function.name: function for function in module.functions}
        self.seen: set[Rule] = set()  #: rules that are about something
        self._bodies: dict[object, Body] = {}

    def rules(self, kind: str, path: str, name: str) -> tuple[Rule, ...]:
        """The constraints about an op, its results, or a parameter."""
        if self.selection.empty:
            return ()
        found = self.selection.about(kind, path, name)
        self.seen.update(found)
        return found

    def body(self, name: str, weight: float, path: str, at: Path) -> Body:
        """The body of a callee, one object for calls with the same weight and constraints."""
        function = self.functions[name]
        rules = () if self.selection.empty else self._rules(function, path)
        kept = self._kept(function, at) if self.near else ()
        key = (name, weight, rules, kept)
        if key not in self._bodies:
            body = Body(self, function, [weight] * len(function.ops), path, at)
            outer = {end.variable for end in (*body.params, *body.results)}
            outer |= {row.variable for row in body.memory}  # bytes are priced in the entry
            # what is dominated takes longer to find than it saves: bounds exclude it as well
            reduce(body.network, 0, kept=outer)
            self._bodies[key] = body
        return self._bodies[key]

    def _rules(self, function: Function, path: str) -> tuple[object, ...]:
        old = str(function.attrs.get("path", ""))
        found: list[object] = []
        for op in function.ops:
            own = rebase(op.loc.path, old, path)
            if op.name == "call":
                found.append(self._rules(self.functions[str(op.attrs["callee"])], own))
            else:
                found.append((self.rules("op", own, op.name), self.rules("value", own, op.name)))
        return tuple(found)

    def _kept(self, function: Function, at: Path) -> tuple[object, ...]:
        assert self.near is not None
        inner = tuple(
            self._kept(self.functions[str(op.attrs["callee"])], (*at, index))
            for index, op in enumerate(function.ops)
            if op.name == "call"
        )
        return self.near.chosen.get(at, FunctionChoices()), *inner


class Body:
    """A function's variables.

    Attributes:
        network: the costs.
        params: variable of each parameter; that of an entry's result which updates it as well.
        results: variable of each result.
        ops: variable and states of each op; (-1, ()) for calls.
        calls: op index -> the callee's body and the numbers of its variables here.
        memory: bytes that stay, by variable.
        sharing: values with several readers; of the entry only.
    """

    def __init__(
        self,
        session: Session,
        function: Function,
        weights: Sequence[float],
        path: str,
        at: Path,
        phases: Sequence[str] | None = None,
    ) -> None:
        self.session, self.function, self.weights, self.at = session, function, weights, at
        self.phases = phases
        self.network = Network()
        self.memory: list[Bytes] = []
        self.sharing: list[Sharing] = []
        self.calls: dict[int, tuple[Body, dict[int, int]]] = {}
        self.ops: list[tuple[int, tuple[State, ...]]] = []
        self.entry = not at
        self.path, self.old = path, str(function.attrs.get("path", ""))
        self._interface()
        self._ops()
        self._values()

    def chosen(self, states: Mapping[int, int]) -> FunctionChoices:
        """The choices that belong to the states of this body's variables."""

        def pick(end: End) -> Placements:
            return end.options[states[end.variable] if end.variable >= 0 else 0]

        splits = tuple(
            options[states[variable]].states if variable >= 0 else ()
            for variable, options in self.ops
        )
        return FunctionChoices(splits, tuple(map(pick, self.params)), tuple(map(pick, self.results)))

    def inner(self, index: int, states: Mapping[int, int]) -> dict[int, int]:
        """The states of all variables of a callee, from those of this body's."""
        body, numbers = self.calls[index]
        return body.network.complete({v: states[n] for v, n in numbers.items()})

    def slack_us(self, states: Mapping[int, int]) -> float:
        """What relaxed hubs leave out of the cost, callees not included."""
        total = 0.0
        for share in self.sharing:
            edge = share.edge
            if edge.hub is None or not edge.hub.relaxed:
                continue
            state = states[share.variable]
            row = edge.table[edge.hub.source[state]]
            wanted = [
                int(edge.wishes[n][states[needs[0].end.variable] if needs[0].end.variable >= 0 else 0])
                for n, needs in enumerate(share.needs)
            ]
            there = edge.hub.there[state]
            total += sum(float(row[t]) for t in set(wanted) if not there[t]) * share.shared_weight
            total -= sum(
                float(row[t] / edge.hub.divisor[t]) for t in wanted if not there[t]
            ) * share.weight
        return total

    def _interface(self) -> None:
        function = self.function
        self.params = []
        for index, (value, attrs) in enumerate(
            zip(function.params, function.param_attrs, strict=True)
        ):
            end = self._placed(value.type, not self.entry, "params", index)
            self.params.append(end)
            if self.entry:
                role, name = str(attrs.get("role", "")), str(attrs.get("name", value.name))
                for rule in self.session.rules(role, name, value.name):
                    self._obey(end, rule, len(value.type.shape))
                if role in PERSISTENT:
                    self._remember(end, value.type, persistent=True)
        by_name = {v.name: end for v, end in zip(function.params, self.params, strict=True)}
        self.results = []
        for index, (value, attrs) in enumerate(
            zip(function.results, function.result_attrs, strict=True)
        ):
            if not self.entry:
                end = self._placed(value.type, True, "results", index)
                self._remember(end, value.type)
            elif "updates" in attrs:
                end = by_name[str(attrs["updates"])]
            else:
                end = End(-1, self.session.edges.whole)
            self.results.append(end)

    def _placed(self, type: TensorType, partial: bool, table: str, index: int) -> End:
        """A new variable for a placement."""
        session = self.session
        options = legal_placements(
            type, session.mesh, ("sum",) if partial and type.dtype in FLOATS else ()
        )
        if session.near is not None:
            row = getattr(session.near.chosen.get(self.at, FunctionChoices()), table)
            kept = row[index] if index < len(row) else session.edges.whole[0]
            options = tuple(
                p for p in options
                if all(a == b or k in session.near.free
                       for k, (a, b) in enumerate(zip(p, kept, strict=True)))
            )  # fmt: skip
        same = session.edges.same(options)
        return End(self.network.add_variable(_zeros(len(same))), same)

    def _obey(self, end: End, rule: Rule, rank: int) -> None:
        names = self.session.mesh.names
        bad = [not rule.admits(placement, names, rank) for placement in end.options]
        self.network.add_unary(end.variable, np.where(bad, FORBIDDEN, 0.0))

    def _remember(self, end: End, type: TensorType, *, persistent: bool = False) -> None:
        sizes = [local_bytes(type.placed(p), self.session.mesh) for p in end.options]
        self.memory.append(Bytes(end.variable, np.array(sizes, dtype=np.float64), persistent))

    def _ops(self) -> None:
        session = self.session
        for index, op in enumerate(self.function.ops):
            path = rebase(op.loc.path, self.old, self.path)
            if op.name == "call":
                callee = str(op.attrs["callee"])
                body = session.body(callee, self.weights[index], path, (*self.at, index))
                numbers = self.network.graft(body.network)
                # what the callee's reductions removed is found again from what they kept
                self.calls[index] = body, numbers
                self.memory += [
                    Bytes(numbers[m.variable], m.bytes, m.persistent) for m in body.memory
                ]
                self.ops.append((-1, ()))
                continue
            options = states_of(op, session.mesh, session.cluster, self._fixed(index))
            times = _times(options, self.weights[index])
            variable = self.network.add_variable(times)
            for rule in session.rules("op", path, op.name):
                names = session.mesh.names
                bad = [not rule.admits_states(state.states, names) for state in options]
                self.network.add_unary(variable, np.where(bad, FORBIDDEN, 0.0))
            for rule in session.rules("value", path, op.name):
                for j, value in enumerate(op.results):
                    column = session.edges.column(options, "results", j)
                    self._obey(End(variable, column), rule, len(value.type.shape))
            self.ops.append((variable, options))

    def _fixed(self, index: int) -> tuple[str | None, ...]:
        """The states that an op keeps, None on the free axes."""
        near, axes = self.session.near, range(len(self.session.mesh.axes))
        if near is None:
            return (None,) * len(axes)
        splits = near.chosen.get(self.at, FunctionChoices()).splits
        kept = splits[index] if index < len(splits) and splits[index] else ("",) * len(axes)
        return tuple(None if k in near.free else kept[k] for k in axes)

    def _values(self) -> None:
        """The reshard costs between each value's producer and its readers."""
        readers = self._readers()
        once, many = min(self.weights, default=1.0), max(self.weights, default=1.0)
        for value, end, constant in self._producers():
            needs = readers.get(value.name, [])
            if many == once:
                self._value(value, end, needs, once, once)
                continue
            loop = [need for need in needs if self._in_loop(need)]
            self._value(value, end, loop, many, once if constant else many)
            self._value(value, end, [n for n in needs if not self._in_loop(n)], once, once)

    def _producers(self) -> Iterator[tuple[Value, End, bool]]:
        """Each value, where it comes from, and whether it is the same for all micro-batches."""
        function = self.function
        for value, attrs, end in zip(
            function.params, function.param_attrs, self.params, strict=True
        ):
            yield value, end, not batched(attrs)
        for index, (op, (variable, options)) in enumerate(
            zip(function.ops, self.ops, strict=True)
        ):
            constant = self.phases is not None and self.phases[index] not in LOOP
            for j, value in enumerate(op.results):
                if op.name == "call":
                    body, numbers = self.calls[index]
                    inner = body.results[j]
                    yield value, End(numbers[inner.variable], inner.options), constant
                else:
                    column = self.session.edges.column(options, "results", j)
                    yield value, End(variable, column), constant

    def _readers(self) -> dict[str, list[Need]]:
        out: dict[str, list[Need]] = {}
        for index, (op, (variable, options)) in enumerate(
            zip(self.function.ops, self.ops, strict=True)
        ):
            for k, value in enumerate(op.operands):
                if op.name == "call":
                    body, numbers = self.calls[index]
                    inner = body.params[k]
                    end = End(numbers[inner.variable], inner.options)
                else:
                    end = End(variable, self.session.edges.column(options, "operands", k))
                out.setdefault(value.name, []).append(Need(index, end))
        for j, (value, end) in enumerate(zip(self.function.results, self.results, strict=True)):
            out.setdefault(value.name, []).append(Need(~j, end))
        return out

    def _in_loop(self, need: Need) -> bool:
        """Does a reader run for each micro-batch? Outputs do, what is accumulated does not."""
        if self.phases is None:
            return False
        if need.op >= 0:
            return self.phases[need.op] in LOOP
        attrs = self.function.result_attrs[~need.op]
        return attrs.get("role") not in ACCUMULATED

    def _value(
        self, value: Value, end: End, needs: Sequence[Need], own: float, shared: float
    ) -> None:
        """Costs of a value's readers: `own` and `shared` are runs of their reshards and of copies."""
        groups: dict[tuple[int, int], list[Need]] = {}
        for need in needs:
            groups.setdefault((need.end.variable, id(need.end.options)), []).append(need)
        if not groups:
            return
        ends = [group[0].end for group in groups.values()]
        edge = self.session.edges.edge(
            value.type, end.options, [e.options for e in ends], own / shared,
            self.session.joins.cost(value.name, self.session.edges.cost) if self.entry else None,
        )  # fmt: skip
        if not edge.table.any():
            return
        if edge.hub is None:
            self._connect(end.variable, ends[0].variable, edge.direct(own))
            return
        variable = self.network.add_variable(edge.copies(shared))
        self._connect(variable, end.variable, edge.agreement())
        for number, reader in enumerate(ends):
            self._connect(variable, reader.variable, edge.reader(number, own))
        if self.entry:
            held = edge.copy_bytes(value.type, self.session.mesh)
            if held.any():
                self.memory.append(Bytes(variable, held))
        readers = tuple(map(tuple, groups.values()))
        self.sharing.append(Sharing(value, variable, edge, readers, own, shared))

    def _connect(self, left: int, right: int, costs: Array) -> None:
        """Add a cost table between two variables, either of which may be fixed (-1)."""
        if left < 0 and right < 0:
            self.network.constant += float(costs[0, 0])
        elif left < 0:
            self.network.add_unary(right, costs[0])
        elif right < 0:
            self.network.add_unary(left, np.ascontiguousarray(costs[:, 0]))
        else:
            self.network.add_cost(left, right, costs)


@lru_cache(maxsize=4096)
def _zeros(count: int) -> Array:
    return np.zeros(count)


@lru_cache(maxsize=16384)
def _times(options: tuple[State, ...], weight: float) -> Array:
    return np.array([state.time_us * weight for state in options])
