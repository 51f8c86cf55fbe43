"""Blocks that are computed again: the same results, fewer bytes between forward and backward."""

from __future__ import annotations

import pytest
import torch
from tests.passes.equality import assert_close
from tests.passes.place_programs import llama_step, mlp_step

from weft.costmodel.cluster import parse_cluster
from weft.ir.module import Module
from weft.ir.types import Mesh
from weft.ir.verify import verify
from weft.passes.apply import Choices, apply
from weft.passes.place_recompute import blocks, recompute
from weft.passes.price import price
from weft.runtime.interpreter import evaluate

SMALL = dict(layers=3, batch=4, seq=8, width=32, heads=4, kv=2, ffn=64, vocab=32)


def inputs_of(module: Module) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randint(0, 32, v.type.shape, generator=generator) if v.type.dtype == "i64"
        else torch.rand(v.type.shape, generator=generator, dtype=torch.float64).to(
            torch.float64 if v.type.dtype == "f64" else torch.float32)
        for v in module.entry.params
    ]  # fmt: skip


@pytest.mark.parametrize("modes", [("full",) * 3, ("selective",) * 3, ("none", "full", "selective")])
def test_a_step_with_blocks_computed_again_gives_the_same_results(modes: tuple[str, ...]) -> None:
    module = llama_step(**SMALL)
    found = blocks(module)
    assert len(found) == 3
    chosen = {block.forward: mode for block, mode in zip(found, modes, strict=True)}
    again, phases = recompute(module, chosen)
    assert phases is None
    verify(again)
    names = {f.name for f in again.functions}
    assert ("block" in names) == ("none" in modes)
    assert any(name.startswith("block_again") for name in names)
    inputs = inputs_of(module)
    assert_close(evaluate(module, inputs), evaluate(again, inputs), tolerance=0.0)


def test_less_is_held_between_forward_and_backward() -> None:
    cluster, mesh = parse_cluster("1x1:h100"), Mesh((), "h100")
    module = llama_step(layers=6, batch=8, seq=128, width=256, heads=8, kv=8, ffn=768, vocab=64)
    peaks, times = {}, {}
    for mode in ("none", "selective", "full"):
        again, _ = recompute(module, {b.forward: mode for b in blocks(module)})
        found = price(apply(again, mesh, Choices()), cluster)
        peaks[mode], times[mode] = found.peak_bytes, found.total_us
    assert peaks["full"] < peaks["selective"] < peaks["none"]
    assert times["full"] > times["selective"] > times["none"]


def test_phases_follow_the_ops() -> None:
    module = llama_step(**SMALL)
    first = blocks(module)[0]
    phases = ["forward" if index < first.backward else "backward"
              for index in range(len(module.entry.ops))]  # fmt: skip
    again, placed = recompute(module, {first.forward: "full"}, phases)
    assert placed is not None and len(placed) == len(again.entry.ops) == len(phases) + 1
    (second,) = [i for i, op in enumerate(again.entry.ops)
                 if str(op.attrs.get("callee", "")).endswith("_again")]  # fmt: skip
    assert placed[second] == "backward"
    assert again.entry.ops[second + 1].attrs["callee"] == "block_backward"


def test_a_program_without_blocks_stays_as_it_is() -> None:
    module = mlp_step(8, 16, 16)
    assert blocks(module) == ()
    assert recompute(module, {0: "full"})[0] == module
