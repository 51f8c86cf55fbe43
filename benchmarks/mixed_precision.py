"""Under bf16 autocast, which is nearer to float64: a compiled train step or eager PyTorch?

    python benchmarks/mixed_precision.py [--quick] [--json FILE]

Small models of transformers (`tests/frontend/zoo.py`) with several random weights and batches. The
gradients of all parameters are compared with those in float64, from the same float32 weights: the
root mean square of the differences over that of the gradients. One step of plain gradient descent
shows a gradient: rate 1024, a power of two. Also the loss's error, relative.
"""

from __future__ import annotations

import logging
import sys
import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from rows import Row, arguments, finish, show
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.frontend.stepping import RATE
from tests.frontend.zoo import ALL, Example, tensors_of

import weft

MODELS = ["gpt2", "llama"]
Gradients = dict[str, Tensor]


def example(name: str, seed: int) -> Example:
    """A model of the zoo with other weights and another batch for each seed."""
    torch.manual_seed(seed)
    model, inputs = ALL[name]()
    return model.train(), inputs


def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, Any]) -> Tensor:
    """Forward under autocast, backward, update."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss: Tensor = model(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss


def in_float64(model: nn.Module, inputs: dict[str, Any]) -> tuple[float, Gradients]:
    """The exact loss and gradients."""
    exact = deepcopy(model).double()
    loss = exact(**inputs).loss
    loss.backward()
    found = {n: p.grad for n, p in exact.named_parameters() if p.grad is not None}
    return float(loss), found


def by_step(run: Any, model: nn.Module, inputs: dict[str, Any]) -> tuple[float, Gradients]:
    """The loss and gradients of a step, eager or compiled."""
    used = deepcopy(model)
    loss = run(used, torch.optim.SGD(used.parameters(), lr=RATE), inputs)
    before = dict(model.named_parameters())
    return float(loss), {
        name: (before[name].detach().double() - p.detach().double()) / RATE
        for name, p in used.named_parameters()
    }  # fmt: skip


def error(mine: Gradients, exact: Gradients) -> float:
    """Root mean square of the differences over that of the gradients."""
    apart = sum(float((mine[name] - g).square().sum()) for name, g in exact.items())
    return float((apart / sum(float(g.square().sum()) for g in exact.values())) ** 0.5)


def measure(name: str, seeds: int) -> list[Row]:
    """Errors of gradients and loss, the root mean squares over the seeds."""
    squares = dict.fromkeys(("ours", "eager", "our loss", "eager loss"), 0.0)
    for seed in range(seeds):
        model, inputs = example(name, seed)
        assert len(tensors_of(inputs)) == len(inputs)
        loss, exact = in_float64(model, inputs)
        compiled = weft.compile(step)
        for who, run in (("ours", compiled), ("eager", step)):
            found, grads = by_step(run, model, inputs)
            squares[who] += error(grads, exact) ** 2 / seeds
            key = "our loss" if who == "ours" else "eager loss"
            squares[key] += (found / loss - 1) ** 2 / seeds
    errors = {key: value**0.5 for key, value in squares.items()}
    return [
        Row(f"{name} gradients", errors["ours"], "relative", 1.1 * errors["eager"],
            f"eager {errors['eager']:.2e}"),
        Row(f"{name} loss", errors["our loss"], "relative", None,
            f"eager {errors['eager loss']:.2e}"),
    ]  # fmt: skip


def main() -> int:
    """Measure, print, write; 1 when a target is missed."""
    options = arguments(__doc__, "two seeds").parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    rows = [row for name in MODELS for row in measure(name, 2 if options.quick else 8)]
    show(rows)
    return finish(rows, options.json)


if __name__ == "__main__":
    sys.exit(main())
