"""The reshard planner: every placement reaches every other, rightly and at the least cost."""

from __future__ import annotations

from itertools import product
from math import isclose
from random import Random

import pytest
import torch
from torch import Tensor

from weft.ir.errors import CompileError
from weft.ir.module import Op, Value
from weft.ir.types import B, Mesh, P, S, TensorType, local_shape
from weft.passes.reshard import (
    Placements,
    Step,
    _local_bytes,
    _partial_axes,
    _steps,
    default_cost,
    legal_placements,
    plan_from,
    plan_reshard,
    reshard_cost_us,
    reshard_table_us,
)
from weft.runtime.collectives import run_collective
from weft.runtime.shards import gather, scatter

LINE, GRID = Mesh((("x", 3),)), Mesh((("x", 2), ("y", 3)))
CUBE = Mesh((("x", 2), ("y", 2), ("z", 2)))


def run_steps(
    values: list[Tensor], type: TensorType, mesh: Mesh, source: Placements, steps: tuple[Step, ...]
) -> list[Tensor]:
    """Run a plan on the shards of all ranks; checks that each step's type fits its shards."""
    held = source
    for step in steps:
        changed = [n for n, a, b in zip(mesh.names, held, step.placement, strict=True) if a != b]
        assert changed == [step.axis] == [step.attrs["axis"]]
        operand = Value("a", type.placed(held))
        result = Value("b", type.placed(step.placement))
        values = run_collective(Op(step.op, (operand,), (result,), step.attrs), values, mesh)
        for coord, shard in zip(mesh.coords(), values, strict=True):
            assert tuple(shard.shape) == local_shape(result.type, mesh, coord)
        held = step.placement
    return values


@pytest.mark.parametrize(
    ("mesh", "shape", "combines"),
    [
        (LINE, (7, 3), ("sum", "max", "min")),
        (GRID, (6, 12), ("sum", "max")),
        (GRID, (7, 11), ("sum",)),
        (GRID, (5, 8, 2), ("sum",)),
        (CUBE, (9, 3), ("sum",)),
    ],
)
def test_every_placement_reaches_every_other(
    mesh: Mesh, shape: tuple[int, ...], combines: tuple[str, ...]
) -> None:
    type = TensorType("f64", shape)
    noise = torch.Generator().manual_seed(0)
    whole = torch.randn(shape, generator=noise, dtype=torch.float64)
    states = legal_placements(type, mesh, combines)
    for source in states:
        shards = scatter(whole, type.placed(source), mesh, noise=noise)
        for target in states:
            steps = plan_reshard(type, mesh, source, target)
            values = run_steps(shards, type, mesh, source, steps)
            assert torch.allclose(gather(values, type.placed(target), mesh, check=True), whole)
            if not any(p.kind == "P" for p in target):
                wanted = scatter(whole, type.placed(target), mesh)
                assert all(map(torch.allclose, values, wanted))


def test_whole_and_equal_placements_need_no_step() -> None:
    type = TensorType("f32", (8, 8))
    for state in legal_placements(type, GRID):
        assert plan_reshard(type, GRID, state, state) == ()
        assert reshard_cost_us(type, GRID, state, state) == 0


@pytest.mark.parametrize(
    ("source", "target", "names"),
    [
        ((P(), B), (B, B), ["all_reduce"]),
        ((P(), B), (S(1), B), ["reduce_scatter"]),
        ((S(0), B), (B, B), ["all_gather"]),
        ((S(0), B), (S(1), B), ["all_to_all"]),
        ((B, B), (S(0), S(0)), ["shard", "shard"]),
        ((B, B), (P(), B), ["partial"]),
        ((S(0), B), (P(), B), ["partial"]),
        # the inner axis has to be gathered before the outer one
        ((S(0), S(0)), (B, B), ["all_gather", "all_gather"]),
        # an inner split stays out of the way of an outer one
        ((S(0), S(1)), (B, S(1)), ["all_gather"]),
    ],
)
def test_simple_changes_take_the_textbook_collective(
    source: Placements, target: Placements, names: list[str]
) -> None:
    steps = plan_reshard(TensorType("f32", (1024, 1024)), GRID, source, target)
    assert [step.op for step in steps] == names


def test_the_outer_axis_of_a_nested_split_is_not_gathered_directly() -> None:
    steps = plan_reshard(TensorType("f32", (16384, 16384)), GRID, (S(0), S(0)), (B, S(0)))
    assert [(step.op, step.axis) for step in steps] == [
        ("all_to_all", "y"),  # moved out of the way, which is cheaper than gathering it
        ("all_gather", "x"),
        ("all_to_all", "y"),
    ]


def brute_force(
    type: TensorType, mesh: Mesh, source: Placements, target: Placements, depth: int
) -> float:
    """The cheapest path of at most `depth` steps, by trying all."""
    if source == target:
        return 0.0
    if depth == 0:
        return float("inf")
    best = float("inf")
    bytes_in = _local_bytes(type, mesh.sizes, source)
    for axis, step in _steps(type.dtype, type.shape, mesh, source, _partial_axes(target)):
        time_us = default_cost(step.op, bytes_in, mesh.sizes[axis], step.axis)
        rest = brute_force(type, mesh, step.placement, target, depth - 1)
        best = min(best, time_us + rest)
    return best


@pytest.mark.parametrize("shape", [(4096, 6), (64, 64)])
def test_plans_are_the_cheapest_of_all_short_paths(shape: tuple[int, ...]) -> None:
    type = TensorType("f32", shape)
    states = legal_placements(type, GRID)
    for source, target in Random(0).sample(list(product(states, states)), 40):
        cost = reshard_cost_us(type, GRID, source, target)
        assert cost <= brute_force(type, GRID, source, target, 4) + 1e-9


@pytest.mark.parametrize(("mesh", "shape"), [(GRID, (70, 11)), (CUBE, (16, 8))])
def test_the_table_holds_the_same_costs_as_single_searches(
    mesh: Mesh, shape: tuple[int, ...]
) -> None:
    type = TensorType("bf16", shape)
    states = legal_placements(type, mesh)
    table = reshard_table_us(type, mesh, states, states)
    for i, source in enumerate(states):
        for j, target in enumerate(states):
            assert isclose(table[i, j], reshard_cost_us(type, mesh, source, target), abs_tol=1e-9)


def test_the_table_gives_infinity_for_illegal_placements() -> None:
    type = TensorType("f32", (2, 4))
    table = reshard_table_us(type, LINE, [(B,), (S(0),)], [(S(0),), (S(1),)])
    assert table[0, 0] == table[1, 0] == table[1, 1] == float("inf")
    assert table[0, 1] == 0


def test_costs_grow_with_size_and_obey_the_triangle_inequality() -> None:
    small, large = TensorType("f32", (64, 64)), TensorType("f32", (512, 512))
    states = legal_placements(small, GRID)
    a, b = (reshard_table_us(t, GRID, states, states) for t in (small, large))
    assert (a <= b + 1e-9).all()
    to_sum = [any(p.kind == "P" for p in s) for s in states]
    for k, partial in enumerate(to_sum):
        if not partial:
            assert (b <= b[:, k : k + 1] + b[k : k + 1, :] + 1e-9).all()


def test_of_several_copies_the_cheapest_start_is_taken() -> None:
    type = TensorType("f32", (1024, 1024))
    start, steps, time_us = plan_from(type, GRID, ((P(), B), (B, B)), (S(0), B))
    assert (start, [step.op for step in steps], time_us) == (1, ["shard"], 0.0)


def test_a_mesh_of_one_rank_costs_nothing() -> None:
    mesh = Mesh((("x", 1),))
    type = TensorType("f32", (4,))
    states = legal_placements(type, mesh)
    assert (reshard_table_us(type, mesh, states, states) == 0).all()
    assert plan_reshard(type, Mesh(), (), ()) == ()


@pytest.mark.parametrize(
    ("type", "placement", "reason"),
    [
        (TensorType("f32", (2, 4)), (S(0), S(0)), "cannot be cut into 6 parts"),
        (TensorType("f32", (8,)), (S(1), B), "there is no dim 1"),
        (TensorType("f32", (8,)), (B,), "1 placements for 2 axes"),
        (TensorType("f32", (8,)), (P("sum"), P("max")), "partial in max and sum at once"),
        (TensorType("bool", (8,)), (P("sum"), B), "a bool tensor cannot be a sum"),
    ],
)
def test_an_illegal_placement_is_reported(
    type: TensorType, placement: Placements, reason: str
) -> None:
    with pytest.raises(CompileError, match=reason) as caught:
        plan_reshard(type, GRID, (B, B), placement)
    assert caught.value.code == "W0402"
