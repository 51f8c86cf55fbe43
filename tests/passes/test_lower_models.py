"""Random legal placements of real models, lowered and run on all ranks, change nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from tests.frontend.zoo import ZOO, build
from tests.passes.equality import assert_equal_on_ranks
from torch import Generator, Tensor

from weft.frontend.trace import trace_forward
from weft.frontend.train_step import trace_module_train
from weft.ir.module import Attr, Function, Module, Value
from weft.passes.random_place import parse_mesh
from weft.runtime.context import TORCH_DTYPES
from weft.runtime.interpreter import evaluate

MESHES = ("2", "7", "2x2", "3x2", "2x4", "2x2x2")


def _double(value: Value) -> Value:
    wide = value.type.dtype == "f32"
    return Value(value.name, replace(value.type, dtype="f64")) if wide else value


def in_doubles(module: Module) -> Module:
    """The module with float64 for float32: models compute some things in float32 on purpose."""

    def rewrite(function: Function) -> Function:
        ops = tuple(
            op.with_(
                operands=tuple(map(_double, op.operands)), results=tuple(map(_double, op.results))
            )
            for op in function.ops
        )
        params, results = (tuple(map(_double, v)) for v in (function.params, function.results))
        return function.with_(params=params, ops=ops, results=results)

    return module.with_(functions=tuple(map(rewrite, module.functions)))


def forward(name: str) -> tuple[Module, list[Tensor]]:
    """A model of the zoo, its loss and outputs, and values for its parameters."""
    model, inputs = build(name, torch.float64)
    traced = trace_forward(model, (), inputs)
    known = {**traced.tensors, **inputs}
    values = [known[str(attrs["name"])].detach() for attrs in traced.module.entry.param_attrs]
    return in_doubles(traced.module), values


def train_step(name: str) -> tuple[Module, list[Tensor]]:
    """Forward, backward and AdamW update of a model, in the middle of training."""
    model, inputs = build(name, torch.float64)
    # some gradients are 0 but for rounding: a tiny eps would turn their signs into steps
    traced = trace_module_train(model, (), inputs, optimizer="adamw", lr=1e-2, eps=1e-3)
    known = {**traced.tensors, **inputs}
    g = Generator().manual_seed(0)

    def value(param: Value, attrs: Mapping[str, Attr]) -> Tensor:
        dtype = TORCH_DTYPES[param.type.dtype]
        if (given := known.get(str(attrs["name"]))) is not None:
            return given.detach()
        if attrs["role"] == "lr":
            return torch.tensor(1e-2, dtype=dtype)
        if param.type.shape == ():
            return torch.tensor(3, dtype=dtype)  # the number of steps done, or the seed
        return torch.rand(param.type.shape, generator=g, dtype=torch.float64).to(dtype)

    module = in_doubles(traced.module)
    entry = module.entry
    return module, list(map(value, entry.params, entry.param_attrs))


@pytest.mark.parametrize("name", ZOO)
def test_random_placements_of_a_model_keep_its_outputs(name: str) -> None:
    module, values = forward(name)
    wanted = evaluate(module, values)
    for seed, mesh in enumerate(MESHES[:4]):
        assert_equal_on_ranks(module, values, wanted, parse_mesh(mesh), seed)


@pytest.mark.parametrize("name", ZOO)
def test_random_placements_of_a_train_step_keep_its_loss_and_updates(name: str) -> None:
    """Blocks are functions here, forward and backward, and states are placed as parameters."""
    module, values = train_step(name)
    wanted = evaluate(module, values)
    for seed, mesh in enumerate((*MESHES, *MESHES[2:])):
        spmd = assert_equal_on_ranks(module, values, wanted, parse_mesh(mesh), seed)
    assert sum(op.name == "call" for op in spmd.entry.ops) >= 4
