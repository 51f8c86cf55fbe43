"""The placement problem of a logical module as a cost network.

Variables
    x_o   for each op class o: its state per mesh axis, jointly (`place_states`);
    p_i   for each parameter of a callee, and of the entry: its placement. The entry's are never
          partial. A parameter that the entry updates has one variable for both ends of the step;
    r_j   for each result of a callee: its placement. The entry's loss and outputs are whole;
    h_v   for a value with several readers: the placement that its producer gives it, and those of
          its shared copies (one; two for values with 4 readers or more if that keeps h_v small).
Constraints, as costs of `FORBIDDEN`: h_v agrees with the producer's placement.
Costs, in us, each times the number of executions and the size of the class
    time(o, x_o)                          of an op under its split
    reshard(v, producer, reader's need)   for a value with one reader
    reshard(v, producer, copy)            for a shared copy in h_v, once
    reshard(v, producer, need)            for each reader whose need is neither of them
    weight * bytes                        of parameters, optimizer states, callees' results, and
                                          of shared copies in the entry
A value and its copies are priced as `apply` writes them: one reshard per distinct placement.
Only where a value has two different shared copies but h_v has room for one is the model's cost
above the price; it is never below.

A function has one variable per op however often it is called, and equal groups of the entry share
variables (`place_tie`), so the size of the network does not depend on depth.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import inf

import numpy as np

from ..costmodel.cluster import Cluster
from ..costmodel.collectives import collective_cost
from ..ir.module import Function, Module, Value
from ..ir.types import FLOATS, B, Mesh, TensorType, local_bytes
from .apply import Choices, FunctionChoices
from .place_hub import make_hub
from .place_network import FORBIDDEN, Array, Network
from .place_runs import executions
from .place_states import State, states_of
from .place_tie import Classes, classes_of
from .reshard import Placements, legal_placements, reshard_table_us

#: preference for sharded storage where time is equal: 1 us for 100 MB
TIE_US_PER_BYTE = 1e-8
#: entry parameters whose bytes stay for the whole run
PERSISTENT = frozenset({"param", "state", "buffer"})

#: a variable (or -1: fixed) and the placement that each of its states gives or asks for
End = tuple[int, tuple[Placements, ...]]


@dataclass(frozen=True)
class _Bytes:
    """Bytes per rank, all copies together, of each state of a variable, or of each pair of states
    of two variables."""

    variable: int
    bytes: Array
    persistent: bool = False
    other: int = -1


@dataclass(frozen=True)
class Near:
    """A neighbourhood: choices whose entries on all axes but the free ones are kept."""

    choices: Choices
    free: frozenset[int]


class PlacementModel:
    """The network of a module on a mesh, and the way back from states to choices.

    Args:
        near: only what agrees with these choices on their fixed axes; everything when absent.
    """

    def __init__(
        self, module: Module, mesh: Mesh, cluster: Cluster, near: Near | None = None
    ) -> None:
        self.module, self.mesh, self.cluster, self.near = module, mesh, cluster, near
        self.cost = collective_cost(cluster, mesh)
        self.network = Network()
        self.memory: list[_Bytes] = []
        self.executions = executions(module)
        self.whole = (B,) * len(mesh.axes)
        self.params: dict[str, list[End]] = {}
        self.results: dict[str, list[End]] = {}
        self.ops: dict[str, list[tuple[int, tuple[State, ...]]]] = {}
        live = [f for f in module.functions if self.executions[f.name]]
        classes = {f.name: classes_of(f, f is module.entry) for f in live}
        for function in live:
            self._interface(function, classes[function.name])
        for function in live:
            self._body(function, classes[function.name])

    def weighted(self, us_per_byte: float) -> Network:
        """The network with memory priced."""
        network = self.network.clone()
        for row in self.memory:
            weight = us_per_byte + (TIE_US_PER_BYTE if row.persistent else 0.0)
            if weight and row.other >= 0:
                network.add_cost(row.variable, row.other, weight * row.bytes)
            elif weight:
                network.add_unary(row.variable, weight * row.bytes)
        return network

    def memory_term_us(self, states: dict[int, int], us_per_byte: float) -> float:
        """What `weighted` adds to the cost of an assignment."""
        total = 0.0
        for row in self.memory:
            weight = us_per_byte + (TIE_US_PER_BYTE if row.persistent else 0.0)
            held = row.bytes[states[row.variable]]
            total += weight * float(held if row.other < 0 else held[states[row.other]])
        return total

    def persistent_bytes(self, states: dict[int, int]) -> float:
        """Bytes per rank of parameters, buffers and optimizer states."""
        return sum(float(r.bytes[states[r.variable]]) for r in self.memory if r.persistent)

    def choices(self, states: dict[int, int]) -> Choices:
        """What `apply` needs."""

        def pick(end: End) -> Placements:
            variable, placements = end
            return placements[states[variable] if variable >= 0 else 0]

        table = {}
        for name, ops in self.ops.items():
            splits = tuple(
                options[states[variable]].states if variable >= 0 else ()
                for variable, options in ops
            )
            table[name] = FunctionChoices(
                splits, tuple(map(pick, self.params[name])), tuple(map(pick, self.results[name]))
            )
        return Choices(table)

    def _placement_variable(
        self, type: TensorType, partial: bool, table: str, function: str, index: int
    ) -> End:
        combines = ("sum",) if partial and type.dtype in FLOATS else ()
        options = legal_placements(type, self.mesh, combines)
        if self.near is not None:
            chosen = self.near.choices.functions.get(function, FunctionChoices())
            row: tuple[Placements, ...] = getattr(chosen, table)
            kept = row[index] if index < len(row) else self.whole
            free = self.near.free
            options = tuple(
                p for p in options if all(a == b or k in free for k, (a, b) in
                                          enumerate(zip(p, kept, strict=True)))
            )  # fmt: skip
        return self.network.add_variable([0.0] * len(options)), options

    def _interface(self, function: Function, classes: Classes) -> None:
        entry = function is self.module.entry
        by_class: dict[int, End] = {}
        counts = Counter(classes.params)
        params = []
        for index, (value, attrs, number) in enumerate(
            zip(function.params, function.param_attrs, classes.params, strict=True)
        ):
            if number not in by_class:
                end = self._placement_variable(
                    value.type, not entry, "params", function.name, index
                )
                by_class[number] = end
                if entry and attrs.get("role") in PERSISTENT:
                    self._remember(end, value.type, counts[number], persistent=True)
            params.append(by_class[number])
        self.params[function.name] = params
        by_name = {v.name: end for v, end in zip(function.params, params, strict=True)}
        results = []
        for index, (value, attrs) in enumerate(
            zip(function.results, function.result_attrs, strict=True)
        ):
            if not entry:
                end = self._placement_variable(value.type, True, "results", function.name, index)
                self._remember(end, value.type, self.executions[function.name], persistent=False)
            elif "updates" in attrs:
                end = by_name[str(attrs["updates"])]
            else:
                end = (-1, (self.whole,))
            results.append(end)
        self.results[function.name] = results

    def _remember(self, end: End, type: TensorType, copies: float, *, persistent: bool) -> None:
        variable, options = end
        sizes = [local_bytes(type.placed(p), self.mesh) * copies for p in options]
        self.memory.append(_Bytes(variable, np.array(sizes, dtype=np.float64), persistent))

    def _body(self, function: Function, classes: Classes) -> None:
        runs = self.executions[function.name]
        counts = Counter(classes.ops)
        by_class: dict[int, tuple[int, tuple[State, ...]]] = {}
        ops = self.ops[function.name] = []
        for index, (op, number) in enumerate(zip(function.ops, classes.ops, strict=True)):
            if op.name == "call":
                ops.append((-1, ()))
                continue
            if number not in by_class:
                fixed = self._fixed(function.name, index)
                options = states_of(op, self.mesh, self.cluster, fixed)
                times = [s.time_us * runs * counts[number] for s in options]
                by_class[number] = (self.network.add_variable(times), options)
            ops.append(by_class[number])
        held = self._producers(function)
        readers = self._readers(function)
        groups: Counter[tuple[TensorType, End, frozenset[End]]] = Counter()
        for value, end in held:
            if value.name in readers:
                groups[value.type, end, frozenset(readers[value.name])] += 1
        for (type, end, needs), copies in groups.items():
            ordered = sorted(needs, key=lambda need: (need[0], str(need[1])))
            self._edges(type, end, ordered, copies * runs, function is self.module.entry)

    def _fixed(self, function: str, index: int) -> tuple[str | None, ...]:
        """The states that an op keeps, None on the free axes."""
        axes = range(len(self.mesh.axes))
        if self.near is None:
            return (None,) * len(axes)
        splits = self.near.choices.functions.get(function, FunctionChoices()).splits
        kept = splits[index] if index < len(splits) and splits[index] else ("",) * len(axes)
        return tuple(None if k in self.near.free else kept[k] for k in axes)

    def least_compute_us(self) -> float:
        """Sum of the least times of all ops: a bound on any placement on this mesh."""
        total = 0.0
        for function, op in self.module.walk():
            runs = self.executions[function.name]
            if op.name != "call" and runs:
                options = states_of(op, self.mesh, self.cluster)
                total += runs * min(state.time_us for state in options)
        return total

    def _producers(self, function: Function) -> list[tuple[Value, End]]:
        out = list(zip(function.params, self.params[function.name], strict=True))
        for op, (variable, options) in zip(function.ops, self.ops[function.name], strict=True):
            for j, value in enumerate(op.results):
                if op.name == "call":
                    out.append((value, self.results[str(op.attrs["callee"])][j]))
                else:
                    out.append((value, (variable, tuple(s.results[j] for s in options))))
        return out

    def _readers(self, function: Function) -> dict[str, set[End]]:
        out: dict[str, set[End]] = {}
        for op, (variable, options) in zip(function.ops, self.ops[function.name], strict=True):
            for k, value in enumerate(op.operands):
                if op.name == "call":
                    need = self.params[str(op.attrs["callee"])][k]
                else:
                    need = (variable, tuple(s.operands[k] for s in options))
                out.setdefault(value.name, set()).add(need)
        for value, end in zip(function.results, self.results[function.name], strict=True):
            out.setdefault(value.name, set()).add(end)
        return out

    def _edges(
        self, type: TensorType, end: End, needs: list[End], runs: int, entry: bool
    ) -> None:
        """The reshard costs between a value's producer and its readers.

        In the entry a shared copy may live long: a gathered weight from the forward to the
        backward call. So its bytes are remembered.
        """
        sources = tuple(dict.fromkeys(end[1]))
        targets = tuple(dict.fromkeys(p for need in needs for p in need[1]))
        table = reshard_table_us(type, self.mesh, sources, targets, self.cost)
        table = np.where(table == inf, FORBIDDEN, table * runs)
        row = {placement: i for i, placement in enumerate(sources)}
        column = {placement: j for j, placement in enumerate(targets)}
        held = np.array([row[p] for p in end[1]])
        wishes = [np.array([column[p] for p in need[1]]) for need in needs]
        if len(needs) == 1:
            self._connect(end[0], needs[0][0], table[np.ix_(held, wishes[0])])
            return
        same = np.array([[source == target for target in targets] for source in sources])
        hub = make_hub(same, table, [wish.tolist() for wish in wishes])
        variable = self.network.add_variable(hub.copy_costs(table))
        self._connect(variable, end[0], hub.agreement(held))
        costs = hub.reader_costs(table)
        for need, wish in zip(needs, wishes, strict=True):
            self._connect(variable, need[0], costs[:, wish])
        if not entry:
            return
        sizes = np.array([local_bytes(type.placed(p), self.mesh) * runs for p in targets])
        self.memory.append(_Bytes(variable, hub.copy_bytes(sizes)))
        own = hub.reader_bytes(sizes)
        for need, wish in zip(needs, wishes, strict=True):
            if need[0] >= 0:
                self.memory.append(_Bytes(variable, own[:, wish], other=need[0]))
            else:
                self.memory.append(_Bytes(variable, own[:, wish[0]]))

    def _connect(self, left: int, right: int, costs: Array) -> None:
        """Add a cost table between two variables, either of which may be fixed (-1)."""
        if left < 0 and right < 0:
            self.network.constant += float(costs[0, 0])
        elif left < 0:
            self.network.add_unary(right, costs[0])
        elif right < 0:
            self.network.add_unary(left, costs[:, 0])
        else:
            self.network.add_cost(left, right, costs)
