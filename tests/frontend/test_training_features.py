"""Training features on models of `transformers`: equal to eager on one rank, equal on four.

The cases that differ most; `benchmarks/training_features.py` runs all those of `features.py`.
"""

from __future__ import annotations

import pytest
from tests.frontend.features import step_errors, traced
from tests.frontend.zoo import tensors_of
from tests.passes.equality import assert_equal_on_ranks

from weft.frontend.verify import random_inputs, widen
from weft.passes.random_place import parse_mesh
from weft.runtime.interpreter import evaluate

COMPILED = [
    ("groups and rates", "resnet"), ("clipping", "gpt2"), ("accumulation", "bert"),
    ("averages", "gpt2"), ("an optimizer of one's own", "llama"),
]  # fmt: skip
PLACED = [("several losses", "bert"), ("amsgrad", "resnet"), ("constraints", "llama")]


@pytest.mark.parametrize(("name", "model_name"), COMPILED)
def test_steps_equal_eager(name: str, model_name: str) -> None:
    errors = step_errors(name, model_name)
    assert errors["results"] < 1e-5
    assert errors["parameters"] < 1e-4 and errors["states"] < 1e-4


@pytest.mark.parametrize(("name", "model_name"), PLACED)
def test_a_random_placement_on_four_ranks_changes_nothing(name: str, model_name: str) -> None:
    step, inputs = traced(name, model_name)
    module = widen(step.module)
    given = {k: v.detach() for k, v in {**step.tensors, **tensors_of(inputs)}.items()}
    values = random_inputs(module, given)
    number = PLACED.index((name, model_name))
    mesh = parse_mesh(("4", "2x2")[number % 2])
    assert_equal_on_ranks(module, values, evaluate(module, values), mesh, seed=number)
