"""Schedules of stages: checked for deadlocks, run on all ranks, equal to the whole program."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import pytest
import torch
from tests.passes.pipeline_models import STEPS, logical
from tests.passes.test_stages import random_stages
from torch import Tensor

from weft.ir.module import Module
from weft.ir.types import Mesh
from weft.ir.verify import verify
from weft.passes.apply import apply
from weft.passes.micro import TimeSplit, time_split
from weft.passes.orders import orders_of
from weft.passes.random_place import parse_mesh, random_choices
from weft.passes.stage_schedule import schedule_stages
from weft.passes.stages import cut
from weft.runtime.interpreter import evaluate
from weft.runtime.lockstep_stages import evaluate_stages, whole_name
from weft.runtime.schedule_check import check


def scheduled(
    split: TimeSplit, parts: Sequence[int], mesh: Mesh, order: str, stages: int, rng: Random
) -> tuple[Module, ...]:
    """The schedules under random placements, each verified, all checked together."""
    pieces = cut(split, parts)
    placed = [
        apply(piece.module, mesh, random_choices(piece.module, mesh, rng)) for piece in pieces
    ]
    for module in placed:
        verify(module)
    orders = orders_of(order, stages, split.count, len(pieces) // stages)
    modules = schedule_stages(split, parts, placed, orders)
    for module in modules:
        verify(module)
    check({r: modules[r // mesh.size].entry for r in range(stages * mesh.size)}, mesh)
    return modules


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
    assert_equal(module, tensors, scheduled(split, parts, grid, order, stages, rng))
