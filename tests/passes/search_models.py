"""Train steps with repeated blocks, outlined and differentiated as the driver does it."""

from __future__ import annotations

from functools import lru_cache

import torch
from tests.passes.pipeline_models import Block
from torch import Tensor, nn

from weft.frontend.driver import logical_passes
from weft.frontend.pass_table import ALL_PASSES
from weft.frontend.train_step import trace_train_step
from weft.ir.module import Module
from weft.passes.manager import PassManager
from weft.passes.pipeline import parse_pipeline


class Stack(nn.Module):
    """Equal blocks between two projections."""

    def __init__(self, layers: int, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.first = nn.Linear(4, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(layers))
        self.last = nn.Linear(width, 3)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return self.last(x)


@lru_cache(maxsize=None)
def stack(
    layers: int = 6, width: int = 6, rows: int = 8, dtype: torch.dtype = torch.float64,
    device: str = "cpu",
) -> tuple[Module, list[Tensor]]:  # fmt: skip
    """The logical module of a step with SGD, and a tensor for each entry parameter."""
    torch.manual_seed(0)
    model = Stack(layers, width, dtype).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)

    def step(
        model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, wanted: Tensor
    ) -> Tensor:
        loss = (model(x) - wanted).square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        return loss

    batch = tuple(torch.randn(rows, 5, n, dtype=dtype, device=device) for n in (4, 3))
    traced = trace_train_step(step, model, optimizer, batch)
    module = PassManager(parse_pipeline(logical_passes("train"), ALL_PASSES)).run(traced.marked)
    given = {**traced.tensors, **dict(zip(traced.input_names, batch, strict=True))}
    tensors = []
    for value, attrs in zip(module.entry.params, module.entry.param_attrs, strict=True):
        name = str(attrs.get("name", ""))
        if name in given:
            tensors.append(given[name].detach())
        else:  # the learning rate, and how many steps there were
            full = torch.full(value.type.shape, 1e-2, dtype=torch.float64)
            tensors.append(full.to(dtype) if value.type.dtype.startswith("f") else full.long())
    return module, tensors
