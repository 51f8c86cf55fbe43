"""A plan on one rank, as users of the runtime see it: state, steps, checks of what they pass."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.runtime.schedules import FORWARD_BACKWARD, TRAIN_STEP
from torch import Tensor

from weft.ir.errors import RunError
from weft.ir.module import Module
from weft.ir.parser import parse_module
from weft.ir.types import TensorType
from weft.runtime.interpreter import evaluate
from weft.runtime.program import Program
from weft.runtime.trace import read_events


def alone(text: str) -> Module:
    """A test schedule for a mesh of one rank."""
    return parse_module(text.replace("dp=2, tp=2", "dp=1, tp=1"))


@pytest.fixture
def program() -> Program:
    return Program(alone(TRAIN_STEP))


def test_steps_follow_the_learning_rate_and_the_state_comes_back(program: Program) -> None:
    module = alone(TRAIN_STEP)
    w, x = torch.randn(5, 6), torch.randn(7, 5)
    program.load_state({"w": w})
    values = [w, torch.zeros(5, 6), torch.zeros(5, 6), torch.zeros((), dtype=torch.float64)]
    for lr in (0.1, [0.01]):
        rate = lr[0] if isinstance(lr, list) else lr
        loss, *values = evaluate(module, [*values, x, torch.tensor(rate, dtype=torch.float64)])
        (got,) = program.step(x, lr=lr)
        torch.testing.assert_close(got, loss)
    state = program.state_dict()
    assert list(state) == ["w", "exp_avg/w", "exp_avg_sq/w", "step"]
    for got, want in zip(state.values(), values, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)
    assert state["step"] == 2


def test_a_saved_state_continues_where_it_was(program: Program) -> None:
    x = torch.randn(7, 5)
    program.load_state({"w": torch.randn(5, 6)})
    program.step(x, lr=0.1)
    saved = program.state_dict()
    first = program.step(x, lr=0.1)
    again = Program(alone(TRAIN_STEP))
    again.load_state(saved)
    assert torch.equal(again.step(x, lr=0.1)[0], first[0])
    again.load_state({"w": saved["w"]})  # the optimizer starts anew
    assert again.state_dict()["step"] == 0


def test_loaded_tensors_stay_the_callers(program: Program) -> None:
    w = torch.ones(5, 6)
    program.load_state({"w": w})
    program.step(torch.ones(7, 5), lr=0.1)
    assert torch.equal(w, torch.ones(5, 6))
    program.state_dict()["w"].zero_()
    assert program.state_dict()["w"].abs().sum() > 0


def test_a_state_can_be_made_name_by_name(program: Program) -> None:
    made: list[str] = []

    def fill(name: str, type: TensorType) -> Tensor:
        made.append(name)
        return torch.full(type.shape, 0.5)

    program.init_state(fill)
    assert made == ["w"]
    assert torch.equal(program.state_dict(full=False)["w"], torch.full((5, 6), 0.5))


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({}, "missing w"),
        ({"w": torch.ones(5, 6), "b": torch.ones(1)}, "unknown b"),
        ({"w": torch.ones(6, 5)}, r"state 'w': expected f32\[5, 6\], got float32\[6, 5\]"),
        ({"w": torch.ones(5, 6).double()}, r"got float64\[5, 6\]"),
    ],
)
def test_a_state_that_does_not_match_is_refused_and_nothing_changes(
    program: Program, state: dict[str, Tensor], said: str
) -> None:
    program.load_state({"w": torch.full((5, 6), 3.0)})
    with pytest.raises(RunError, match=said) as error:
        program.load_state(state)
    assert error.value.code == "W0804"
    assert torch.equal(program.state_dict()["w"], torch.full((5, 6), 3.0))


def test_a_second_name_of_a_tied_weight_is_accepted(program: Program) -> None:
    w = torch.ones(5, 6)
    program.load_state({"w": w, "head.weight": w})
    program.load_state({"other": torch.ones(2)}, strict=False)
    assert torch.equal(program.state_dict()["w"], w)


@pytest.mark.parametrize(
    ("inputs", "options", "said"),
    [
        ([], {"lr": 0.1}, "takes 1 inputs, got 0"),
        (
            [torch.ones(8, 5)],
            {"lr": 0.1},
            r"input 0 \(x\): expected f32\[7, 5\], got float32\[8, 5\]",
        ),
        ([torch.ones(7, 5).long()], {"lr": 0.1}, r"got int64\[7, 5\]"),
        ([[1.0]], {"lr": 0.1}, "got list"),
        ([torch.ones(7, 5)], {}, "needs a learning rate"),
        ([torch.ones(7, 5)], {"lr": [0.1, 0.2]}, "1 learning rates .* got 2"),
        ([torch.ones(7, 5)], {"lr": 10**400}, "must be a finite number"),
        ([torch.ones(7, 5)], {"lr": float("nan")}, "must be a finite number"),
        ([torch.ones(7, 5)], {"lr": [object()]}, "must be a finite number"),
    ],
)
def test_wrong_inputs_are_named_before_anything_runs(
    program: Program, inputs: list[Tensor], options: dict[str, float], said: str
) -> None:
    program.load_state({"w": torch.ones(5, 6)})
    with pytest.raises(RunError, match=said) as error:
        program.step(*inputs, **options)  # type: ignore[arg-type]
    assert error.value.code == "W0804"
    assert program.state_dict()["step"] == 0


RANDOM = """weft 1 schedule
mesh [] "cpu"

func @main(%x: f32[64]{} {role = "input"}, %seed: i64[]{} {role = "seed"}) -> (f32[64]{} {role = "output"}) {
  %y = dropout(%x, %seed) {p = 0.5} : f32[64]{}
  return %y
}
"""


def test_random_numbers_follow_the_seed() -> None:
    program, x = Program(parse_module(RANDOM)), torch.ones(64)
    with pytest.raises(RunError, match="needs a seed"):
        program.step(x)
    one, same, other = (program.step(x, seed=seed)[0] for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_outputs_then_gradients() -> None:
    program = Program(alone(FORWARD_BACKWARD))
    w = torch.randn(5, 6, requires_grad=True)
    x = torch.randn(7, 5, requires_grad=True)
    program.load_state({"w": w})
    want = (x @ w).relu()
    dy = torch.randn(7, 6)
    want.backward(dy)
    (y,) = program.begin(x.detach())
    torch.testing.assert_close(y, want.detach())
    for got, expected in zip(program.finish(dy), (w.grad, x.grad), strict=True):
        torch.testing.assert_close(got, expected)
    program.begin(x.detach())
    with pytest.raises(RunError, match=r"tangent 0 \(y\)"):
        program.finish(torch.ones(2, 2))


def test_a_run_can_be_traced_to_a_file_for_each_rank(program: Program, tmp_path: Path) -> None:
    with program.tracing(tmp_path / "run.json.gz") as trace:
        program.step(torch.ones(7, 5), lr=0.1)
    program.step(torch.ones(7, 5), lr=0.1)
    assert trace.steps == 1
    assert len(read_events(tmp_path / "run.rank0.json.gz")) == len(trace.all_events())


def test_memory_is_reported(program: Program) -> None:
    memory = program.memory()
    assert memory.state_bytes == 3 * 5 * 6 * 4 + 8
    assert memory.state_bytes < memory.planned_bytes < memory.peak_bytes
