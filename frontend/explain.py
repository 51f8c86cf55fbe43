"""Why something is placed as it is: what its placement costs, and what the runner-up would cost.

Each op, and each parameter, is priced alone in the flat placed program: in every legal state, with
the placements of its neighbours fixed, as its own time and that of the reshards around it. A value
is resharded once for all readers that want it alike, as `passes/apply.py` does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import inf

from ..costmodel.cluster import Cluster
from ..costmodel.collectives import collective_cost
from ..costmodel.estimate import op_time_us
from ..ir.errors import CompileError
from ..ir.module import Attr, Module, Op, Value
from ..ir.types import Mesh, TensorType, local_bytes
from ..passes.place_states import states_of
from ..passes.reshard import Placements, legal_placements, reshard_cost_us
from .flat import flat


@dataclass(frozen=True)
class Option:
    """One way to place an op or a parameter.

    Attributes:
        text: the split, or the placement.
        work_us: time of the op itself; 0 for a parameter.
        moves_us: time of the reshards before and behind it.
        bytes: of its results, or of the parameter, on the largest rank.
    """

    text: str
    work_us: float
    moves_us: float
    bytes: int

    @property
    def total_us(self) -> float:
        """Time of the op and its reshards."""
        return self.work_us + self.moves_us


@dataclass(frozen=True)
class Choice:
    """What was chosen and the cheapest alternative, None where there is no other legal one.

    Attributes:
        options: number of legal alternatives with other placements, the chosen one included.
    """

    chosen: Option
    runner_up: Option | None
    options: int


@dataclass
class _Held:
    """A value before any reshard: how it is held, and how its readers want it."""

    type: TensorType
    readers: list[tuple[int, Placements]]  #: number of the reading op, -1 for a result


class Explanation:
    """Prices of the alternatives in a placed module.

    Args:
        placed: a module at placed level.
        cluster: prices ops and collectives.
    """

    def __init__(self, placed: Module, cluster: Cluster) -> None:
        self.module = flat(placed)
        self.cluster = cluster
        self.mesh = self.module.mesh or Mesh()
        self._cost = collective_cost(cluster, self.mesh)

    @cached_property
    def _held(self) -> dict[str, _Held]:
        entry = self.module.entry
        held = {v.name: _Held(v.type, []) for v in entry.params}
        for number, op in enumerate(entry.ops):
            if op.name != "reshard":
                held.update((v.name, _Held(v.type, [])) for v in op.results)
                for value in dict.fromkeys(op.operands):
                    self._reader(held, value, number)
        for value in entry.results:
            self._reader(held, value, -1)
        return held

    def _reader(self, held: dict[str, _Held], value: Value, number: int) -> None:
        assert value.type.placement is not None
        held[self._origin(value).name].readers.append((number, value.type.placement))

    @cached_property
    def _sources(self) -> dict[str, Value]:
        reshards = (op for op in self.module.entry.ops if op.name == "reshard")
        return {op.result.name: op.operands[0] for op in reshards}

    def _origin(self, value: Value) -> Value:
        while value.name in self._sources:
            value = self._sources[value.name]
        return value

    def matching(self, path: str) -> list[tuple[int, Op]]:
        """Ops, with their numbers, whose module path holds `path`, or called so, or their values."""
        return [
            (number, op)
            for number, op in enumerate(self.module.entry.ops)
            if op.name != "reshard"
            and (path in op.loc.path or path == op.name or any(path == v.name for v in op.results))
        ]

    def parameters(self, path: str) -> Iterator[tuple[Mapping[str, Attr], Value]]:
        """The entry's parameters whose name holds `path`."""
        entry = self.module.entry
        for value, attrs in zip(entry.params, entry.param_attrs, strict=True):
            if path in str(attrs.get("name", value.name)):
                yield attrs, value

    def op(self, number: int) -> Choice:
        """What the op with a number in the flat program costs, and its runner-up."""
        op = self.module.entry.ops[number]
        states = tuple(op.split.get(axis, "") for axis in self.mesh.names)
        bare = op.with_(
            operands=tuple(_bare(v) for v in op.operands),
            results=tuple(_bare(v) for v in op.results),
            split={},
        )
        ins = tuple(v.type.placement or () for v in op.operands)
        outs = tuple(v.type.placement or () for v in op.results)
        chosen = self._option(op, number, states, ins, outs, self._time(bare, states))
        if op.name == "call":
            return Choice(chosen, None, 1)
        others = [s for s in states_of(bare, self.mesh, self.cluster)
                  if (s.operands, s.results) != (ins, outs)]  # fmt: skip
        priced = [
            self._option(op, number, s.states, s.operands, s.results, s.time_us) for s in others
        ]
        return Choice(chosen, _least(priced), len(others) + 1)

    def _time(self, bare: Op, states: Sequence[str]) -> float:
        return op_time_us(bare, states, self.mesh, self.cluster)

    def _option(
        self,
        op: Op,
        number: int,
        states: Sequence[str],
        ins: Sequence[Placements],
        outs: Sequence[Placements],
        time_us: float,
    ) -> Option:
        moves_us = 0.0
        wishes = {(self._origin(v), wish) for v, wish in zip(op.operands, ins, strict=True)}
        for value, wish in wishes:
            held = self._held[value.name]
            others = {wanted for reader, wanted in held.readers if reader != number}
            if wish not in others:
                moves_us += self._move(held.type, held.type.placement or (), wish)
        size = 0
        for value, out in zip(op.results, outs, strict=True):
            size += local_bytes(value.type.placed(out), self.mesh)
            for wanted in {w for _, w in self._held[value.name].readers}:
                moves_us += self._move(value.type, out, wanted)
        pairs = zip(self.mesh.names, states, strict=True)
        text = ", ".join(f"{axis}={state}" for axis, state in pairs if state)
        return Option(text or "whole on every rank", time_us, moves_us, size)

    def parameter(self, value: Value) -> Choice:
        """What holding an entry parameter as chosen costs, its update's reshard included."""
        entry = self.module.entry
        held = self._held[value.name]
        updates = [
            self._origin(result).type
            for result, attrs in zip(entry.results, entry.result_attrs, strict=True)
            if attrs.get("updates") == value.name
        ]
        wishes = {wanted for _, wanted in held.readers}

        def option(placement: Placements) -> Option:
            moves_us = sum(self._move(value.type, placement, wanted) for wanted in wishes)
            for type in updates:
                moves_us += self._move(type, type.placement or (), placement)
            text = ", ".join(map(str, placement)) or "whole"
            return Option(text, 0.0, moves_us, local_bytes(value.type.placed(placement), self.mesh))

        legal = legal_placements(value.type.placed(None), self.mesh, ())
        now = value.type.placement or ()
        others = [option(p) for p in legal if p != now]
        return Choice(option(now), _least(others), len(others) + 1)

    def _move(self, type: TensorType, source: Placements, target: Placements) -> float:
        """Time of a reshard; inf where there is none."""
        if source == target:
            return 0.0
        try:
            return reshard_cost_us(type.placed(None), self.mesh, source, target, self._cost)
        except CompileError:
            return inf


def _bare(value: Value) -> Value:
    return Value(value.name, value.type.placed(None))


def _least(options: Sequence[Option]) -> Option | None:
    """The fastest option, the smallest of equals; None where no reshard leads to any."""
    best = min(options, key=lambda o: (o.total_us, o.bytes), default=None)
    return best if best is not None and best.total_us < inf else None
