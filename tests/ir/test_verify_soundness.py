"""What the verifier accepts is right: changed placements and collectives do not change values.

Valid modules of the lower levels are changed at random: a placement, a split, a collective, its
attributes, the order of the actions. Most changes are refused; those that pass must compute what
the logical program computes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from random import Random

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.ir.strategies import programs
from torch import Tensor

from weft.ir.errors import CompileError
from weft.ir.module import Attr, Function, Module, Op, Value
from weft.ir.opdef import signature_of
from weft.ir.ops import OPS
from weft.ir.parser import parse_module
from weft.ir.text import print_module
from weft.ir.types import B, Mesh, P, S
from weft.ir.verify import verify
from weft.passes.apply import apply
from weft.passes.fuse import Fuse
from weft.passes.lower import lower
from weft.passes.random_place import random_choices
from weft.passes.schedule import Schedule
from weft.runtime.interpreter import evaluate

MESHES = (Mesh((("a", 2),)), Mesh((("a", 2), ("b", 2))), Mesh((("a", 3),)),
          Mesh((("a", 1), ("b", 2))), Mesh((("a", 2), ("b", 2), ("c", 2))), Mesh())  # fmt: skip
PLACEMENTS = (B, S(0), S(1), S(2), P("sum"), P("max"))
COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "shard",
               "partial", "lse_combine")  # fmt: skip
SETTINGS = {"deadline": None, "suppress_health_check": list(HealthCheck)}


def inputs_of(module: Module, seed: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [
        torch.randint(0, 2, value.type.shape, generator=g)
        if value.type.dtype == "i64"
        else torch.randn(value.type.shape, dtype=torch.float64, generator=g)
        for value in module.entry.params
    ]


def equal(wanted: list[Tensor], got: list[Tensor]) -> bool:
    pairs = zip(wanted, got, strict=True)
    return all(torch.allclose(x, y, rtol=1e-6, atol=1e-8, equal_nan=True) for x, y in pairs)


def levels(module: Module, mesh: Mesh, seed: int) -> list[Module]:
    """The placed, spmd, fused and schedule modules of random choices."""
    placed = apply(module, mesh, random_choices(module, mesh, Random(seed)))
    spmd = lower(placed)
    fused = Fuse().run(spmd)
    return [placed, spmd, fused, Schedule().run(fused)]


def substitute(function: Function, table: Mapping[str, Value]) -> Function:
    """Values replaced by others, at their definition and everywhere."""

    def new(values: tuple[Value, ...]) -> tuple[Value, ...]:
        return tuple(table.get(value.name, value) for value in values)

    ops = (op.with_(operands=new(op.operands), results=new(op.results)) for op in function.ops)
    return function.with_(
        params=new(function.params), results=new(function.results), ops=tuple(ops)
    )


class Mutation:
    """Random changes to one function."""

    def __init__(self, function: Function, mesh: Mesh, rng: Random) -> None:
        self.function, self.mesh, self.rng = function, mesh, rng

    def run(self) -> Function:
        for _ in range(self.rng.choice((1, 1, 2, 3))):
            if self.function.ops:
                self.index = self.rng.randrange(len(self.function.ops))
                change = self.rng.choice(
                    (self.placement, self.split, self.attribute, self.other, self.drop)
                )
                change(self.function.ops[self.index])
        return self.function

    def put(self, *ops: Op) -> None:
        """Replace the current op."""
        before, after = self.function.ops[: self.index], self.function.ops[self.index + 1 :]
        self.function = self.function.with_(ops=(*before, *ops, *after))

    def place(self, value: Value, axis: int, entry: object) -> None:
        """Another placement on one axis, at the definition and all uses."""
        placement = list(value.type.placement or ())
        placement[axis : axis + 1] = [entry]
        moved = Value(value.name, value.type.placed(placement))
        self.function = substitute(self.function, {value.name: moved})

    def placement(self, op: Op) -> None:
        values = [*self.function.params, *(v for op in self.function.ops for v in op.results)]
        if values and self.mesh.axes:
            axis = self.rng.randrange(len(self.mesh.axes))
            self.place(self.rng.choice(values), axis, self.rng.choice(PLACEMENTS))

    def split(self, op: Op) -> None:
        """Another split, mostly with the result placements that it gives."""
        if OPS[op.name].signature is None or not self.mesh.axes:
            return
        axis = self.rng.choice(self.mesh.names)
        states = {**op.split, axis: self.rng.choice(("", *signature_of(op).states))}
        states = {name: state for name, state in states.items() if state}
        self.put(op.with_(split=states))
        if self.rng.random() < 0.8:
            row = tuple(states.get(name, "") for name in self.mesh.names)
            _, outs = signature_of(op).placements(row)
            pairs = zip(op.results, outs, strict=True)
            table = {v.name: Value(v.name, v.type.placed(p)) for v, p in pairs}
            self.function = substitute(self.function, table)

    def attribute(self, op: Op) -> None:
        """Another axis, dim or combine of a collective."""
        if op.name in COLLECTIVES:
            self.put(op.with_(attrs={**op.attrs, **self.drawn(op.name, one=True)}))

    def drawn(self, name: str, one: bool = False) -> dict[str, Attr]:
        draw = {
            "axis": lambda: self.rng.choice(self.mesh.names),
            "combine": lambda: self.rng.choice(("sum", "max", "min")),
        }
        names = [key for key in OPS[name].attrs if key not in ("async", "root")]
        names = [self.rng.choice(names)] if one else names
        return {key: draw.get(key, lambda: self.rng.randrange(3))() for key in names}

    def other(self, op: Op) -> None:
        """Another collective in its place."""
        if op.name in COLLECTIVES:
            name = self.rng.choice(COLLECTIVES)
            attrs = self.drawn(name)
            self.put(op.with_(name=name, attrs=attrs))
            axis = self.mesh.axis(str(attrs["axis"]))
            if self.rng.random() < 0.5:
                self.place(op.result, axis, self.rng.choice(PLACEMENTS))

    def drop(self, op: Op) -> None:
        """No collective or reshard at all."""
        if op.name in COLLECTIVES or op.name == "reshard":
            self.put()
            self.function = substitute(self.function, {op.result.name: op.operands[0]})


def moved(function: Function, rng: Random) -> Function:
    """Actions dropped, moved or repeated."""
    ops = list(function.ops)
    for _ in range(rng.choice((1, 2))):
        if ops:
            at = rng.randrange(len(ops))
            op = ops.pop(at)
            if rng.random() < 0.7:
                ops.insert(rng.randrange(len(ops) + 1), op)
    return function.with_(ops=tuple(ops))


def holds(module: Module, inputs: list[Tensor], wanted: list[Tensor]) -> bool:
    """False where the verifier refuses; fails where it accepts what computes something else."""
    try:
        verify(module)
    except CompileError:
        return False
    assert equal(wanted, evaluate(module, inputs)), print_module(module)
    return True


@settings(max_examples=120, **SETTINGS)
@given(programs(most=5), st.sampled_from(MESHES), st.integers(0, 10**6))
def test_the_passes_write_what_the_verifier_accepts(
    module: Module, mesh: Mesh, seed: int
) -> None:
    verify(module)
    for made in levels(module, mesh, seed):
        verify(made)
        assert parse_module(print_module(made)) == made


@settings(max_examples=60, **SETTINGS)
@given(programs(most=5), st.sampled_from(MESHES), st.integers(0, 10**6))
def test_accepted_changes_keep_the_values(module: Module, mesh: Mesh, seed: int) -> None:
    rng = Random(seed)
    inputs = inputs_of(module, seed)
    wanted = evaluate(module, inputs)
    placed, spmd, _, schedule = levels(module, mesh, seed)
    for made in (placed, spmd):
        for _ in range(20):
            entry = Mutation(made.entry, mesh, rng).run()
            changed = made.with_(functions=(entry,))
            if holds(changed, inputs, wanted) and made is placed:
                lowered = lower(changed)
                assert holds(lowered, inputs, wanted)
    for _ in range(20):
        entry = moved(schedule.entry, rng)
        holds(replace(schedule, functions=(entry, *schedule.functions[1:])), inputs, wanted)
