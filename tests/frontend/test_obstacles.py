"""Things that programs do and that are hard to trace: each equals eager, or is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.frontend.stepping import RATE, Stepper
from torch import Tensor, nn

from weft.frontend.train_step import trace_module_train
from weft.ir.errors import CompileError


class Rotary(nn.Module):
    """Rotary positions by complex numbers, in a buffer or made on the way."""

    def __init__(self, buffer: bool) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.buffer = buffer
        self.register_buffer("turns", self.made())

    @staticmethod
    def made() -> Tensor:
        angles = torch.outer(torch.arange(6).float(), torch.ones(4))
        return torch.polar(torch.ones_like(angles), angles)

    def forward(self, x: Tensor) -> Tensor:
        turns = self.turns if self.buffer else self.made()
        pairs = torch.view_as_complex(self.fc(x).reshape(*x.shape[:-1], -1, 2))
        turned = torch.view_as_real(pairs * turns[None] * turns.conj() * turns).flatten(-2)
        return turned[..., :3].square().mean()


class Counting(nn.Module):
    """Buffers that change in place, an integer among them; a module called twice; one unused."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.unused, self.norm = nn.Linear(8, 8), nn.Linear(3, 3), nn.BatchNorm1d(8)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("average", torch.zeros(8))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.norm(self.fc(self.norm(self.fc(x)).relu()))
        self.count += 1
        self.average.mul_(0.9).add_(y.detach().mean(0) + 1, alpha=0.1)
        self.average[0] = 1.0
        y = y.clone()
        y[mask] = 0.5
        return ((y - self.average) ** 2).sum(1).log1p().mean() / self.count


class InPlaceBackward(nn.Module):
    """Operators without a rule; the backward of `kthvalue` and `cumprod` writes in place."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        spread = self.w.kthvalue(3, 1).values.sum() + self.w.sigmoid().cumprod(1).mean()
        return spread + (self.w > 0).max(1).values.sum() + torch.cdist(x, self.w).mean()


def _recurrent() -> nn.Module:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.LSTM(8, 8, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            out, (hidden, _) = self.rnn(x)
            return out.square().mean() + hidden.mean()

    return Recurrent()


CASES: dict[str, tuple[Any, tuple[int, ...], bool]] = {
    "complex buffer": (lambda: Rotary(True), (3, 6, 8), False),
    "complex numbers made on the way": (lambda: Rotary(False), (3, 6, 8), False),
    "buffers changed in place": (Counting, (12, 8), True),
    "in-place backward": (InPlaceBackward, (5, 8), False),
    "recurrent": (_recurrent, (3, 5, 8), False),
}


@pytest.mark.parametrize("name", CASES)
def test_a_train_step_equals_eager(name: str) -> None:
    torch.manual_seed(0)
    make, shape, masked = CASES[name]
    model = make()
    batch = (torch.randn(shape), *([torch.rand(shape[0]) > 0.5] if masked else []))
    reference = copy.deepcopy(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    stepper = Stepper(trace_module_train(model, batch, optimizer="sgd", lr=RATE))
    loss, expected = stepper(list(batch)), reference(*batch)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for n, p in reference.named_parameters():
        if p.grad is not None:
            gradient = (before[n] - stepper.state[n]) / RATE
            torch.testing.assert_close(gradient, p.grad, rtol=1e-3, atol=1e-5)
    for n, b in reference.named_buffers():
        if not b.is_complex() and n in stepper.state:
            torch.testing.assert_close(stepper.state[n], b)


class StraightThrough(torch.autograd.Function):
    """Rounds; its gradient is that of the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad


class Rounding(nn.Module):
    def __init__(self, hook: bool) -> None:
        super().__init__()
        self.fc, self.hook = nn.Linear(8, 8), hook

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        if self.hook:
            y.register_hook(lambda grad: grad * 2)
            return y.mean()
        return StraightThrough.apply(y).mean()


@pytest.mark.parametrize("hook", [True, False])
def test_gradients_that_tracing_would_not_see_are_refused(hook: bool) -> None:
    with pytest.raises(CompileError) as caught:
        trace_module_train(Rounding(hook), (torch.randn(3, 8),))
    assert caught.value.code == "W0302" and caught.value.span is not None
    assert caught.value.span.file == __file__


def test_a_parameter_with_a_gradient_hook_is_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 1), nn.Flatten(0), nn.AvgPool1d(1))
    model[0].weight.register_hook(lambda grad: grad * 2)
    with pytest.raises(CompileError, match="0.weight has a hook"):
        trace_module_train(model, (torch.randn(1, 8),))


def test_tracing_leaves_autograd_as_it_was() -> None:
    with pytest.raises(CompileError):
        trace_module_train(Rounding(False), (torch.randn(3, 8),))
    x = torch.randn(3, requires_grad=True)
    StraightThrough.apply(x).sum().backward()
    assert x.grad is not None and bool((x.grad == 1).all())


def test_bfloat16_autocast_is_as_near_to_float64_as_eager_is() -> None:
    torch.manual_seed(0)

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.b = nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 8)
            self.enabled = True

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=self.enabled):
                y = self.b(F.gelu(self.norm(self.a(x))))
                return (y.to(x.dtype) ** 2).mean()

    model, x = Mixed(), torch.randn(64, 8)
    eager, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    exact.enabled = False
    stepper = Stepper(trace_module_train(model, (x,), optimizer="sgd", lr=1.0))
    assert "bf16" in {v.type.dtype for _, op in stepper.module.walk() for v in op.results}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    stepper([x])
    eager(x).backward()
    exact(x.double()).backward()
    mine = theirs = 0.0
    for (n, p), q in zip(eager.named_parameters(), exact.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None and stepper.state[n].dtype == torch.float32
        mine += (before[n] - stepper.state[n] - q.grad).square().sum().item()
        theirs += (p.grad - q.grad).square().sum().item()
    assert mine <= 1.2 * theirs


def test_selection_by_values_is_refused_at_the_users_line() -> None:
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            rows = torch.where(x[:, 0] > 0)[0]
            return self.fc(x[rows]).mean()

    with pytest.raises(CompileError) as caught:
        trace_module_train(Routed(), (torch.randn(12, 8),))
    assert caught.value.code == "W0301" and caught.value.span is not None
    assert "torch.where" in caught.value.span.text
