"""Writing choices down: types, splits, and reshards where they are needed and nowhere else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from random import Random

import pytest
import torch
from tests.passes.equality import assert_close
from tests.passes.programs import random_program
from tests.passes.search_models import stack
from torch import Generator

from weft.ir.builder import Builder
from weft.ir.errors import CompileError, RunError
from weft.ir.module import Attr, Module, Op
from weft.ir.parser import parse_module
from weft.ir.text import print_module
from weft.ir.types import B, Mesh, P, S, TensorType
from weft.ir.verify import verify
from weft.passes.apply import LOOP, Choices, FunctionChoices, apply, apply_phased
from weft.passes.micro import time_split
from weft.passes.random_place import RandomPlace, parse_mesh, random_choices
from weft.passes.search_units import units_of
from weft.passes.stages import cut
from weft.runtime.interpreter import evaluate

LINE = Mesh((("tp", 2),))
GRID = Mesh((("dp", 2), ("tp", 2)))


def mlp() -> Module:
    """y = x @ w; z = exp(y)."""
    b = Builder()
    x = b.param(TensorType("f64", (4, 6)), "x", role="input")
    w = b.param(TensorType("f64", (6, 8)), "w", role="param")
    y = b.one("einsum", [x, w], {"spec": "b k, k n -> b n"}, hint="y")
    z = b.one("exp", [y], hint="z")
    return Module("logical", (b.function("main", [z], [{"role": "output"}]),))


def reshards(module: Module) -> list[Op]:
    return [op for _, op in module.walk() if op.name == "reshard"]


def choose(splits: Sequence[tuple[str, ...]] = (), **more: Sequence[tuple[object, ...]]) -> Choices:
    return Choices({"main": FunctionChoices(tuple(splits), **more)})  # type: ignore[arg-type]


def test_without_choices_everything_is_whole_and_nothing_is_resharded() -> None:
    placed = apply(mlp(), GRID, Choices())
    verify(placed)
    assert placed.level == "placed" and placed.mesh == GRID and not reshards(placed)
    for _, op in placed.walk():
        assert not op.split and all(v.type.placement == (B, B) for v in op.results)


def test_a_split_places_operands_and_results() -> None:
    placed = apply(mlp(), GRID, choose([("b", "k")], params=((S(0), S(1)), (B, S(0)))))
    verify(placed)
    einsum = placed.entry.ops[0]
    assert einsum.split == {"dp": "b", "tp": "k"}
    assert [v.type.placement for v in einsum.operands] == [(S(0), S(1)), (B, S(0))]
    assert einsum.result.type.placement == (S(0), P())


def test_a_reshard_stands_where_placements_differ_and_is_shared() -> None:
    b = Builder()
    x = b.param(TensorType("f64", (4, 6)), "x", role="input")
    a = b.one("exp", [x])
    c = b.one("mul", [x, x])
    d = b.one("neg", [x])
    results = [b.one("add", [a, c]), d]
    module = Module("logical", (b.function("main", results, [{"role": "output"}] * 2),))
    placed = apply(module, LINE, choose([("a0",), ("a0",), ("a1",), ("a0",)]))
    verify(placed)
    wanted = [(op.operands[0].name, op.result.type.placement) for op in reshards(placed)]
    # x for exp and both operands of mul at once, x for neg, and the two results
    assert wanted[:2] == [("x", (S(0),)), ("x", (S(1),))]
    assert [placement for _, placement in wanted[2:]] == [(B,), (B,)] and len(wanted) == 4
    names = [op.name for op in placed.entry.ops]
    assert names[0] == "reshard" and names.index("neg") == 1 + names.index("reshard", 1)


def test_results_of_the_entry_are_whole_and_updates_go_where_their_parameter_is() -> None:
    b = Builder()
    p, g = (b.param(TensorType("f64", (4, 6)), n, role="param") for n in "pg")
    step, lr = (b.param(TensorType("f64", ()), n, role="lr") for n in ("step", "lr"))
    new = b.one("sgd_update", [p, g, step, lr])
    attrs: list[dict[str, Attr]] = [{"role": "update", "updates": "p"}, {"role": "output"}]
    module = Module("logical", (b.function("main", [new, new], attrs),))
    placed = apply(module, LINE, choose([("a1",)], params=((S(0),), (S(1),))))
    verify(placed)
    assert [v.type.placement for v in placed.entry.results] == [(S(0),), (B,)]


def block_called_twice() -> Module:
    inner = Builder()
    x = inner.param(TensorType("f64", (4, 6)), "x")
    y = inner.one("exp", [x])
    block = inner.function("block", [y])
    b = Builder()
    a = b.param(TensorType("f64", (4, 6)), "a", role="input")
    types = [a.type]
    first = b.one("call", [a], {"callee": "block"}, types=types)
    second = b.one("call", [first], {"callee": "block"}, types=types)
    return Module("logical", (b.function("main", [second], [{"role": "output"}]), block))


def test_call_sites_reshard_to_what_the_callee_takes_and_returns() -> None:
    block = FunctionChoices((("a0",),), params=((S(0),),), results=((S(1),),))
    placed = apply(block_called_twice(), LINE, Choices({"block": block}))
    verify(placed)
    ops = [(op.name, op.results[0].type.placement) for op in placed.entry.ops]
    assert ops == [
        ("reshard", (S(0),)), ("call", (S(1),)), ("reshard", (S(0),)), ("call", (S(1),)),
        ("reshard", (B,)),
    ]  # fmt: skip
    assert [op.name for op in placed.function("block").ops] == ["exp", "reshard"]


@pytest.mark.parametrize(
    ("choices", "code", "message"),
    [
        (choose([("q", "")]), "W0401", "no dim q"),
        (choose([("b",)]), "W0401", "1 states for 2 axes"),
        (choose([("b", "b"), ("a0", "a0")]), "", ""),
        (choose([("n", "")], params=((S(2), B),)), "W0402", "there is no dim 2"),
        (choose(params=((B,),)), "W0402", "1 placements for 2 axes"),
        (choose([], results=((P("sum"), P("max")),)), "W0402", "partial in max and sum"),
    ],
)
def test_illegal_choices_are_reported(choices: Choices, code: str, message: str) -> None:
    if not code:
        verify(apply(mlp(), GRID, choices))
        return
    with pytest.raises(CompileError, match=message) as caught:
        apply(mlp(), GRID, choices)
    assert caught.value.code == code


def test_an_opaque_op_cannot_be_split() -> None:
    b = Builder()
    x = b.param(TensorType("f64", (4,)), "x", role="input")
    y = b.one("aten", [x], {"target": "aten.neg.default", "args": '["%0"]'}, types=[x.type])
    module = Module("logical", (b.function("main", [y], [{"role": "output"}]),))
    assert not reshards(apply(module, LINE, choose([("",)])))
    with pytest.raises(CompileError, match="it has no signature") as caught:
        apply(module, LINE, choose([("a0",)]))
    assert caught.value.code == "W0401"


@pytest.mark.parametrize("seed", range(40))
def test_random_choices_are_legal_and_mean_the_same_with_ideal_reshards(seed: int) -> None:
    program = random_program(seed + 10_000)
    mesh = parse_mesh(Random(seed).choice(["2", "2x2", "2x3", "2x2x2"]))
    placed = apply(program.module, mesh, random_choices(program.module, mesh, Random(seed)))
    verify(placed)
    noise = Generator().manual_seed(seed)
    got = evaluate(placed, program.inputs, ranks=True, noise=noise)
    assert_close(evaluate(program.module, program.inputs), got)
    assert parse_module(print_module(placed)) == placed


def test_the_random_pass_depends_on_its_seed_only() -> None:
    module = random_program(3).module
    assert RandomPlace(seed=1).run(module) == RandomPlace(seed=1).run(module)
    assert len({print_module(RandomPlace(seed=s).run(module)) for s in range(5)}) == 5


def test_random_choices_use_every_state_of_an_op() -> None:
    module = mlp()
    seen: set[str] = set()
    for seed in range(60):
        einsum = next(
            op for _, op in RandomPlace(seed=seed, mesh="2").run(module).walk()
            if op.name == "einsum"
        )  # fmt: skip
        seen.add(einsum.split.get("x", ""))
    assert seen == {"", "b", "k", "n", "partial(0)", "partial(1)"}


def test_sums_do_not_pass_where_dtypes_make_an_op_nonlinear() -> None:
    """Rounding to integers, and bools, do not add up."""
    b = Builder()
    x = b.param(TensorType("f64", (4,)), "x", role="input")
    y = b.one("cast", [x], types=[TensorType("i64", (4,))])
    truth = b.one("lt", [y, y])
    z = b.one("expand", [truth], types=[TensorType("bool", (2, 4))])
    module = Module("logical", (b.function("main", [z], [{"role": "output"}]),))
    for split in ([("partial(0)",)], [(), (), ("partial(0)",)]):
        with pytest.raises(CompileError, match="not linear"):
            apply(module, LINE, choose(split))


@pytest.mark.parametrize("text", ["", "2x", "axb", "0x2", "2x2x2x2x2"])
def test_a_malformed_mesh_is_reported(text: str) -> None:
    with pytest.raises(CompileError, match="is no mesh") as caught:
        RandomPlace(mesh=text).run(mlp())
    assert caught.value.code == "W0601"


def test_evaluation_on_ranks_is_sharp() -> None:
    """A dropped reduction is seen: partial values really are partial here."""
    placed = apply(mlp(), LINE, choose([("k",)], params=((S(1),), (S(0),))))
    kept = [op for op in placed.entry.ops if op.name != "reshard" or op.operands[0].name != "y"]
    (bridge,) = (op for op in reshards(placed) if op.operands[0].name == "y")
    entry = placed.entry.with_(
        ops=tuple(
            op.with_(operands=tuple(bridge.operands[0] if v == bridge.result else v
                                    for v in op.operands))
            for op in kept
        )
    )  # fmt: skip
    g = Generator().manual_seed(0)
    inputs = [torch.randn(4, 6, generator=g).double(), torch.randn(6, 8, generator=g).double()]
    with pytest.raises(RunError, match="copies of a .* differ"):
        evaluate(placed.with_(functions=(entry,)), inputs, ranks=True)


def test_what_a_stage_receives_is_resharded_for_each_micro_batch() -> None:
    """It is a parameter of the stage, but not one that stays the same over a step."""
    split = time_split(stack()[0], 2)
    piece = cut(split, [unit // 2 for unit in units_of(split).stage_of])[1]
    received = {t.value for t in piece.receives if t.phase in LOOP}
    mesh, found = Mesh((("x", 2),)), 0
    for seed in range(4):
        choices = random_choices(piece.module, mesh, Random(seed))
        choices = replace(choices, phases=piece.phases, repeated=True)
        placed, phases = apply_phased(piece.module, mesh, choices)
        assert phases is not None
        for op, phase in zip(placed.entry.ops, phases, strict=True):
            if op.name == "reshard" and op.operands[0].name in received:
                found += 1
                assert phase in LOOP
    assert found
