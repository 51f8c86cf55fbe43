"""Running traced programs in the reference interpreter, step after step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from weft.frontend.train_step import TracedStep
from weft.ir.module import Module
from weft.ir.verify import verify
from weft.runtime.context import TORCH_DTYPES
from weft.runtime.interpreter import evaluate

#: a power of two, so that a step of plain gradient descent shows gradients of any size
RATE = 1024.0


class Stepper:
    """Holds the state of a traced step; each call is one step."""

    def __init__(self, traced: TracedStep) -> None:
        verify(traced.module)
        self.traced, self.module = traced, traced.module
        self.state: dict[str, Tensor] = {}
        entry = traced.module.entry
        for value, attrs in zip(entry.params, entry.param_attrs, strict=True):
            name = str(attrs["name"])
            if name in traced.tensors:
                self.state[name] = traced.tensors[name].detach().clone()
            elif attrs["role"] == "state":
                self.state[name] = torch.zeros(value.type.shape, dtype=TORCH_DTYPES[value.type.dtype])

    def __call__(
        self, inputs: Sequence[Tensor], rates: Sequence[float] | None = None, seed: int = 0
    ) -> Tensor:
        """One step; returns the loss."""
        entry = self.module.entry
        given = iter(inputs)
        rate = iter(self.traced.rates if rates is None else rates)
        values = []
        for attrs in entry.param_attrs:
            match attrs["role"]:
                case "input":
                    values.append(next(given))
                case "lr":
                    values.append(torch.tensor(next(rate), dtype=torch.float64))
                case "seed":
                    values.append(torch.tensor(seed))
                case _:
                    values.append(self.state[str(attrs["name"])])
        loss = None
        for value, attrs in zip(evaluate(self.module, values), entry.result_attrs, strict=True):
            if attrs["role"] == "loss":
                loss = value
            elif attrs["role"] == "update":
                self.state[str(attrs["updates"])] = value
        assert loss is not None
        return loss

    def worst(self, model: torch.nn.Module) -> float:
        """The largest difference to the parameters and buffers of a model, relative to each."""
        theirs = dict(model.named_buffers()) | dict(model.named_parameters())
        return max(
            ((mine - theirs[name]).abs().max() / theirs[name].abs().max().clamp_min(1e-3)).item()
            for name, mine in self.state.items()
            if name in theirs
        )


def entry_values(
    module: Module, tensors: dict[str, Tensor], inputs: Sequence[Tensor], seed: int = 0
) -> list[Tensor]:
    """Operands of a forward entry."""
    given = iter(inputs)
    table = {"input": lambda name: next(given), "seed": lambda name: torch.tensor(seed)}
    return [
        table.get(str(a["role"]), lambda name: tensors[name].detach())(str(a["name"]))
        for a in module.entry.param_attrs
    ]
