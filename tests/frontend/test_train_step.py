"""Train steps beyond the common shape, optimizers, and what cannot be traced."""

from __future__ import annotations

import copy
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.frontend.stepping import Stepper
from torch import Tensor, nn

from weft.frontend.train_step import trace_module_train, trace_train_step
from weft.ir.errors import CompileError

Step = Callable[..., Any]


class Net(nn.Module):
    """Two layers in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)
        self.unused = nn.Parameter(torch.ones(2))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 3, (5,), generator=generator)


def plain(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Tensor:
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss


def clipped(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Tensor:
    optimizer.zero_grad()
    loss = 10 * F.cross_entropy(model(x), y)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()
    return loss.detach()


def accumulated(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Tensor:
    optimizer.zero_grad()
    total = torch.zeros((), dtype=x.dtype)
    for part in range(2):
        loss = F.cross_entropy(model(x[2 * part : 2 * part + 2]), y[2 * part : 2 * part + 2]) / 2
        loss.backward()
        total = total + loss.detach()
    optimizer.step()
    return total


def scaled(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Tensor:
    optimizer.zero_grad(set_to_none=False)
    loss = F.cross_entropy(model(x), y, label_smoothing=0.1)
    (loss * 8).backward()
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(1 / 8)
    optimizer.step()
    return loss


def check(
    step: Step, make: Callable[[Any], torch.optim.Optimizer], steps: int = 3,
    net: type[Net] = Net,
) -> Stepper:  # fmt: skip
    torch.manual_seed(0)
    model = net()
    reference = copy.deepcopy(model)
    stepper = Stepper(trace_train_step(step, model, make(model.parameters()), batch()))
    optimizer = make(reference.parameters())
    for number in range(steps):
        rate = optimizer.param_groups[0]["lr"] = 0.1 / (number + 1)
        mine = stepper(batch(), [rate] * len(optimizer.param_groups))
        torch.testing.assert_close(mine, step(reference, optimizer, *batch()).detach())
    assert stepper.worst(reference) < 1e-10
    return stepper


@pytest.mark.parametrize("step", [plain, clipped, accumulated, scaled])
def test_steps_that_work_on_gradients_equal_eager(step: Step) -> None:
    check(step, lambda p: torch.optim.AdamW(p, lr=0.1))


@pytest.mark.parametrize("make", [
    lambda p: torch.optim.SGD(p, lr=0.1),
    lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.2, weight_decay=0.01),
    lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, maximize=True),
    lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.02, betas=(0.8, 0.95)),
    lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1, eps=1e-6),
])  # fmt: skip
def test_optimizers_equal_torch_over_several_steps(make: Any) -> None:
    check(plain, make)


def test_a_parameter_without_gradient_is_left_alone() -> None:
    stepper = check(plain, lambda p: torch.optim.AdamW(p, lr=0.1))
    assert "exp_avg/unused" not in stepper.state and "unused" in stepper.state


def test_groups_have_their_own_rates_and_frozen_parameters_stay() -> None:
    torch.manual_seed(0)
    model = Net()
    model.first.weight.requires_grad_(False)
    reference = copy.deepcopy(model)

    def make(net: Net) -> torch.optim.Optimizer:
        groups = [{"params": list(net.first.parameters())},
                  {"params": list(net.second.parameters()), "weight_decay": 0.5}]  # fmt: skip
        return torch.optim.AdamW(groups, lr=0.1)

    stepper = Stepper(trace_train_step(plain, model, make(model), batch()))
    optimizer = make(reference)
    for rates in ([0.1, 0.01], [0.02, 0.3]):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        stepper(batch(), rates)
        plain(reference, optimizer, *batch())
    assert stepper.worst(reference) < 1e-12
    torch.testing.assert_close(stepper.state["first.weight"], reference.first.weight.detach())


def test_an_optimizer_that_has_stepped_goes_on_from_its_state() -> None:
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    plain(model, optimizer, *batch())
    stepper = Stepper(trace_train_step(plain, model, optimizer, batch()))
    assert stepper.state["step"].item() == 1
    stepper(batch())
    plain(model, optimizer, *batch())
    assert stepper.worst(model) < 1e-12


def test_tracing_leaves_model_and_optimizer_as_they_were() -> None:
    model = Net()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters())
    methods = torch.Tensor.backward, optimizer.step, torch.autograd.backward
    trace_train_step(plain, model, optimizer, batch())
    assert (torch.Tensor.backward, optimizer.step, torch.autograd.backward) == methods
    assert all(p.grad is None for p in model.parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name])


def test_no_gradient_flows_through_detach_and_no_grad() -> None:
    def step(model: Net, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Tensor:
        optimizer.zero_grad()
        with torch.no_grad():
            target = model(x).softmax(-1)
        scale = model.first.weight.norm().detach()
        loss = F.mse_loss(model(x), target) * scale + F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        return loss

    check(step, lambda p: torch.optim.SGD(p, lr=0.1))


def test_no_gradient_flows_out_of_a_no_grad_region_that_changes_buffers() -> None:
    class Normed(Net):
        """Counts its calls; one power iteration, as spectral norm has it."""

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros((), dtype=torch.float64))
            self.register_buffer("u", torch.ones(6, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            weight = self.first.weight
            with torch.no_grad():
                self.calls += 1
                scale = weight.T[0].square().sum()
                torch.div(weight @ weight.sum(0), weight.norm(), out=self.u)
            u = self.u.clone()
            return self.second(torch.tanh(self.first(x)) * (scale + u @ weight.sum(1)))

    check(plain, lambda p: torch.optim.SGD(p, lr=0.1), net=Normed)


# -- what cannot be traced ------------------------------------------------------------------------


def refused(step: Step, code: str, make: Any = None) -> str:
    model = Net()
    optimizer = (make or torch.optim.AdamW)(model.parameters())
    with pytest.raises(CompileError) as caught:
        trace_train_step(step, model, optimizer, batch())
    assert caught.value.code == code
    assert all(p.grad is None for p in model.parameters())
    return str(caught.value)


def test_control_flow_on_data_names_the_users_line() -> None:
    def step(model: Net, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Tensor:
        loss = F.cross_entropy(model(x), y)
        if loss > 1:  # here
            loss = loss / 2
        loss.backward()
        optimizer.step()
        return loss

    text = refused(step, "W0301")
    assert __file__ in text and "if loss > 1:  # here" in text and "torch.where" in text


def test_a_shape_that_depends_on_data_names_the_users_line() -> None:
    def step(model: Net, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Tensor:
        loss = model(x)[y > 0].sum()  # here
        loss.backward()
        optimizer.step()
        return loss

    text = refused(step, "W0301")
    assert __file__ in text and "# here" in text


@pytest.mark.parametrize("read", [
    lambda loss: loss.item(), lambda loss: float(loss), lambda loss: loss.detach().numpy(),
    lambda loss: [loss.item(), loss][1], lambda loss: loss if loss.item() > 0 else loss + 1,
    lambda loss: loss.tolist(),
])  # fmt: skip
def test_reading_the_loss_in_the_step_is_refused(read: Callable[[Tensor], Any]) -> None:
    def step(model: Net, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Any:
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        return read(loss)

    text = refused(step, "W0301")
    assert "try:" in text and f"at {__file__}:" in text


def test_changing_an_input_in_place_is_refused_by_its_name() -> None:
    def step(model: Net, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Tensor:
        return plain(model, optimizer, x.mul_(2), y)

    text = refused(step, "W0302")
    assert "changes x in place" in text and "x.mul_(2)" in text


def test_a_dtype_that_the_ir_lacks_is_refused() -> None:
    def step(model: Net, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Tensor:
        return plain(model, optimizer, torch.fft.fft(x).abs(), y)

    assert "complex128" in refused(step, "W0302")


@pytest.mark.parametrize("kind", ["no-step", "no-backward", "two-steps", "closure", "vector"])
def test_misused_optimizers_and_losses_are_refused(kind: str) -> None:
    def step(model: Net, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Tensor:
        loss = F.cross_entropy(model(x), y, reduction="none" if kind == "vector" else "mean")
        if kind != "no-backward":
            loss.backward()
        if kind == "closure":
            optimizer.step(lambda: 0.0)
        elif kind != "no-step":
            optimizer.step()
        if kind == "two-steps":
            optimizer.step()
        return loss

    assert "try:" in refused(step, "W0304")


def test_a_second_backward_on_gradients_is_refused() -> None:
    def step(model: Net, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Tensor:
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        penalty = sum(p.grad.square().sum() for p in model.parameters() if p.grad is not None)
        penalty.backward()
        optimizer.step()
        return loss

    refused(step, "W0304")


class Keeping(torch.optim.Optimizer):
    """Keeps what it knows where a plan cannot see it."""

    def __init__(self, params: Any, where: str) -> None:
        super().__init__(params, {"lr": 0.1})
        self.where, self.count = where, 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                if self.where == "first":
                    self.state[p].setdefault("sum", p.grad.clone())
                if self.where == "read" and bool(p.grad.norm() > 1):
                    p.mul_(0.5)
                p.add_(p.grad, alpha=-group["lr"])
        if self.where == "attribute":
            self.count += 1
        if self.where == "group":
            self.param_groups[0]["lr"] = self.param_groups[0]["lr"] * 0.5


@pytest.mark.parametrize(("where", "code"), [
    ("attribute", "W0303"), ("group", "W0303"), ("first", "W0303"), ("read", "W0301"),
])  # fmt: skip
def test_optimizers_that_cannot_be_traced_are_refused(where: str, code: str) -> None:
    text = refused(plain, code, lambda p: Keeping(p, where))
    assert "try:" in text and __file__ in text


def test_unknown_names_of_optimizers_are_refused() -> None:
    with pytest.raises(CompileError) as caught:
        trace_module_train(Net(), batch()[:1], optimizer="adamx")
    assert caught.value.code == "W0303" and "adamw" in str(caught.value)


def test_a_model_without_a_loss_is_refused() -> None:
    with pytest.raises(CompileError) as caught:
        trace_module_train(Net(), batch()[:1])
    assert caught.value.code == "W0304" and "loss" in str(caught.value)


def test_the_users_exception_is_their_own_with_their_frames_only() -> None:
    def helper(x: Tensor) -> None:
        raise KeyError("theirs")

    def step(model: Net, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Tensor:
        helper(x)
        return plain(model, optimizer, x, y)

    model = Net()
    with pytest.raises(KeyError, match="theirs") as caught:
        trace_train_step(step, model, torch.optim.AdamW(model.parameters()), batch())
    files = [frame.filename for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert files[-2:] == [__file__, __file__]
    assert not any("/torch/" in file for file in files)
    assert caught.value.__cause__ is None and caught.value.__suppress_context__


def test_a_wrong_shape_is_the_users_error_at_their_line() -> None:
    def step(model: Net, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Tensor:
        return plain(model, optimizer, x @ x, y)

    model = Net()
    with pytest.raises(RuntimeError) as caught:
        trace_train_step(step, model, torch.optim.AdamW(model.parameters()), batch())
    assert not isinstance(caught.value, CompileError)
    assert traceback.extract_tb(caught.value.__traceback__)[-1].filename == __file__
