"""Every state of every op, proved numerically: cut, run per shard, combine, compare."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product

import pytest
import torch
from tests.runtime.examples import CASES, EXAMPLES, WITHOUT_EXAMPLE, Case
from torch import Tensor

from weft.ir.module import Op, Value
from weft.ir.opdef import OPS, full_attrs, signature_of
from weft.ir.types import Mesh, TensorType, local_shape
from weft.runtime.context import TORCH_DTYPES, OpContext, results_of
from weft.runtime.lse import complete_lse
from weft.runtime.shards import gather, scatter

ONE_AXIS = (Mesh((("x", 2),)), Mesh((("x", 3),)))
TWO_AXES = (Mesh((("x", 2), ("y", 2))), Mesh((("x", 2), ("y", 3))), Mesh((("x", 3), ("y", 2))))


def test_every_op_with_a_signature_has_an_example() -> None:
    assert set(EXAMPLES) | WITHOUT_EXAMPLE == set(OPS)
    assert not set(EXAMPLES) & WITHOUT_EXAMPLE
    assert all(OPS[name].signature is None for name in WITHOUT_EXAMPLE)


def run_whole(case: Case, values: Sequence[Tensor]) -> tuple[Tensor, ...]:
    op = case.op
    return results_of(op, OPS[op.name].ref(OpContext(op), *values))


def run_split(
    case: Case, values: Sequence[Tensor], mesh: Mesh, states: Sequence[str]
) -> tuple[list[list[Tensor]], Op]:
    """Results of all ranks, per rank, under a split; and the placed op."""
    op = case.op
    ins, outs = signature_of(op).placements(states)
    split = {axis: state for axis, state in zip(mesh.names, states, strict=True) if state}
    op = op.with_(
        split=split,
        operands=tuple(Value(v.name, v.type.placed(p)) for v, p in zip(op.operands, ins)),
        results=tuple(Value(v.name, v.type.placed(p)) for v, p in zip(op.results, outs)),
    )
    noise = torch.Generator().manual_seed(1)
    shards = [
        scatter(tensor, value.type, mesh, noise=noise)
        for tensor, value in zip(values, op.operands, strict=True)
    ]
    rows, inputs = [], []
    for rank, coord in enumerate(mesh.coords()):
        inputs.append([ranks[rank] for ranks in shards])
        context = OpContext(op, mesh, coord)
        rows.append(results_of(op, OPS[op.name].ref(context, *inputs[-1])))
        for i, tensor in enumerate(rows[-1]):
            assert context.shape(i) == tuple(tensor.shape)
    return complete_lse(op, inputs, rows, mesh), op


def assert_close(whole: Tensor, other: Tensor, what: object) -> None:
    assert whole.dtype == other.dtype and whole.shape == other.shape, what
    if not whole.dtype.is_floating_point:
        assert torch.equal(whole, other), what
    else:
        tolerance = 1e-11 if whole.dtype == torch.float64 else 1e-5
        torch.testing.assert_close(other, whole, rtol=tolerance, atol=tolerance, equal_nan=True,
                                   msg=lambda text: f"{what}: {text}")  # fmt: skip


def assert_split_equals_whole(case: Case, mesh: Mesh, states: Sequence[str]) -> None:
    values = case.values()
    whole = run_whole(case, values)
    rows, op = run_split(case, values, mesh, states)
    for i, value in enumerate(op.results):
        for coord, row in zip(mesh.coords(), rows, strict=True):
            assert tuple(row[i].shape) == local_shape(value.type, mesh, coord), (states, i)
        joined = gather([row[i] for row in rows], value.type, mesh, check=True)
        assert_close(whole[i], joined, (str(case), states, i))


def legal(case: Case, mesh: Mesh) -> Iterator[tuple[str, ...]]:
    signature = signature_of(case.op)
    for states in product(("", *signature.states), repeat=len(mesh.axes)):
        if any(states) and not signature.check(states, mesh.sizes):
            yield states


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_gives_the_declared_types(case: Case) -> None:
    for tensor, value in zip(run_whole(case, case.values()), case.op.results, strict=True):
        assert tuple(tensor.shape) == value.type.shape
        assert tensor.dtype == TORCH_DTYPES[value.type.dtype]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_each_state_of_one_axis_equals_the_whole(case: Case) -> None:
    for mesh in ONE_AXIS:
        for states in legal(case, mesh):
            assert_split_equals_whole(case, mesh, states)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_sampled_states_of_two_axes_equal_the_whole(case: Case) -> None:
    rng = random.Random(str(case))
    for mesh in TWO_AXES:
        choices = list(legal(case, mesh))
        for states in rng.sample(choices, min(6, len(choices))):
            assert_split_equals_whole(case, mesh, states)


def test_random_numbers_have_the_right_moments() -> None:
    op = next(case for case in EXAMPLES["normal"]).op
    big = Value("y", op.result.type.__class__("f64", (400, 500)))
    seed = torch.tensor(5)
    for name, mean, variance in (("normal", 0.0, 1.0), ("uniform", 0.5, 1 / 12)):
        numbers = OPS[name].ref(OpContext(Op(name, op.operands, (big,))), seed)
        # 200,000 samples: the mean is within 5 standard errors
        assert abs(numbers.mean() - mean) < 5 * (variance / numbers.numel()) ** 0.5
        assert abs(numbers.var() / variance - 1) < 0.02


#: operands that stay at float32 where the others are bfloat16
WIDE = {"attention_backward": {5}, "layer_norm_backward": {3, 4}, "rms_norm_backward": {3},
        "cross_entropy_backward": {3}}  # fmt: skip
#: ops whose results jump, or that are not the same op on floats of another width
JUMPY = frozenset({
    "sign", "floor", "ceil", "round", "floor_divide", "remainder", "eq", "ne", "lt", "le", "gt",
    "ge", "argmax", "sort", "topk", "isfinite", "uniform", "normal", "cast", "constant", "literal",
    "relu_backward", "reduce_prod",
})  # fmt: skip


def in_bf16(case: Case) -> Case:
    operands = []
    for i, (shape, dtype, fill) in enumerate(case.operands):
        scalar = OPS[case.name].family == "optimizer" and not shape
        if dtype == "f64" and not scalar:
            dtype = "f32" if i in WIDE.get(case.name, ()) else "bf16"
        operands.append((shape, dtype, fill))
    rule = OPS[case.name].types
    wanted = [TensorType("bf16", t.shape) for t in case.results]
    if rule is not None:
        types = [TensorType(d, s) for s, d, _ in operands]
        wanted = list(rule(types, full_attrs(case.name, case.attrs)))
    results = [w if t.dtype == "f64" else t for w, t in zip(wanted, case.results, strict=True)]
    return replace(case, operands=tuple(operands), results=tuple(results))


@pytest.mark.parametrize("case", [c for c in CASES if c.name not in JUMPY], ids=str)
def test_bf16_has_the_declared_dtypes_and_is_near_float64(case: Case) -> None:
    narrow = in_bf16(case)
    values = narrow.values()
    exact = run_whole(case, [
        v.to(TORCH_DTYPES[d]) for v, (_, d, _) in zip(values, case.operands, strict=True)
    ])  # fmt: skip
    found = run_whole(narrow, values)
    for mine, value, theirs in zip(found, narrow.op.results, exact, strict=True):
        assert mine.dtype == TORCH_DTYPES[value.type.dtype]
        mine, theirs = mine.double(), theirs.double()
        scale = float(theirs[theirs.isfinite()].abs().max()) if theirs.isfinite().any() else 1.0
        torch.testing.assert_close(mine, theirs, rtol=0, atol=2**-6 * scale, equal_nan=True)


def test_uniform_numbers_stay_below_one_in_any_dtype() -> None:
    for dtype in ("f32", "bf16", "f16"):
        seed = Value("s", TensorType("i64", ()))
        op = Op("uniform", (seed,), (Value("y", TensorType(dtype, (300, 300))),))
        numbers = OPS["uniform"].ref(OpContext(op), torch.tensor(1))
        assert numbers.max() < 1 and numbers.min() >= 0
        assert abs(numbers.double().mean() - 0.5) < 0.01
