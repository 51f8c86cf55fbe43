"""Mixtures of experts: grouped products of any program, and experts on ranks of their own."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
import torch.nn.functional as F
from tests.frontend.stepping import Stepper
from tests.frontend.test_aten import Wrapped
from tests.passes.equality import assert_close
from torch import Tensor, nn

from weft.frontend.trace import trace_forward
from weft.frontend.train_step import TracedJoint, TracedStep, trace_joint, trace_module_train
from weft.frontend.verify import random_inputs, widen
from weft.ir.module import Function
from weft.ir.types import B, P, Placement, S
from weft.ir.verify import verify
from weft.passes.apply import Choices, FunctionChoices, apply
from weft.passes.lower import lower
from weft.passes.random_place import parse_mesh
from weft.runtime.interpreter import evaluate

EXPERTS, WIDTH, HIDDEN = 4, 8, 12


class Experts(nn.Module):
    """Two experts for each token: sorted by expert, multiplied in groups, put back in order."""

    def __init__(self, counts: str = "histc") -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, EXPERTS)
        self.up = nn.Parameter(torch.randn(EXPERTS, WIDTH, HIDDEN))
        self.down = nn.Parameter(torch.randn(EXPERTS, WIDTH, HIDDEN))
        self.counts = counts

    def ends(self, experts: Tensor) -> Tensor:
        """Where the rows of each expert end."""
        if self.counts == "histc":
            found = torch.histc(experts.float(), EXPERTS, 0, EXPERTS - 1)
        elif self.counts == "one_hot":
            found = F.one_hot(experts, EXPERTS).sum(0)
        else:
            found = torch.zeros(EXPERTS, dtype=torch.int64).scatter_add(
                0, experts, torch.ones_like(experts))
        return found.cumsum(0, dtype=torch.int32)

    def forward(self, x: Tensor) -> Tensor:
        """The loss."""
        weights, chosen = self.gate(x).softmax(-1).topk(2)
        experts, order = chosen.reshape(-1).sort()
        ends = self.ends(experts)
        y = F.grouped_mm(x[order // 2], self.up, offs=ends).relu()
        y = F.grouped_mm(y, self.down.mT, offs=ends) * weights.reshape(-1, 1)[order]
        back = order.argsort()
        return y[back].view(-1, 2, WIDTH).sum(1).square().sum()


@lru_cache(maxsize=None)
def step(counts: str = "histc") -> TracedStep:
    torch.manual_seed(0)
    return trace_module_train(Experts(counts), (torch.randn(10, WIDTH),), optimizer="sgd", lr=1.0)


@pytest.mark.parametrize("counts", ["histc", "one_hot", "scatter"])
def test_tokens_are_not_sorted_and_gradients_equal_eager(counts: str) -> None:
    torch.manual_seed(0)
    model, x = Experts(counts), torch.randn(10, WIDTH)
    traced = step(counts)
    names = [op.name for _, op in traced.module.walk()]
    assert not {"sort", "aten"} & set(names)
    assert names.count("grouped_product") == 3 and names.count("grouped_weight_grad") == 2
    stepper = Stepper(traced)
    loss, expected = stepper([x]), model(x)
    torch.testing.assert_close(loss, expected.detach())
    expected.backward()
    for name, parameter in model.named_parameters():
        mine = parameter.detach() - stepper.state[name]
        torch.testing.assert_close(mine, parameter.grad, rtol=1e-4, atol=1e-4)


def _by_hand(function: Function) -> FunctionChoices:
    """Tokens split over the first axis, experts over the second; all else whole."""
    splits = tuple(("t", "e") if op.name.startswith("grouped") else ("", "") for op in function.ops)

    def place(name: str) -> tuple[Placement, ...]:
        return (B, S(0)) if name in ("up", "down") else (B, B)

    return FunctionChoices(splits, tuple(place(str(a["name"])) for a in function.param_attrs))


def test_experts_on_ranks_of_their_own() -> None:
    traced = step()
    module = widen(traced.module)
    functions = {f.name: _by_hand(f) if f is module.entry else FunctionChoices() for f in module.functions}
    placed = apply(module, parse_mesh("2x2"), Choices(functions))
    verify(placed)
    held = {str(a["name"]): v.type.placement for v, a in zip(
        placed.entry.params, placed.entry.param_attrs, strict=True)}  # fmt: skip
    assert held["up"] == held["down"] == (B, S(0))
    made = {op.name: op.result.type.placement for op in placed.entry.ops if op.name.startswith("grouped")}
    assert made == {"grouped_product": (S(0), P()), "grouped_weight_grad": (P(), S(0))}
    tensors = {name: tensor.detach() for name, tensor in traced.tensors.items()}
    values = random_inputs(module, {**tensors, "x": torch.randn(10, WIDTH)})
    assert_close(evaluate(module, values), evaluate(lower(placed), values))


def _joint(function: object, *inputs: Tensor) -> TracedJoint:
    traced = trace_joint(Wrapped(function), inputs)  # type: ignore[arg-type]
    verify(traced.module)
    return traced


@pytest.mark.parametrize("ends", [[3, 3, 7, 10], [0, 0, 0, 10], [10, 10, 10, 10]])
def test_grouped_products_with_any_offsets(ends: list[int]) -> None:
    x = torch.randn(10, 8, requires_grad=True)
    w = torch.randn(4, 8, 12, requires_grad=True)
    offs = torch.tensor(ends, dtype=torch.int32)
    traced = _joint(lambda x, w, o: F.grouped_mm(x, w, offs=o), x, w, offs)
    y = F.grouped_mm(x, w, offs=offs)
    dy = torch.randn_like(y)
    y.backward(dy)
    given = {"tangent": iter([dy]), "input": iter([x.detach(), w.detach(), offs])}
    values = [next(given[str(a["role"])]) for a in traced.module.entry.param_attrs]
    for mine, theirs in zip(evaluate(traced.module, values), (y, x.grad, w.grad), strict=True):
        assert theirs is not None
        torch.testing.assert_close(mine, theirs.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("values", "bins", "low", "high"),
    [
        ([0.0, 1.0, 2.9, 3.0, 3.1, -0.1, 1.5], 4, 0, 3),
        ([0.0, 0.1, 0.2, 0.3, 1.0, 0.999, -1.0], 10, 0, 1),
        ([2.0, 2.5, -2.0, 0.0, 1.0, 1.0, 1.0], 3, -2, 2),
    ],
)
def test_histograms(values: list[float], bins: int, low: float, high: float) -> None:
    x = torch.tensor(values)
    traced = trace_forward(Wrapped(lambda x: torch.histc(x, bins, low, high)), (x,))
    assert not any(op.name == "aten" for _, op in traced.module.walk())
    (mine,) = evaluate(traced.module, [x])
    torch.testing.assert_close(mine, torch.histc(x, bins, low, high))


def test_histograms_of_whole_numbers_count_those_in_range() -> None:
    x = torch.tensor([0, 3, 3, 2, 7, -1, 0])
    program = Wrapped(lambda x: torch.histc(x.float(), 4, 0, 3))
    (mine,) = evaluate(trace_forward(program, (x,)).module, [x])
    assert mine.tolist() == [2, 0, 1, 2]
