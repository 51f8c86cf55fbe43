"""Does a placed module, lowered and run on all ranks, compute what the logical one does?"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import torch
from torch import Generator, Tensor

from weft.ir.module import Module
from weft.ir.types import Mesh
from weft.ir.verify import verify
from weft.passes.apply import Choices, apply
from weft.passes.lower import lower
from weft.passes.random_place import random_choices
from weft.passes.reshard import StepCost
from weft.runtime.interpreter import evaluate


def assert_close(wanted: Sequence[Tensor], got: Sequence[Tensor], tolerance: float = 1e-9) -> None:
    """Equal up to `tolerance` times the largest element; integers and infinities exactly."""
    assert len(wanted) == len(got)
    for index, (a, b) in enumerate(zip(wanted, got, strict=True)):
        assert a.shape == b.shape and a.dtype == b.dtype, f"result {index}"
        if not a.dtype.is_floating_point:
            assert torch.equal(a, b), f"result {index}"
            continue
        finite = a[a.isfinite()]
        scale = float(finite.abs().max()) if finite.numel() else 0.0
        # scattered terms of partial sums are of size 1, whatever the size of the sum
        close = torch.allclose(a, b, rtol=0.0, atol=tolerance * (scale + 0.01), equal_nan=True)
        assert close, f"result {index} differs by {(a - b).abs().max()}, its scale is {scale}"


def random_cost(rng: Random) -> StepCost:
    """A cost function under which any path may be the cheapest, so that all of them are run."""
    weights: dict[tuple[str, str], float] = {}

    def cost(step: str, bytes_in: float, ranks: int, axis: str) -> float:
        return weights.setdefault((step, axis), rng.random()) * (1.0 + bytes_in)

    return cost


def lowered(module: Module, mesh: Mesh, choices: Choices, cost: StepCost | None = None) -> Module:
    """The spmd module of a logical one, verified at both levels."""
    placed = apply(module, mesh, choices)
    verify(placed)
    spmd = lower(placed, cost)
    verify(spmd)
    return spmd


def assert_equal_on_ranks(
    module: Module,
    inputs: Sequence[Tensor],
    wanted: Sequence[Tensor],
    mesh: Mesh,
    seed: int,
    tolerance: float = 1e-9,
) -> Module:
    """Place at random, lower, run on all ranks, compare. Returns the spmd module."""
    rng = Random(seed)
    spmd = lowered(module, mesh, random_choices(module, mesh, rng), random_cost(rng))
    got = evaluate(spmd, inputs, noise=Generator().manual_seed(seed))
    assert_close(wanted, got, tolerance)
    return spmd
