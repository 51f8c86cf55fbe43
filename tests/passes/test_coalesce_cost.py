"""What joined collectives cost: search, price and lowering know that small ones will be joined."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from tests.passes.equality import assert_close
from tests.passes.place_programs import Entry, ein, f32, mlp_step

from weft.costmodel.cluster import meshes, parse_cluster
from weft.ir.builder import Builder
from weft.ir.module import Function, Module, Op, Value
from weft.passes.coalesce import Coalesce
from weft.passes.joined import STARTUPS, bucket_bytes, joined_cost, joins, updates_last
from weft.passes.lower import lower
from weft.passes.place import search_mesh
from weft.runtime.interpreter import evaluate

SLOW = parse_cluster("2x1:cpu")


def line(name: str, size: float, ranks: int, axis: str) -> float:
    """A start-up of 10 us and a byte per ns."""
    return 10.0 + size / 1000


@pytest.mark.parametrize("name", list(STARTUPS))
def test_members_that_fill_a_bucket_cost_together_what_the_bucket_does(name: str) -> None:
    limit = bucket_bytes(line, name, 2, "dp")
    whole = int(limit / 8) * (2 if name == "all_gather" else 1)
    joined = joined_cost(line, (whole,) * 100)
    assert 8 * joined(name, limit / 8, 2, "dp") == pytest.approx(limit / 1000 + 10.0, rel=1e-3)


def test_a_few_small_members_bear_one_start_up_together() -> None:
    joined = joined_cost(line, (400, 600))
    both = joined("all_reduce", 400, 2, "dp") + joined("all_reduce", 600, 2, "dp")
    assert both == pytest.approx(10.0 + 1.0, rel=1e-3)


def test_no_collective_is_better_than_free() -> None:
    """Else paths of steps would grow without end."""
    joined = joined_cost(line, (10**4,) * 1000)
    assert all(joined(name, size, 2, "dp") > 0 for name in STARTUPS for size in (1, 2, 4, 100))


def test_what_is_large_or_alone_pays_its_own_start_up() -> None:
    joined = joined_cost(line, (100,))
    for size in (100, 1e6):
        assert joined("all_reduce", size, 2, "dp") == line("all_reduce", size, 2, "dp")
    assert joined("all_to_all", 4, 2, "dp") == line("all_to_all", 4, 2, "dp")


def deep_step(layers: int, batch: int, width: int) -> Module:
    """tanh(x w) `layers` times; the update of a layer stands right behind its backward."""
    e = Entry()
    b = e.b
    x = b.param(f32(batch, width), "x", role="input", name="x")
    weights = [e.weight(f"w{i}", width, width) for i in range(layers)]
    values = [x]
    for weight in weights:
        values.append(b.one("tanh", [ein(b, "b k, k n -> b n", values[-1], weight)]))
    loss = b.one("reduce_sum", [b.one("mul", [values[-1], values[-1]])], {"dims": (0, 1)})
    grad = values[-1]
    for number in reversed(range(layers)):
        weight, inside = weights[number], values[number]
        dw = ein(b, "b k, b n -> k n", inside, grad)
        grad = ein(b, "b n, k n -> b k", grad, weight)
        e.adamw(weight, dw)
    return e.module(loss)


def test_gradients_are_joined_though_their_updates_stand_between_them() -> None:
    module = deep_step(4, 8, 8)
    found, makers = joins(module), module.entry.defs()
    gradients = {op.operands[1].name for op in module.entry.ops if op.name == "adamw_update"}
    assert len(gradients) == 4 and gradients <= set(found.sizes)
    activations = {name for name, op in makers.items() if op.name == "tanh"}
    assert not activations & set(found.sizes)
    assert [op.name for op in updates_last(module)][-4:] == ["adamw_update"] * 4


def clipped_step(width: int) -> Module:
    """Two gradients, scaled by their common norm before the updates."""
    e = Entry()
    b = e.b
    x = b.param(f32(64, width), "x", role="input", name="x")
    weights = [e.weight(name, width, width) for name in ("w", "v")]
    grads = []
    for weight in weights:
        y = ein(b, "b k, k n -> b n", x, weight)
        grads.append(ein(b, "b k, b n -> k n", x, y))
    norms = [b.one("reduce_sum", [b.one("mul", [g, g])], {"dims": (0, 1)}) for g in grads]
    scale = b.one("rsqrt", [b.one("add", norms)])
    for weight, grad in zip(weights, grads, strict=True):
        e.adamw(weight, b.one("mul", [grad, scale]))
    return e.module(scale)


def test_gradients_that_are_clipped_are_joined_ahead_of_their_norm() -> None:
    module = clipped_step(8)
    gradients = [op.result.name for op in module.entry.ops if op.attrs.get("spec") == "b k, b n -> k n"]
    assert set(gradients) <= set(joins(module).sizes)
    squares = [op.result.name for op in module.entry.ops if op.name == "mul"][:2]
    assert not set(squares) & set(joins(module).sizes)


def test_an_activation_that_is_alone_is_not_cheaper() -> None:
    """Small parameters are no company for what a forward pass moves."""
    e = Entry()
    x, w = e.b.param(f32(64, 512), "x", role="input", name="x"), e.weight("w", 512, 512)
    bias = e.weight("bias", 512)
    module = e.module(e.b.one("add", [ein(e.b, "b k, k n -> b n", x, w), bias]))
    for op in module.entry.ops[:2]:
        cost = joins(module).cost(op.result.name, line)
        assert cost("all_reduce", 65536, 2, "dp") == line("all_reduce", 65536, 2, "dp")


def called(module: Module) -> Module:
    """The same program with each update in a function of its own, as outlining leaves it."""
    ops, callees = [], []
    for op in module.entry.ops:
        if op.name == "adamw_update":
            b = Builder()
            inside = [b.param(v.type, f"p{i}") for i, v in enumerate(op.operands)]
            results: list[Value] = list(b.many(op.name, inside, op.attrs))
            callees.append(b.function(f"update{len(callees)}", results))
            op = Op("call", op.operands, op.results, {"callee": callees[-1].name}, {}, op.loc)
        ops.append(op)
    functions: list[Function] = [module.entry.with_(ops=tuple(ops)), *callees]
    return module.with_(functions=tuple(functions))


@pytest.mark.parametrize("outlined", [False, True])
def test_many_small_gradients_do_not_keep_the_search_from_data_parallelism(outlined: bool) -> None:
    """Apart they would pay 12 start-ups of 2 ms, so that another plan would be faster."""
    module = deep_step(12, 4096, 64)
    module = called(module) if outlined else module
    found = search_mesh(module, meshes(SLOW)[0], SLOW)
    assert found is not None
    einsums = [op.split for _, op in found.placed.walk() if op.name == "einsum"]
    assert all(split == {"host": "b"} for split in einsums)
    spmd = Coalesce().run(lower(found.placed.with_(attrs={"cluster": "2x1:cpu"})))
    reductions = Counter(op.name for _, op in spmd.walk() if op.name in STARTUPS)
    assert sum(reductions.values()) <= 2, reductions


def test_a_searched_plan_with_joined_collectives_computes_what_the_program_does() -> None:
    module = called(deep_step(3, 8, 8))
    found = search_mesh(module, meshes(SLOW)[0], SLOW)
    assert found is not None
    dtypes = {"f32": torch.float32, "f64": torch.float64}
    inputs = [torch.rand(v.type.shape, dtype=dtypes[v.type.dtype]) for v in module.entry.params]
    spmd = Coalesce().run(lower(found.placed))
    assert_close(evaluate(module, inputs), evaluate(spmd, inputs), tolerance=1e-4)


def test_large_layers_keep_gradients_apart() -> None:
    module = mlp_step(1 << 14, 2048, 2048)
    cluster = parse_cluster("1x4:h100")
    found = search_mesh(module, meshes(cluster)[0], cluster)
    assert found is not None
    before = lower(found.placed.with_(attrs={"cluster": "1x4:h100"}))
    after = Coalesce().run(before)
    names = [Counter(op.name for op in m.entry.ops if op.name in STARTUPS) for m in (before, after)]
    assert names[0] == names[1]
