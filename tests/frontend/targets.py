"""Targets of the command line's tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Net(nn.Module):
    """Two equal blocks and a loss."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return x.square().mean()


def net() -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """A module whose output is the loss; the batch does not divide by 4."""
    torch.manual_seed(0)
    return Net(), (torch.randn(10, 64),), {}


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> Tensor:
    """A train step."""
    loss: Tensor = model(x)
    loss.backward()
    optimizer.step()
    return loss


def sgd_step() -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """A train step with momentum."""
    module, (x,), _ = net()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    return step, (module, optimizer, x), {}


def raises() -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """A program with a mistake of its own."""

    def forward(x: Tensor) -> Tensor:
        return x @ torch.ones(3, 3)  # 64 columns against 3 rows

    return forward, (torch.randn(10, 64),), {}


def branches() -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """A program whose control flow depends on the data."""

    def forward(x: Tensor) -> Tensor:
        return x + 1 if x.sum() > 0 else x - 1

    return forward, (torch.randn(10, 64),), {}
