"""Blocks that are computed again: same results, less held between forward and backward."""

from __future__ import annotations

import torch
from tests.passes.search_models import stack

from weft.ir.verify import verify
from weft.passes.micro import time_split
from weft.passes.recompute import recomputed
from weft.passes.search_units import units_of
from weft.passes.stages import cut
from weft.runtime.interpreter import evaluate


def test_results_are_the_same_to_the_bit() -> None:
    module, tensors = stack()
    split = time_split(module, 1)
    units = units_of(split)
    again = recomputed(split, units, range(units.count))
    verify(again)
    wanted, got = evaluate(split.module, tensors), evaluate(again, tensors)
    for one, two in zip(wanted, got, strict=True):
        torch.testing.assert_close(two, one, rtol=0, atol=0)


def test_a_block_computed_again_belongs_to_its_own_stage() -> None:
    """The copy is part of the backward pass of its unit, and what was saved is not sent there."""
    module, _ = stack()
    split = time_split(module, 2)
    units = units_of(split)
    again = time_split(recomputed(split, units, range(units.count)), 2)
    same = units_of(again)
    assert same.names == units.names and same.edges == units.edges
    copies = [
        (op, unit, phase)
        for op, unit, phase in zip(again.module.entry.ops, same.stage_of, again.phases, strict=True)
        if op.name == "call" and op.results[0].name.endswith("_again")
    ]
    assert copies and all(phase == "backward" for _, _, phase in copies)
    assert len({unit for _, unit, _ in copies}) == len(copies)
    middle = units.count // 2
    parts = [-1 if unit < 0 else int(unit >= middle) for unit in same.stage_of]
    first, second = cut(again, parts)
    assert len(first.sends) == 1 and len(second.sends) == 1
