"""Which ops and parameters of a function may share one decision.

An entry function updates the same weight of 80 equal layers by 80 equal groups of ops that touch
each other only through calls, and a called function has one set of placements for all its calls.
So these groups see the same costs and have the same best choices: one variable for all of them.
The classes come from colour refinement (Weisfeiler and Leman, 1968) in which call sites, being
fixed by their callee, keep their colour: two values with the same colour have the same producer
class and the same set of consumer classes, which is all that their cost depends on.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass

from ..ir.module import Function, Op
from ..ir.opdef import full_attrs


@dataclass(frozen=True)
class Classes:
    """Class numbers: of each parameter, and of each op by index (-1 for calls)."""

    params: tuple[int, ...]
    ops: tuple[int, ...]


def own_key(op: Op) -> Hashable:
    """What an op computes, apart from its operands' identity."""
    types = (tuple(v.type for v in op.operands), tuple(v.type for v in op.results))
    return op.name, tuple(sorted(full_attrs(op.name, op.attrs).items())), types


def classes_of(function: Function, entry: bool) -> Classes:
    """The coarsest stable classes; parameters and results of callees are told apart."""
    return _Refiner(function, entry).run()


class _Refiner:
    def __init__(self, function: Function, entry: bool) -> None:
        self.function = function
        self.names = [p.name for p in function.params]
        count = len(self.names)
        #: nodes: parameters, then ops; colour by node
        self.colours: list[int] = []
        self.producer: dict[str, tuple[int, int]] = {n: (i, 0) for i, n in enumerate(self.names)}
        for index, op in enumerate(function.ops):
            self.producer.update((v.name, (count + index, j)) for j, v in enumerate(op.results))
        self.fixed: dict[str, list[Hashable]] = {}
        updates: dict[str, list[str]] = {}
        for index, (value, attrs) in enumerate(
            zip(function.results, function.result_attrs, strict=True)
        ):
            target = str(attrs.get("updates", ""))
            if entry and target:
                updates.setdefault(target, []).append(value.name)
            else:
                key = attrs.get("role", "") if entry else index
                self.fixed.setdefault(value.name, []).append(("result", key))
        self.updates = updates
        self.updated_by = {v: t for t, values in updates.items() for v in values}
        keys: list[Hashable] = []
        for index, (value, attrs) in enumerate(
            zip(function.params, function.param_attrs, strict=True)
        ):
            keys.append(("param", attrs.get("role", ""), value.type) if entry else index)
        for op in function.ops:
            keys.append(own_key(op))
        self._intern(keys)

    def _intern(self, keys: list[Hashable]) -> int:
        table: dict[Hashable, int] = {}
        self.colours = [table.setdefault(key, len(table)) for key in keys]
        return len(table)

    def run(self) -> Classes:
        found = len(set(self.colours))
        while True:
            now = self._intern(self._round())
            if now == found:
                break
            found = now
        count = len(self.names)
        ops = tuple(
            -1 if op.name == "call" else colour
            for op, colour in zip(self.function.ops, self.colours[count:], strict=True)
        )
        return Classes(tuple(self.colours[:count]), ops)

    def _round(self) -> list[Hashable]:
        readers: dict[str, set[Hashable]] = {n: set(keys) for n, keys in self.fixed.items()}
        count = len(self.names)
        for index, op in enumerate(self.function.ops):
            call = op.attrs["callee"] if op.name == "call" else None
            colour: Hashable = self.colours[count + index] if call is None else ("call", call)
            for position, value in enumerate(op.operands):
                readers.setdefault(value.name, set()).add((colour, position))
        position_of = {n: i for i, n in enumerate(self.names)}
        for target, values in self.updates.items():
            for name in values:
                colour = self.colours[position_of[target]]
                readers.setdefault(name, set()).add(("updates", colour))
        keys: list[Hashable] = []
        for index, name in enumerate(self.names):
            new = frozenset(self._source(v) for v in self.updates.get(name, ()))
            keys.append((self.colours[index], frozenset(readers.get(name, ())), new))
        for index, op in enumerate(self.function.ops):
            keys.append(self._op_key(index, op, readers))
        return keys

    def _op_key(self, index: int, op: Op, readers: Mapping[str, set[Hashable]]) -> Hashable:
        if op.name == "call":
            return self.colours[len(self.names) + index]
        sources = tuple(self._source(v.name) for v in op.operands)
        sinks = tuple(frozenset(readers.get(v.name, ())) for v in op.results)
        return self.colours[len(self.names) + index], sources, sinks

    def _source(self, value: str) -> Hashable:
        node, result = self.producer[value]
        if node >= len(self.names):
            op = self.function.ops[node - len(self.names)]
            if op.name == "call":
                return "call", op.attrs["callee"], result
        return self.colours[node], result
