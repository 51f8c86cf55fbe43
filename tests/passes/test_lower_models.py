"""Random legal placements of real models, lowered and run on all ranks, change nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.frontend.zoo import ZOO, build
from tests.passes.equality import assert_equal_on_ranks
from torch import Tensor

from weft.frontend.trace import trace_forward
from weft.ir.module import Function, Module, Value
from weft.passes.random_place import parse_mesh
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


@pytest.mark.parametrize("name", ZOO)
def test_random_placements_of_a_model_keep_its_outputs(name: str) -> None:
    module, values = forward(name)
    wanted = evaluate(module, values)
    for seed, mesh in enumerate(MESHES):
        assert_equal_on_ranks(module, values, wanted, parse_mesh(mesh), seed)
