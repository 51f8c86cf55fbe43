"""`@weft.compile` on classes, instances, functions and train steps equals eager PyTorch."""

from __future__ import annotations

import logging
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weft
from weft.frontend.compiled_module import CompiledModule


class Net(nn.Module):
    """Two layers with batch norm, so that there are buffers."""

    def __init__(self) -> None:
        super().__init__()
        # no bias before a norm: its gradient is rounding, which Adam would blow up
        self.first, self.norm = nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8)
        self.second = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(torch.tanh(self.norm(self.first(x))))
        return out


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def batch(rows: int = 10) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, 6), torch.randint(0, 3, (rows,))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Tensor:
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss


def close(a: Tensor, b: Tensor, limit: float = 1e-5) -> bool:
    a, b = a.detach(), b.detach()
    return bool((a - b).abs().max() <= limit * max(1e-3, float(b.abs().max())))


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_train_step_equals_eager_and_the_model_follows(name: str) -> None:
    ours, theirs = net(), net()
    mine, other = OPTIMIZERS[name](ours.parameters()), OPTIMIZERS[name](theirs.parameters())
    compiled = weft.compile(step, progress=False)
    for number in range(4):
        for optimizer in (mine, other):  # a schedule: nothing is planned again
            optimizer.param_groups[0]["lr"] = 0.01 * (number + 1)
        x, y = batch()
        assert close(compiled(ours, mine, x, y), step(theirs, other, x, y))
    assert len(compiled.compiler.entries) == 1
    for (key, value), wanted in zip(ours.state_dict().items(), theirs.state_dict().values()):
        assert close(value.float(), wanted.float(), 1e-4), key
    compiled.sync()
    for p, q in zip(ours.parameters(), theirs.parameters()):
        for key in set(other.state[q]) & set(mine.state[p]) - {"step"}:
            assert close(mine.state[p][key], other.state[q][key], 1e-4), key


def test_the_state_of_a_used_optimizer_is_taken_over() -> None:
    ours, theirs = net(), net()
    mine, other = OPTIMIZERS["adamw"](ours.parameters()), OPTIMIZERS["adamw"](theirs.parameters())
    x, y = batch()
    for model, optimizer in ((ours, mine), (theirs, other)):
        step(model, optimizer, x, y)
    assert close(weft.compile(step)(ours, mine, x, y), step(theirs, other, x, y))
    assert close(weft.compile(step)(ours, mine, x, y), step(theirs, other, x, y), 1e-3)


def test_a_plan_that_gives_its_state_to_another_does_not_keep_a_copy() -> None:
    ours, theirs = net(), net()
    mine, other = (OPTIMIZERS["sgd"](m.parameters()) for m in (ours, theirs))
    compiled, data = weft.compile(step), batch()

    def steps(learns: bool) -> None:
        for model in (ours, theirs):
            model.second.requires_grad_(learns)
        for _ in range(2):
            assert close(compiled(ours, mine, *data), step(theirs, other, *data))

    steps(False)
    frozen = compiled.step._entry("plan").running
    steps(True)  # has the states of the frozen layer besides
    assert all(tensor.is_meta for tensor in frozen.executor.state)
    steps(False)
    assert not any(tensor.is_meta for tensor in frozen.executor.state)
    for p, q in zip(ours.parameters(), theirs.parameters()):
        assert close(p, q, 1e-4)


def test_another_shape_plans_again_and_the_log_says_which(caplog: pytest.LogCaptureFixture) -> None:
    ours, theirs = net(), net()
    mine, other = OPTIMIZERS["sgd"](ours.parameters()), OPTIMIZERS["sgd"](theirs.parameters())
    compiled = weft.compile(step)
    with caplog.at_level(logging.INFO, "weft.recompiles"):
        for rows in (10, 7, 10):  # momentum moves from plan to plan
            x, y = batch(rows)
            assert close(compiled(ours, mine, x, y), step(theirs, other, x, y))
    assert len(compiled.compiler.entries) == 2
    assert "x.shape[0] was 10, now it is 7; y.shape[0] was 10, now it is 7" in caplog.text
    assert "torch._dynamo.mark_dynamic(x, 0) and torch._dynamo.mark_dynamic(y, 0)" in caplog.text


def test_a_module_with_an_outer_loss_gets_eager_gradients() -> None:
    ours, theirs = net(), net()
    compiled = weft.compile(ours)
    x, y = batch()
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    for model, inputs in ((compiled, a), (theirs, b)):
        out = model(inputs)
        (nn.functional.cross_entropy(out, y) + out.square().sum() * 0.1).backward()
    assert close(a.grad, b.grad)  # type: ignore[arg-type]
    for (key, p), q in zip(ours.named_parameters(), theirs.parameters()):
        assert close(p.grad, q.grad, 1e-4), key  # type: ignore[arg-type]
    assert close(ours.norm.running_mean, theirs.norm.running_mean)  # type: ignore[arg-type]


def test_a_module_is_called_twice_before_its_backward() -> None:
    ours, theirs = net(), net()
    compiled = weft.compile(ours)
    x, y = batch()
    for model in (compiled, theirs):
        first = nn.functional.cross_entropy(model(x), y)
        (first + model(x.flip(0)).square().mean()).backward()
    for (key, p), q in zip(ours.named_parameters(), theirs.parameters()):
        assert close(p.grad, q.grad, 1e-4), key  # type: ignore[arg-type]
    loss = compiled(x).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(weft.RunError, match="runs a second time"):
        loss.backward()


class Tracking(nn.Module):
    """A buffer that the backward needs as it was, and that the forward replaces."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("mean", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        old = self.mean.clone()
        out: Tensor = self.linear(x) * old * old.sin()
        self.mean.mul_(0.5).add_(out.detach().mean(0))
        return out


RANDOM = "simplify,outline,random-place[seed={} mesh=1],lower,fuse,schedule"


@pytest.mark.parametrize("pipeline", ["", RANDOM.format(1), RANDOM.format(2)])
def test_buffers_are_new_after_the_forward_and_old_in_the_backward(pipeline: str) -> None:
    torch.manual_seed(0)
    ours = Tracking()
    theirs = deepcopy(ours)
    compiled = weft.compile(ours, pipeline=pipeline)
    x = torch.randn(3, 4)
    for _ in range(2):
        losses = [model(x).square().sum() for model in (compiled, theirs)]
        assert close(ours.mean, theirs.mean)
        for loss in losses:
            loss.backward()
    assert close(ours.linear.weight.grad, theirs.linear.weight.grad)  # type: ignore[arg-type]


def test_a_module_follows_its_parameters_and_its_mode() -> None:
    ours = net()
    compiled = weft.compile(ours)
    x, _ = batch()
    with torch.no_grad():
        compiled.eval()
        assert close(compiled(x), deepcopy(ours)(x))
        ours.second.weight.mul_(2.0)
        assert close(compiled(x), deepcopy(ours)(x))
        compiled.train()
        assert close(compiled(x), deepcopy(ours).train()(x))
    assert compiled.first is ours.first


def test_a_class_is_compiled_and_stays_itself() -> None:
    Compiled = weft.compile(Net)
    torch.manual_seed(0)
    model = Compiled()
    x, _ = batch()
    assert isinstance(model, Net) and Compiled.__name__ == "Net"
    assert close(model(x), net()(x))
    assert list(model.state_dict()) == list(Net().state_dict())
    assert isinstance(model._weft, CompiledModule)


def test_a_plain_function_with_nested_inputs_and_outputs() -> None:
    @weft.compile
    def combine(data: dict[str, Any], scale: float = 2.0) -> dict[str, Any]:
        return {"sum": data["a"] + data["b"][0], "list": [data["a"] * scale]}

    a, b = torch.randn(3, 4), torch.randn(4)
    out = combine({"a": a, "b": [b]}, scale=3.0)
    assert close(out["sum"], a + b) and close(out["list"][0], a * 3.0)
    assert combine.plan.mesh.size == 1


def test_dropout_draws_anew_in_each_step_and_repeats_under_a_seed() -> None:
    def draw() -> list[Tensor]:
        torch.manual_seed(3)
        compiled = weft.compile(nn.Dropout(0.5))
        return [compiled(torch.ones(64)) for _ in range(2)]

    first, second = draw(), draw()
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert not torch.equal(first[0], first[1])


def test_another_model_for_the_same_step_is_refused() -> None:
    compiled = weft.compile(step)
    first, second = net(), net()
    compiled(first, torch.optim.SGD(first.parameters(), lr=0.1), *batch())
    with pytest.raises(weft.CompileError, match="another model"):
        compiled(second, torch.optim.SGD(second.parameters(), lr=0.1), *batch())


def test_what_cannot_be_compiled_is_said() -> None:
    with pytest.raises(weft.CompileError, match="cannot compile int"):
        weft.compile(3)
    with pytest.raises(weft.CompileError, match="did you mean 'cluster'"):
        weft.compile(net(), clustr="2x2:cpu")
    with pytest.raises(weft.CompileError, match="the plan is for 4 ranks"):
        weft.compile(net(), cluster="2x2:cpu")(batch()[0])
