"""Lowering: any legal placement of any program computes what the logical program does."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest
import torch
from tests.passes.equality import assert_close, assert_equal_on_ranks, lowered, random_cost
from tests.passes.programs import random_program
from torch import Generator, Tensor

from weft.ir.builder import Builder
from weft.ir.errors import CompileError
from weft.ir.module import Module, Op, Value
from weft.ir.types import B, Mesh, P, S, TensorType
from weft.ir.verify import verify
from weft.passes.apply import Choices, FunctionChoices, apply
from weft.passes.lower import Lower, lower, module_cost
from weft.passes.random_place import RandomPlace, parse_mesh
from weft.passes.reshard import default_cost
from weft.runtime.interpreter import evaluate

MESHES = ("2", "3", "5", "8", "1x4", "2x2", "2x3", "3x2", "2x4", "4x2", "2x2x2")
#: 42 * 10 programs, each under 5 placements: 2,100 cases
BLOCKS, PROGRAMS, PLACEMENTS = 42, 10, 5


@pytest.mark.parametrize("block", range(BLOCKS))
def test_random_placements_of_random_programs_equal_the_logical_program(block: int) -> None:
    for number in range(block * PROGRAMS, (block + 1) * PROGRAMS):
        program = random_program(number)
        wanted = evaluate(program.module, program.inputs)
        for placement in range(PLACEMENTS):
            seed = number * PLACEMENTS + placement
            mesh = parse_mesh(Random(seed).choice(MESHES))
            assert_equal_on_ranks(program.module, program.inputs, wanted, mesh, seed)


def test_the_random_programs_reach_every_collective_and_every_fix_up() -> None:
    """The property above is worth what its programs contain."""
    seen: Counter[str] = Counter()
    for number in range(60):
        module = random_program(number).module
        placed = RandomPlace(seed=number, mesh="2x2").run(module)
        spmd = lower(placed, random_cost(Random(number)))
        for _, op in spmd.walk():
            seen[op.name] += 1
            seen.update(f"{op.name} {state}" for state in op.split.values())
    wanted = ["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "shard", "partial",
              "lse_combine", "attention t", "logsumexp n", "cross_entropy n", "call", "aten",
              "mul partial(0)", "einsum k", "einsum partial(1)", "embedding v"]  # fmt: skip
    assert [name for name in wanted if not seen[name]] == []
    assert len({name for name in seen if " " not in name}) >= 60


# reshards ----------------------------------------------------------------------------------------


def one_axis(ops: list[Op], params: list[Value], results: list[Value], size: int = 2) -> Module:
    builder = Builder()
    builder.params, builder.param_attrs = params, [{}] * len(params)
    builder.ops = ops
    function = builder.function("main", results, [{"role": "output"}] * len(results))
    return Module("placed", (function,), Mesh((("tp", size),)))


def held(name: str, shape: tuple[int, ...], *placement: object) -> Value:
    return Value(name, TensorType("f64", shape).placed(placement))  # type: ignore[arg-type]


def names(module: Module) -> list[str]:
    return [op.name for _, op in module.walk()]


def test_a_reshard_becomes_the_planned_collective() -> None:
    x, y = held("x", (4, 6), P()), held("y", (4, 6), S(1))
    spmd = lower(one_axis([Op("reshard", (x,), (y,))], [x], [y]))
    (op,) = spmd.entry.ops
    assert (op.name, dict(op.attrs)) == (
        "reduce_scatter", {"axis": "tp", "combine": "sum", "dim": 1}
    )  # fmt: skip
    assert op.result == y and spmd.level == "spmd"


def test_later_reshards_start_from_the_copies_of_earlier_ones() -> None:
    x, whole, part = held("x", (4, 6), P()), held("w", (4, 6), B), held("s", (4, 6), S(0))
    ops = [Op("reshard", (x,), (whole,)), Op("reshard", (x,), (part,))]
    assert names(lower(one_axis(ops, [x], [whole, part]))) == ["all_reduce", "shard"]


def test_a_reshard_to_a_placement_at_hand_vanishes() -> None:
    x, whole, back = held("x", (4, 6), S(0)), held("w", (4, 6), B), held("b", (4, 6), S(0))
    ops = [Op("reshard", (x,), (whole,)), Op("reshard", (whole,), (back,))]
    spmd = lower(one_axis(ops, [x], [whole, back]))
    assert names(spmd) == ["all_gather"]
    assert spmd.entry.results[1] == x
    verify(spmd)


def test_no_reshard_and_no_logical_name_is_lost() -> None:
    for number in range(20):
        module = random_program(number).module
        spmd = lower(RandomPlace(seed=number).run(module))
        assert "reshard" not in names(spmd)
        assert [len(f.results) for f in spmd.functions] == [
            len(f.results) for f in module.functions
        ]
        assert [p.name for p in spmd.entry.params] == [p.name for p in module.entry.params]


def test_lowering_is_deterministic() -> None:
    placed = RandomPlace(seed=5, mesh="2x2x2").run(random_program(7).module)
    assert lower(placed) == lower(placed)


def test_the_cluster_of_a_module_prices_its_collectives() -> None:
    module = Module("placed", (), Mesh((("x", 2), ("y", 2))), {"cluster": "2x2:h100"})
    cost = module_cost(module)
    across, inside = (cost("all_reduce", 1e8, 2, axis) for axis in "xy")
    assert across > inside > 0
    assert module_cost(module.with_(attrs={})) is default_cost
    assert module_cost(module.with_(mesh=Mesh((("x", 3),)))) is default_cost


def test_a_module_without_placements_is_rejected() -> None:
    x, y = Value("x", TensorType("f64", (4,))), Value("y", TensorType("f64", (4,)))
    with pytest.raises(CompileError, match="has no placement"):
        lower(one_axis([Op("reshard", (x,), (y,))], [x], [y]))


def test_the_pass_lowers() -> None:
    placed = RandomPlace(seed=1).run(random_program(1).module)
    assert Lower().run(placed) == lower(placed)


# log-sum-exp -------------------------------------------------------------------------------------


def attention(dtype: str, mask: bool, t: int = 7) -> tuple[Module, list[Tensor]]:
    """Attention with 4 heads in 2 groups; under a mask, row 1 sees nothing, row 2 only key 0."""
    b = Builder()
    q = b.param(TensorType(dtype, (2, 4, 5, 3)), "q", role="input")
    k, v = (b.param(TensorType(dtype, (2, 2, t, 3)), n, role="input") for n in "kv")
    operands = [q, k, v]
    if mask:
        operands.append(b.param(TensorType("bool", (1, 1, 5, t)), "m", role="input"))
    results = b.many("attention", operands, {"scale": 0.5, "mask": mask})
    module = Module("logical", (b.function("main", results, [{"role": "output"}] * 2),))
    g = Generator().manual_seed(0)
    inputs = [torch.randn(p.type.shape, generator=g, dtype=torch.float64) for p in (q, k, v)]
    if dtype == "bf16":
        inputs = [x.bfloat16() for x in inputs]
    if mask:
        seen = torch.ones(1, 1, 5, t, dtype=torch.bool)
        seen[..., 1, :] = False
        seen[..., 2, 1:] = False
        inputs.append(seen)
    return module, inputs


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize(
    ("mesh", "split"),
    [("2", "t"), ("7", "t"), ("2x3", "t,t"), ("2x2", "t,g"), ("2x2", "b,t"), ("2x2x2", "t,s,t"),
     ("1", "t"), ("1x2", "t,t")],
)  # fmt: skip
def test_attention_with_split_keys_is_mended(mesh: str, split: str, mask: bool) -> None:
    module, inputs = attention("f64", mask)
    choices = Choices({"main": FunctionChoices(splits=(tuple(split.split(",")),))})
    got = evaluate(lowered(module, parse_mesh(mesh), choices), inputs)
    wanted = evaluate(module, inputs)
    assert_close(wanted, got, 1e-13)
    if mask:
        assert (got[0][:, :, 1] == 0).all() and (got[1][:, :, 1] == -torch.inf).all()


def test_attention_in_bfloat16_is_mended_in_float32() -> None:
    module, inputs = attention("bf16", mask=False)
    spmd = lowered(module, parse_mesh("2"), Choices({"main": FunctionChoices((("t",),))}))
    got, wanted = evaluate(spmd, inputs), evaluate(module, inputs)
    assert got[0].dtype == torch.bfloat16 and got[1].dtype == torch.float32
    assert_close([w.float() for w in wanted], [x.float() for x in got], 0.02)
    assert [op.result.type.dtype for op in spmd.entry.ops if op.name == "mul"] == ["f32"]


def cross_entropy(ignore: int) -> tuple[Module, list[Tensor]]:
    b = Builder()
    x = b.param(TensorType("f64", (6, 7)), "x", role="input")
    labels = b.param(TensorType("i64", (6,)), "labels", role="input")
    results = b.many("cross_entropy", [x, labels], {"ignore_index": ignore})
    module = Module("logical", (b.function("main", results, [{"role": "output"}] * 2),))
    logits = torch.randn(6, 7, generator=Generator().manual_seed(1), dtype=torch.float64)
    logits[3, :5] = -torch.inf  # one rank sees nothing of this row
    return module, [logits, torch.tensor([0, ignore, 3, 6, ignore, 5])]


@pytest.mark.parametrize("ignore", [-100, 2])
@pytest.mark.parametrize(
    ("mesh", "split"),
    [("2", "n"), ("3", "n"), ("2x3", "n,n"), ("2x2", "n,a0"), ("2x2", "a0,n"), ("1", "n")],
)
def test_cross_entropy_over_a_split_vocabulary(mesh: str, split: str, ignore: int) -> None:
    module, inputs = cross_entropy(ignore)
    choices = Choices({"main": FunctionChoices((tuple(split.split(",")),))})
    spmd = lowered(module, parse_mesh(mesh), choices)
    wanted = evaluate(module, inputs)
    assert_close(wanted, evaluate(spmd, inputs), 1e-13)
    loss = evaluate(spmd, inputs)[0]
    assert (loss[[1, 4]] == 0).all()  # exactly: a mean divides by the number of other rows


def test_cross_entropy_in_bfloat16_is_added_up_in_float32() -> None:
    """Logit and log-sum-exp are near 40, the loss is near 0.1: rounding them would lose it."""
    b = Builder()
    x = b.param(TensorType("bf16", (6, 8)), "x", role="input")
    labels = b.param(TensorType("i64", (6,)), "labels", role="input")
    results = b.many("cross_entropy", [x, labels])
    module = Module("logical", (b.function("main", results, [{"role": "output"}] * 2),))
    logits = torch.full((6, 8), 36.0)
    target = torch.arange(6)
    logits[target, target] = 40.0
    spmd = lowered(module, parse_mesh("2x2"), Choices({"main": FunctionChoices((("n", "n"),))}))
    loss, _ = evaluate(spmd, [logits.bfloat16(), target])
    exact = torch.nn.functional.cross_entropy(logits.double(), target, reduction="none")
    assert loss.dtype == torch.bfloat16
    assert torch.allclose(loss.double(), exact, rtol=2**-8, atol=0.0)


def test_the_loss_over_a_split_vocabulary_is_a_sum_that_can_wait() -> None:
    """Its mean is reduced as one number, not row by row."""
    b = Builder()
    x = b.param(TensorType("f64", (6, 8)), "x", role="input")
    labels = b.param(TensorType("i64", (6,)), "labels", role="input")
    loss, _ = b.many("cross_entropy", [x, labels])
    total = b.one("reduce_sum", [loss], {"dims": (0,)})
    module = Module("logical", (b.function("main", [total], [{"role": "loss"}]),))
    splits = (("n",), ("partial(0)",))
    choices = Choices({"main": FunctionChoices(splits, params=((S(1),), (B,)))})
    spmd = lowered(module, parse_mesh("2"), choices)
    reduced = [op for op in spmd.entry.ops if op.name == "all_reduce"]
    assert [op.result.type.shape for op in reduced] == [()]
    logits = torch.randn(6, 8, generator=Generator().manual_seed(2), dtype=torch.float64)
    inputs = [logits, torch.tensor([0, 1, 7, -100, 4, 5])]
    assert_close(evaluate(module, inputs), evaluate(spmd, inputs), 1e-13)


def test_logsumexp_of_rows_that_are_minus_infinity() -> None:
    b = Builder()
    x = b.param(TensorType("f64", (3, 4)), "x", role="input")
    y = b.one("logsumexp", [x])
    module = Module("logical", (b.function("main", [y], [{"role": "output"}]),))
    value = torch.tensor([[-torch.inf] * 4, [-torch.inf, -torch.inf, 1.0, 2.0], [0.0] * 4]).double()
    spmd = lowered(module, parse_mesh("2"), Choices({"main": FunctionChoices((("n",),))}))
    assert names(spmd).count("lse_combine") == 1
    assert_close(evaluate(module, [value]), evaluate(spmd, [value]), 1e-14)


def test_an_axis_of_one_rank_needs_no_fix_up() -> None:
    module, _ = attention("f64", mask=False)
    spmd = lower(apply(module, parse_mesh("1"), Choices({"main": FunctionChoices((("t",),))})))
    assert "lse_combine" not in names(spmd)
