"""Schedules of stages: checked for deadlocks, run on all ranks, equal to the whole program."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle, pairwise
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.passes.pipeline_models import STEPS, logical
from tests.passes.test_stages import random_stages
from torch import Tensor

from weft.ir.crossing import crosses
from weft.ir.module import Module
from weft.ir.parser import parse_module
from weft.ir.stage_ranks import StageRanks
from weft.ir.text import print_module
from weft.ir.types import Mesh
from weft.ir.verify import verify
from weft.passes.apply import Choices, apply
from weft.passes.micro import TimeSplit, time_split
from weft.passes.orders import orders_of
from weft.passes.random_place import parse_mesh, random_choices
from weft.passes.reshard import legal_placements
from weft.passes.stage_schedule import schedule_stages
from weft.passes.stages import cut
from weft.runtime.interpreter import evaluate
from weft.runtime.lockstep_stages import evaluate_stages, whole_name
from weft.runtime.schedule_check import check


def scheduled(
    split: TimeSplit, parts: Sequence[int], meshes: Sequence[Mesh], order: str, rng: Random
) -> tuple[Module, ...]:
    """The schedules under random placements on a mesh for each stage, each verified, all checked
    together."""
    pieces, stages = cut(split, parts), len(meshes)
    placed = [
        apply(piece.module, mesh, random_stage(piece.module, mesh, rng))
        for piece, mesh in zip(pieces, cycle(meshes))
    ]
    for module in placed:
        verify(module)
    orders = orders_of(order, stages, split.count, len(pieces) // stages)
    modules = schedule_stages(split, parts, placed, orders)
    for module in modules:
        verify(module)
    ranks = StageRanks.of(meshes)
    check({r: modules[ranks.stage(r)].entry for r in range(ranks.size)}, meshes)
    assert [parse_module(print_module(module)) for module in modules] == list(modules)
    return modules


def random_stage(module: Module, mesh: Mesh, rng: Random) -> Choices:
    """Random choices in which what a stage sends is placed at random too, partial sums included."""
    choices = random_choices(module, mesh, rng)
    entry = module.entry
    results = tuple(
        rng.choice(legal_placements(value.type, mesh, ("sum",))) if attrs["role"] == "sent" else ()
        for value, attrs in zip(entry.results, entry.result_attrs, strict=True)
    )
    function = replace(choices.functions[entry.name], results=results)
    return replace(choices, functions={**choices.functions, entry.name: function})


def assert_equal(module: Module, tensors: Sequence[Tensor], modules: Sequence[Module]) -> None:
    """Do the stages compute what the whole logical program does?"""
    entry = module.entry
    names = {v.name: whole_name(a) for v, a in zip(entry.params, entry.param_attrs, strict=True)}
    given = {names[v.name]: t for v, t in zip(entry.params, tensors, strict=True)}
    wanted = evaluate(module, tensors)
    noise = torch.Generator().manual_seed(1)
    results, updates = evaluate_stages(modules, given, noise=noise)
    for number, (attrs, tensor) in enumerate(zip(entry.result_attrs, wanted, strict=True)):
        got = updates[names[str(attrs["updates"])]] if "updates" in attrs else results[number]
        torch.testing.assert_close(got, tensor, rtol=1e-8, atol=1e-9)


#: (schedule, stages, chunks of a stage, micro-batches, mesh of a stage)
SETTINGS = [
    ("gpipe", 2, 1, 3, ""), ("1f1b", 3, 1, 4, "2"), ("interleaved", 2, 2, 2, "2"),
    ("1f1b", 2, 1, 1, "2x2"), ("interleaved", 2, 2, 5, ""), ("1f1b", 1, 1, 3, "2"),
]  # fmt: skip
NAMES = sorted(STEPS)


@pytest.mark.parametrize(
    ("name", "order", "stages", "chunks", "micro", "mesh"),
    [(NAMES[(i + 3 * j) % len(NAMES)], *row) for i, row in enumerate(SETTINGS) for j in range(2)],
)
def test_pipelines_train_as_the_whole(
    name: str, order: str, stages: int, chunks: int, micro: int, mesh: str
) -> None:
    rng = Random(f"{name} {order} {micro}")
    module, tensors = logical(STEPS[name])
    split = time_split(module, micro)
    parts = random_stages(split, stages * chunks, rng)
    grid = parse_mesh(mesh) if mesh else Mesh()
    assert_equal(module, tensors, scheduled(split, parts, [grid] * stages, order, rng))


@settings(max_examples=8, deadline=None)
@given(
    name=st.sampled_from(NAMES), seed=st.integers(0, 1 << 30), micro=st.integers(1, 4),
    order=st.sampled_from([("gpipe", 1), ("1f1b", 1), ("interleaved", 2)]),
    meshes=st.lists(st.sampled_from(["", "2", "3", "4", "2x2", "3x2"]), min_size=2, max_size=3),
)  # fmt: skip
def test_stages_on_meshes_of_any_shape_train_as_the_whole(
    name: str, seed: int, micro: int, order: tuple[str, int], meshes: list[str]
) -> None:
    rng, (kind, chunks) = Random(seed), order
    module, tensors = logical(STEPS[name])
    split = time_split(module, micro)
    parts = random_stages(split, len(meshes) * chunks, rng)
    grids = [parse_mesh(mesh) if mesh else Mesh() for mesh in meshes]
    modules = scheduled(split, parts, grids, kind, rng)
    assert_equal(module, tensors, modules)
    for one, two in pairwise(range(len(grids))):
        sends = [op for op in modules[one].entry.ops if op.name == "send" and op.attrs["to"] == two]
        assert all(crosses(op) == (grids[one].sizes != grids[two].sizes) for op in sends)
