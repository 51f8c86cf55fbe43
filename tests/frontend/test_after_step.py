"""What a train step does behind optimizer.step() sees the new parameters, by whatever way."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weft
from weft.frontend import train_step
from weft.frontend.structure import flatten

Step = Callable[[nn.Module, torch.optim.Optimizer, Tensor], Any]


def _trained(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> Tensor:
    optimizer.zero_grad()
    loss: Tensor = model(x).square().mean()
    loss.backward()
    optimizer.step()
    return loss


def reads_nothing(model: Any, optimizer: torch.optim.Optimizer, x: Tensor) -> Any:
    return _trained(model, optimizer, x).detach() * 2


def returns_a_parameter(model: Any, optimizer: torch.optim.Optimizer, x: Tensor) -> Any:
    return _trained(model, optimizer, x), {"weight": model[0].weight}


def returns_an_earlier_view(model: Any, optimizer: torch.optim.Optimizer, x: Tensor) -> Any:
    view = model[0].weight.detach().t()
    return _trained(model, optimizer, x), view


def reads_an_earlier_view(model: Any, optimizer: torch.optim.Optimizer, x: Tensor) -> Any:
    views = [p.detach().view(-1) for p in model.parameters()]
    loss = _trained(model, optimizer, x)
    return loss, torch.cat(views).norm()


def evaluates(model: Any, optimizer: torch.optim.Optimizer, x: Tensor) -> Any:
    loss = _trained(model, optimizer, x)
    with torch.no_grad():
        return loss, model(x).mean()


def changes_gradients(model: Any, optimizer: torch.optim.Optimizer, x: Tensor) -> Any:
    loss = _trained(model, optimizer, x)
    norm = model[0].weight.grad.norm()
    for p in model.parameters():
        p.grad.zero_()
    return loss, norm


def changes_parameters(model: Any, optimizer: torch.optim.Optimizer, x: Tensor) -> Any:
    loss = _trained(model, optimizer, x)
    model[1].weight.data.clamp_(-0.1, 0.1)
    return loss


def asks_for_shapes(model: Any, optimizer: torch.optim.Optimizer, x: Tensor) -> Any:
    loss = _trained(model, optimizer, x)
    for p in model.parameters():
        assert p.grad is not None and p.grad.shape == p.shape
        p.grad = None
    return loss


STEPS: tuple[tuple[Step, bool], ...] = (
    (reads_nothing, False), (asks_for_shapes, False), (returns_a_parameter, True),
    (returns_an_earlier_view, True), (reads_an_earlier_view, True), (evaluates, True), (changes_gradients, True),
    (changes_parameters, True),
)  # fmt: skip


@pytest.mark.parametrize(("step", "reads"), STEPS, ids=lambda x: getattr(x, "__name__", ""))
def test_a_step_equals_eager(step: Step, reads: bool) -> None:
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)).double()
    theirs, x = deepcopy(ours), torch.randn(3, 4, dtype=torch.float64)
    mine, other = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (ours, theirs))
    compiled = weft.compile(step)
    for _ in range(2):
        got, want = flatten(compiled(ours, mine, x))[0], flatten(step(theirs, other, x))[0]
        for value, expected in zip(got, want, strict=True):
            torch.testing.assert_close(value.detach(), expected.detach())
    compiled.sync()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_new_parameters_are_written_only_for_who_reads_them() -> None:


    for step, reads in STEPS:
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        work = train_step._StepCapture(step, model, optimizer, (torch.randn(3, 4),), {})
        program, _, _ = work._run((), None)
        written = [n for n in program.graph.nodes if "weft.updated" in str(n.target)]
        assert bool(written) == reads, step
