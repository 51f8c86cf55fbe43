"""Whole train steps with their kernels, against the same plan without. Needs TRITON_INTERPRET=1."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.frontend.zoo import build

from weft.codegen.emit import emit_kernels, fallbacks, kernel_functions
from weft.frontend.train_step import TracedStep, trace_module_train
from weft.ir.module import Module
from weft.ir.types import Mesh
from weft.passes.apply import Choices, apply
from weft.passes.fuse import fuse
from weft.passes.lower import lower
from weft.passes.schedule import Schedule
from weft.passes.simplify import Simplify
from weft.runtime.kernels import load_kernels
from weft.runtime.program import Program


def scheduled(traced: TracedStep, optimizers: bool) -> Module:
    """The plan of one rank, with optimizer updates in the kernels of their gradients or by themselves."""
    logical = Simplify().run(traced.module)
    return Schedule().run(fuse(lower(apply(logical, Mesh(), Choices())), optimizers=optimizers))


@pytest.mark.parametrize(
    ("name", "optimizers"), [("llama", True), ("bert", True), ("resnet", True), ("llama", False)]
)
def test_a_train_step_with_kernels_equals_the_one_without(
    name: str, optimizers: bool, tmp_path: Path
) -> None:
    model, inputs = build(name)
    traced = trace_module_train(model, (), inputs, optimizer="adamw")
    plan = scheduled(traced, optimizers)
    manifest = emit_kernels(plan, tmp_path, "cpu")
    assert fallbacks(manifest) == [] and len(kernel_functions(plan)) >= 5
    kernels = load_kernels(tmp_path)
    calls = dict.fromkeys(kernels, 0)

    def counted(key: str):  # type: ignore[no-untyped-def]
        def call(*operands: torch.Tensor) -> tuple[torch.Tensor, ...]:
            calls[key] += 1
            return kernels[key](*operands)

        return call

    with_kernels = Program(plan, kernels={key: counted(key) for key in kernels})
    without = Program(plan)
    batch = [inputs[key] for key in traced.input_names]
    for program in (with_kernels, without):
        program.load_state(dict(traced.tensors))
    for _ in range(2):
        results = [program.step(*batch, lr=1e-3) for program in (with_kernels, without)]
    assert all(calls.values())
    assert any(key.startswith("adamw_update_") for key in calls) != optimizers
    for got_result, wanted_result in zip(*results, strict=True):
        assert torch.allclose(got_result, wanted_result, rtol=1e-4, atol=1e-5)
    wanted, got = without.state_dict(), with_kernels.state_dict()
    for key, tensor in wanted.items():
        assert torch.allclose(got[key], tensor, rtol=1e-4, atol=1e-5), key
