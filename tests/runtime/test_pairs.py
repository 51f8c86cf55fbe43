"""Both gradients of a convolution in one call."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

import weft
from weft.ir.module import Op, Value
from weft.ir.types import B, S, TensorType
from weft.runtime.pairs import pairs


def value(name: str, *shape: int, split: bool = False) -> Value:
    return Value(name, TensorType("f32", shape, (S(0) if split else B,)))


WINDOW = {"stride": (1,), "padding": (1,), "dilation": (1,), "groups": 1}
DY, X, W = value("dy", 6, 5, 9), value("x", 6, 4, 9), value("w", 5, 4, 3)
INPUT = Op("convolution_input_grad", (DY, W), (value("dx", 6, 4, 9),), WINDOW)
WEIGHT = Op("convolution_weight_grad", (DY, X), (value("dw", 5, 4, 3),), WINDOW)
FREE = Op("free", (value("other", 1),), ())


def found(*ops: Op) -> dict[int, int]:
    return pairs(list(enumerate(ops, start=100)))


def test_gradients_of_one_convolution_are_a_pair_in_any_order() -> None:
    assert found(INPUT, FREE, WEIGHT) == {0: 2}
    assert found(WEIGHT, INPUT) == {0: 1}


def test_gradients_that_differ_are_no_pair() -> None:
    assert found(INPUT, INPUT.with_(results=(value("again", 6, 4, 9),))) == {}
    assert found(INPUT, WEIGHT.with_(attrs={**WINDOW, "padding": (0,)})) == {}, "windows"
    assert found(INPUT, WEIGHT.with_(split={"x": "n"})) == {}, "splits"
    assert found(INPUT, *[FREE] * 20, WEIGHT) == {}, "far apart"


def test_an_operand_that_is_made_between_them_keeps_them_apart() -> None:
    make = Op("neg", (value("y", 6, 4, 9),), (X,))
    assert found(INPUT, make, WEIGHT) == {}
    assert found(make, INPUT, WEIGHT) == {1: 2}


def test_a_step_with_pairs_equals_eager() -> None:
    def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = F.relu(model(x)).square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        return loss

    states = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.Tanh(), nn.Conv2d(4, 6, 3, groups=2))
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        run = weft.compile(step) if compiled else step
        for number in range(3):
            x = torch.randn(5, 3, 9, 8, generator=torch.Generator().manual_seed(number))
            run(model, optimizer, x)
        states.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        if compiled:
            executor = next(iter(run.step.compiler.entries.values())).running.executor
            assert "b" in {name.rstrip("0123456789") for name in executor.wrapper.globals}
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor)
