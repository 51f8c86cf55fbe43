"""Fifteen more architectures of transformers: train steps equal eager, on one rank and on four."""

from __future__ import annotations

import copy
import json
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from tests.frontend.stepping import RATE, Stepper, entry_values
from tests.frontend.zoo import ALL, SLOW, ZOO, build, tensors_of
from tests.passes.equality import assert_close, assert_equal_on_ranks
from torch import Tensor

from weft.frontend.pass_table import ALL_PASSES
from weft.frontend.trace import trace_forward
from weft.frontend.train_step import TracedStep, trace_module_train
from weft.frontend.verify import random_inputs, widen
from weft.ir.module import Module
from weft.ir.verify import verify
from weft.passes.manager import PassManager
from weft.passes.pipeline import parse_pipeline
from weft.passes.random_place import parse_mesh
from weft.runtime.interpreter import evaluate

#: those that no other test runs
NAMES = [name for name in ALL if name not in ZOO]
#: what the models differ in most: routing, cross attention, windows, two inputs, a scan
SAMPLED = ["mixtral", "bart", "clip", "mamba"]


@lru_cache(maxsize=None)
def traced_step(name: str) -> TracedStep:
    model, inputs = build(name)
    return trace_module_train(model, (), inputs, optimizer="sgd", lr=RATE)


def wide_step(name: str) -> tuple[Module, tuple[Tensor, ...]]:
    """The step in float64, and values for its parameters."""
    _, inputs = build(name)
    traced = traced_step(name)
    given = {k: v.detach() for k, v in {**traced.tensors, **tensors_of(inputs)}.items()}
    module = widen(traced.module)
    return module, random_inputs(module, given)


@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradients_equal_eager(name: str) -> None:
    model, inputs = build(name)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    stepper = Stepper(traced_step(name))
    loss = stepper(list(tensors_of(inputs).values()))
    expected = model(**inputs).loss
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for parameter, value in model.named_parameters():
        if value.grad is None:
            torch.testing.assert_close(stepper.state[parameter], before[parameter])
            continue
        mine = (before[parameter] - stepper.state[parameter]) / RATE
        # gradients that are 0 but for rounding, as that of a key's bias, are compared with 1e-3
        scale = value.grad.abs().max().clamp_min(1e-3).item()
        torch.testing.assert_close(mine, value.grad, rtol=0, atol=1e-4 * scale, msg=parameter)


@pytest.mark.parametrize("name", NAMES)
def test_a_random_placement_on_four_ranks_changes_nothing(name: str) -> None:
    module, values = wide_step(name)
    number = NAMES.index(name)
    mesh = parse_mesh(("4", "2x2")[number % 2])
    assert_equal_on_ranks(module, values, evaluate(module, values), mesh, seed=number)


@pytest.mark.parametrize("name", SAMPLED)
def test_the_searched_placement_on_four_ranks_changes_nothing(name: str, tmp_path: Path) -> None:
    cluster = tmp_path / "slow.toml"
    cluster.write_text(SLOW)
    module, values = wide_step(name)
    text = f"simplify,place[cluster={json.dumps(str(cluster))} mesh=4],lower"
    spmd = PassManager(parse_pipeline(text, ALL_PASSES)).run(traced_step(name).module)
    assert any(op.split for _, op in spmd.walk())
    assert_close(evaluate(module, values), evaluate(widen(spmd), values))


@pytest.mark.parametrize("name", SAMPLED)
def test_forward_rebuilds_outputs_with_their_cache_objects(name: str) -> None:
    model, inputs = build(name)
    traced = trace_forward(model, (), inputs)
    verify(traced.module)
    tensors = list(tensors_of(inputs).values())
    results = evaluate(traced.module, entry_values(traced.module, dict(traced.tensors), tensors))
    attrs = traced.module.entry.result_attrs
    outputs = [v for v, a in zip(results, attrs, strict=True) if a["role"] == "output"]
    mine, theirs = traced.outputs.build(outputs), copy.deepcopy(model)(**inputs)
    assert type(mine) is type(theirs) and list(mine) == list(theirs)
    for key, value in theirs.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(mine[key], value, rtol=1e-4, atol=1e-5)
        else:
            assert type(mine[key]) is type(value)
