"""The placement problem of a logical module as a cost network.

Variables
    x_o   for each op of each call: its state per mesh axis, jointly (`place_states`);
    p_i   for each parameter of each call, and of the entry: its placement. The entry's are never
          partial. A parameter that the entry updates has one variable for both ends of the step;
    r_j   for each result of each call: its placement. The entry's loss and outputs are whole;
    h_v   for a value with several readers: the placement that its producer gives it, and those of
          its shared copies (`place_hub`).
Constraints, as costs of `FORBIDDEN`: h_v agrees with the producer's placement; the user's.
Costs, in us, each times its runs in a step
    time(o, x_o)                          of an op under its split
    reshard(v, producer, reader's need)   for a value with one reader
    reshard(v, producer, copy)            for a shared copy in h_v, once
    reshard(v, producer, need)            for each reader whose need is neither of them
    weight * bytes                        of parameters, optimizer states, callees' results, and
                                          of shared copies in the entry
A value and its copies are priced as `apply` writes them. Only a relaxed hub costs less than that.

Micro-batches: an op of the forward or backward phase runs `micro` times, the others once. A
gradient is resharded once, after it has been added up. A reshard of a parameter, or of what comes
from parameters alone, runs once where its result is kept as a shared copy, else before each reader.

Equal calls have equal tables, by identity, so that depth costs little (`place_network`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from ..costmodel.cluster import Cluster
from ..ir.module import Module, Namer
from ..ir.types import Mesh
from .apply import LOOP, Again, Choices, FunctionChoices
from .constraints import Constraints, Rule, Selection
from .place_body import PERSISTENT, Body, Near, Path, Session
from .place_network import Array, Network
from .place_runs import executions
from .place_states import states_of

#: preference for sharded storage where time is equal: 1 us for 1 TB, which no optimum moves by more
#: than rounding
TIE_US_PER_BYTE = 1e-12


@dataclass(frozen=True)
class Runs:
    """How often the parts of a step run.

    Attributes:
        phases: of each op of the entry: `before`, `forward`, `backward` or `update`; None where
            nothing is repeated.
        micro: runs of forward and backward ops.
    """

    phases: tuple[str, ...] | None = None
    micro: int = 1

    def weights(self, count: int) -> list[float]:
        """Runs of each op of the entry."""
        if self.phases is None:
            return [1.0] * count
        return [float(self.micro) if phase in LOOP else 1.0 for phase in self.phases]


class PlacementModel:
    """The network of a module on a mesh, and the way back from states to choices.

    Args:
        near: only what agrees with these choices on their fixed axes; everything when absent.
        constraints: what a placement must obey.
        runs: how often the parts of the step run.
    """

    def __init__(
        self,
        module: Module,
        mesh: Mesh,
        cluster: Cluster,
        near: Near | None = None,
        constraints: Constraints = Constraints(),
        runs: Runs = Runs(),
    ) -> None:
        self.module, self.mesh, self.cluster, self.runs = module, mesh, cluster, runs
        self.session = Session(module, mesh, cluster, Selection(constraints, mesh), near)
        weights = runs.weights(len(module.entry.ops))
        self.entry = Body(self.session, module.entry, weights, "", (), runs.phases)
        self.network = self.entry.network

    @property
    def unused(self) -> tuple[Rule, ...]:
        """Constraints that are about nothing in the program."""
        return self.session.selection.unused(self.session.seen)

    def weighted(self, us_per_byte: float) -> Network:
        """The network with memory priced."""
        network = self.network.clone()
        scaled: dict[tuple[int, int, float], Array] = {}
        for row in self.entry.memory:
            weight = us_per_byte + (TIE_US_PER_BYTE if row.persistent else 0.0)
            if not weight:
                continue
            states = network.states[row.variable]
            key = (id(row.bytes), id(states), weight)
            if key not in scaled:
                scaled[key] = weight * row.bytes[states]
            network.add_unary(row.variable, scaled[key])
        return network

    def memory_term_us(self, states: Mapping[int, int], us_per_byte: float) -> float:
        """What `weighted` adds to the cost of an assignment."""
        total = 0.0
        for row in self.entry.memory:
            weight = us_per_byte + (TIE_US_PER_BYTE if row.persistent else 0.0)
            total += weight * float(row.bytes[states[row.variable]])
        return total

    def most_memory_term_us(self, us_per_byte: float) -> float:
        """The most that `weighted` adds to the cost of any assignment."""
        total = 0.0
        for row in self.entry.memory:
            weight = us_per_byte + (TIE_US_PER_BYTE if row.persistent else 0.0)
            total += weight * float(row.bytes.max()) if weight else 0.0
        return total

    def plan(self, states: Mapping[int, int]) -> Decoded:
        """What `apply` needs, and what the network leaves out of its cost."""
        return _Decoder(self).run(states)

    def least_compute_us(self) -> float:
        """Sum of the least times of all ops: a bound on any placement on this mesh."""
        weights = self.runs.weights(len(self.module.entry.ops))
        counts = executions(self.module, weights)
        total = 0.0
        for function in self.module.functions:
            for index, op in enumerate(function.ops):
                entry = function is self.module.entry
                runs = weights[index] if entry else counts[function.name]
                if op.name != "call" and runs:
                    options = states_of(op, self.mesh, self.cluster)
                    total += runs * min(state.time_us for state in options)
        return total


@dataclass(frozen=True)
class Decoded:
    """A plan: choices by call path and as `apply` takes them; us that relaxed hubs leave out."""

    chosen: Mapping[Path, FunctionChoices]
    choices: Choices
    slack_us: float


@dataclass
class _Decoder:
    """From states to choices: equal calls share a function, others get copies of it."""

    model: PlacementModel
    chosen: dict[Path, FunctionChoices] = field(default_factory=dict)
    functions: dict[str, FunctionChoices] = field(default_factory=dict)
    clones: dict[str, str] = field(default_factory=dict)
    callees: dict[tuple[str, int], str] = field(default_factory=dict)
    slack_us: float = 0.0

    def run(self, states: Mapping[int, int]) -> Decoded:
        model = self.model
        entry = model.module.entry.name
        self.namer = Namer(tuple(function.name for function in model.module.functions))
        self.named: dict[object, str] = {}
        self.inside: dict[object, tuple[FunctionChoices, tuple[object, ...], float]] = {}
        self.used: Counter[str] = Counter()
        self.functions[entry] = model.entry.chosen(states)
        self.chosen[()] = self.functions[entry]
        self.slack_us += model.entry.slack_us(states)
        self._calls(model.entry, entry, states, ())
        choices = Choices(
            self.functions, self.clones, self.callees, _again(model.entry, states),
            model.runs.phases, model.runs.micro > 1,
        )  # fmt: skip
        return Decoded(self.chosen, choices, self.slack_us)

    def _calls(self, body: Body, name: str, states: Mapping[int, int], at: Path) -> None:
        for index in body.calls:
            callee = str(body.function.ops[index].attrs["callee"])
            given = self._call(body, index, callee, states, (*at, index))
            if given != callee:
                self.callees[name, index] = given

    def _call(
        self, body: Body, index: int, callee: str, states: Mapping[int, int], at: Path
    ) -> str:
        inner, numbers = body.calls[index]
        key = (id(inner), tuple(states[n] for n in numbers.values()))
        own = body.inner(index, states) if key not in self.named or inner.calls else {}
        if key not in self.named:
            choices = inner.chosen(own)
            shape = (callee, choices, *(self._shape(inner, i, own) for i in inner.calls))
            self.named[key] = self._name(shape, callee, choices)
            self.inside[key] = choices, shape, inner.slack_us(own)
            self._calls(inner, self.named[key], own, at)
        elif inner.calls:
            self._calls(inner, self.named[key], own, at)
        choices, _, slack_us = self.inside[key]
        self.slack_us += slack_us
        self.chosen[at] = choices
        return self.named[key]

    def _shape(self, body: Body, index: int, states: Mapping[int, int]) -> tuple[object, ...]:
        """What tells a nested call's choices apart from others."""
        inner, _ = body.calls[index]
        own = body.inner(index, states)
        return inner.chosen(own), *(self._shape(inner, i, own) for i in inner.calls)

    def _name(self, shape: object, callee: str, choices: FunctionChoices) -> str:
        if shape not in self.named:
            self.used[callee] += 1
            name = callee if self.used[callee] == 1 else self.namer(f"{callee}_{self.used[callee]}")
            if name != callee:
                self.clones[name] = callee
            self.functions[name] = choices
            self.named[shape] = name
        return self.named[shape]


def _again(entry: Body, states: Mapping[int, int]) -> frozenset[Again]:
    """Readers that make a copy of their own although others need the same."""
    out: set[Again] = set()
    for share in entry.sharing:
        edge, hub = share.edge, share.edge.hub
        if hub is None or hub.relaxed:
            continue
        state = states[share.variable]
        row = edge.table[hub.source[state]]
        for number, needs in enumerate(share.needs):
            variable = needs[0].end.variable
            target = int(edge.wishes[number][states[variable] if variable >= 0 else 0])
            if not hub.there[state][target] and row[target] > 0:
                out.update((share.value.name, need.op) for need in needs)
    return frozenset(out)


__all__ = ["PERSISTENT", "Decoded", "Near", "PlacementModel", "Runs"]
