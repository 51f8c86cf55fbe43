"""Placements carried to other sizes: legal, equal on all ranks, and as good as the search's."""

from __future__ import annotations

from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.passes.equality import assert_close
from tests.passes.place_programs import llama_step
from tests.passes.test_lower_models import in_doubles
from torch import Generator, Tensor

from weft.costmodel.cluster import parse_cluster
from weft.ir.module import Module
from weft.ir.verify import verify
from weft.passes.apply import Choices, apply
from weft.passes.base import Pass
from weft.passes.carry import CARRIED, Carry, carried
from weft.passes.lower import lower
from weft.passes.place import Place
from weft.passes.price import price
from weft.passes.random_place import parse_mesh, random_choices
from weft.runtime.context import TORCH_DTYPES
from weft.runtime.interpreter import evaluate

CLUSTER = "1x4:h100"


def program(batch: int, seq: int) -> Module:
    return llama_step(layers=2, batch=batch, seq=seq, width=8, heads=2, kv=1, ffn=8, vocab=12)


def values(module: Module) -> list[Tensor]:
    g = Generator().manual_seed(0)
    made = []
    for value in module.entry.params:
        dtype = TORCH_DTYPES[value.type.dtype]
        if dtype.is_floating_point:
            made.append(torch.rand(value.type.shape, generator=g, dtype=dtype) * 0.5)
        else:
            made.append(torch.randint(0, 12, value.type.shape, generator=g, dtype=dtype))
    return made


@settings(max_examples=12, deadline=None)
@given(
    batch=st.integers(1, 7),
    seq=st.integers(1, 7),
    mesh=st.sampled_from(["2", "3", "4", "2x2", "3x2"]),
    seed=st.integers(0, 1000),
)
def test_a_random_placement_at_other_sizes_computes_the_same(
    batch: int, seq: int, mesh: str, seed: int
) -> None:
    first = program(4, 6)
    ranks = parse_mesh(mesh)
    known = apply(first, ranks, random_choices(first, ranks, Random(seed)))
    module = in_doubles(program(batch, seq))
    placed = carried(module, known)
    verify(placed)
    spmd = lower(placed)
    verify(spmd)
    given_values = values(module)
    assert_close(evaluate(module, given_values), evaluate(spmd, given_values), 1e-8)


@pytest.fixture(scope="module")
def searched() -> Module:
    return Place(cluster=CLUSTER).run(program(8, 16))


def test_a_search_at_a_multiple_of_the_size_would_choose_no_other_splits(searched: Module) -> None:
    found = carried(program(16, 16), searched)
    assert found.attrs[CARRIED] is True
    ops = [[(op.name, dict(op.split)) for _, op in m.walk()] for m in (found, searched)]
    assert ops[0] == ops[1]


class Counting(Pass):
    """A search that is counted."""

    name = "counting"
    summary = "a search that is counted"
    calls = 0

    def run(self, module: Module) -> Module:
        type(self).calls += 1
        return Place(cluster=CLUSTER).run(module)


def test_sizes_that_are_near_or_split_well_are_not_searched_again(searched: Module) -> None:
    cluster = parse_cluster(CLUSTER)
    Counting.calls = 0
    for batch in (8, 9, 7, 16, 24):
        found = Carry(Counting(), (searched,)).run(program(batch, 16))
        verify(found)
        best = price(Place(cluster=CLUSTER).run(program(batch, 16)), cluster).total_us
        assert price(found, cluster).total_us <= 1.5 * best, batch
    assert Counting.calls == 0


def test_what_was_not_worth_splitting_is_searched_again_for_much_more_work() -> None:
    """A row whose work is repeated on all ranks is fine; for 16,384 rows it is not."""
    sizes = dict(layers=1, width=256, heads=4, kv=4, ffn=1024, vocab=256)
    alone = apply(llama_step(batch=1, seq=1, **sizes), parse_mesh("4", "h100"), Choices())
    alone = alone.with_(attrs={"cluster": CLUSTER})
    Counting.calls = 0
    near = Carry(Counting(), (alone,)).run(llama_step(batch=2, seq=1, **sizes))
    assert near.attrs[CARRIED] and Counting.calls == 0
    far = Carry(Counting(), (alone,)).run(llama_step(batch=4, seq=4096, **sizes))
    assert CARRIED not in far.attrs and Counting.calls == 1
