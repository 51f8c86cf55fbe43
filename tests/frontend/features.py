"""What training programs do, as steps, optimizers and changes of models of `transformers`.

A feature is tried on the models that make it hard: tied weights, batch norm, rotary positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from tests.frontend.zoo import build, tensors_of
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, parametrizations
from torch.optim import Optimizer

import weft
from weft.frontend.structure import flatten
from weft.frontend.train_step import TracedStep, trace_train_step

Inputs = dict[str, Any]
Step = Callable[[nn.Module, Optimizer, Inputs], Any]


def plain(model: nn.Module, optimizer: Optimizer, batch: Inputs) -> Tensor:
    loss: Tensor = model(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss


class Clipped(NamedTuple):
    loss: Tensor
    norm: Tensor


def clipped(model: nn.Module, optimizer: Optimizer, batch: Inputs) -> Clipped:
    """The norm is returned; gradients by their list."""
    optimizer.zero_grad(set_to_none=False)
    loss = model(**batch).loss
    loss.backward()
    norm = clip_grad_norm_(model.parameters(), 0.5, foreach=True)
    clip_grad_value_(model.parameters(), 0.05)
    optimizer.step()
    return Clipped(loss, norm)


def accumulated(model: nn.Module, optimizer: Optimizer, batch: Inputs) -> Tensor:
    """Two micro-batches, then an evaluation with the new parameters."""
    total = torch.zeros(())
    for part in range(2):
        inputs = {k: v[2 * part : 2 * part + 2] for k, v in tensors_of(batch).items()}
        loss = model(**inputs).loss / 2
        loss.backward()
        total = total + loss.detach()
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        return total + model(**batch).loss


def several(model: nn.Module, optimizer: Optimizer, batch: Inputs) -> dict[str, Tensor]:
    """Weighted losses of one forward, two backwards, another one of a second forward."""
    out = model(**batch)
    losses = {"task": out.loss, "size": out.logits.square().mean()}
    losses["task"].backward(retain_graph=True)
    torch.autograd.backward(0.01 * losses["size"])
    (0.1 * model(**batch).logits.mean()).backward()
    optimizer.step()
    optimizer.zero_grad()
    return losses


class Averaged(nn.Module):
    """A model and the moving average of its weights."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.average = model, deepcopy(model).requires_grad_(False)

    def forward(self, **batch: Any) -> Any:
        return self.model(**batch)


def averaged(model: nn.Module, optimizer: Optimizer, batch: Inputs) -> Tensor:
    loss = plain(model, optimizer, batch)
    with torch.no_grad():
        for kept, new in zip(model.average.parameters(), model.model.parameters(), strict=True):  # type: ignore[union-attr]
            kept.lerp_(new, 0.1)
    return loss


def constrained(model: nn.Module, optimizer: Optimizer, batch: Inputs) -> Tensor:
    """Weights are held in a range."""
    loss = plain(model, optimizer, batch)
    for parameter in model.parameters():
        parameter.data.clamp_(-0.03, 0.03)
    return loss


class Lion(Optimizer):
    """As its users write it (Chen et al., arXiv:2302.06675)."""

    def __init__(self, params: Any, lr: float, betas: tuple[float, float] = (0.9, 0.99)) -> None:
        super().__init__(params, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            slow, fast = group["betas"]
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if not state:
                    state["step"], state["exp_avg"] = 0, torch.zeros_like(p)
                state["step"] += 1
                update = state["exp_avg"] * slow + p.grad * (1 - slow)
                # tanh in place of the sign, which rounding may turn
                rate = group["lr"] / (1 + 0.1 * state["step"])
                p.add_(torch.tanh(update * 100), alpha=-rate)
                state["exp_avg"].lerp_(p.grad, 1 - fast)


def grouped(model: nn.Module) -> Optimizer:
    """No decay of vectors, another rate for them, the first matrix frozen."""
    next(p for p in model.parameters() if p.ndim > 1).requires_grad_(False)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    return torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1},
                              {"params": vectors, "weight_decay": 0.0, "lr": 3e-3}],
                             lr=1e-3, eps=1e-3)  # fmt: skip


def adam(model: nn.Module) -> Optimizer:
    return torch.optim.Adam(model.parameters(), lr=1e-3, eps=1e-3)


def of(kind: Callable[..., Optimizer], **settings: Any) -> Callable[[nn.Module], Optimizer]:
    return lambda model: kind(model.parameters(), **settings)


def checkpointed(model: nn.Module) -> nn.Module:
    model.gradient_checkpointing_enable()  # type: ignore[operator]
    return model


def normed(model: nn.Module) -> nn.Module:
    """Weight norm and spectral norm on the first layers that have matrices."""
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    parametrizations.weight_norm(layers[0])
    parametrizations.spectral_norm(layers[1])
    return model


@dataclass(frozen=True)
class Feature:
    """A step, its optimizer, a change of the model, and the models it is tried on."""

    models: Iterable[str]
    step: Step = plain
    optimizer: Callable[[nn.Module], Optimizer] = adam
    change: Callable[[nn.Module], nn.Module] = lambda model: model


FEATURES = {
    "groups and rates": Feature(["llama", "resnet"], optimizer=grouped),
    "clipping": Feature(["gpt2", "vit"], clipped),
    "accumulation": Feature(["bert"], accumulated),
    "several losses": Feature(["bert"], several),
    "averages": Feature(["gpt2", "resnet"], averaged, change=Averaged),
    "constraints": Feature(["llama"], constrained),
    "checkpointing": Feature(["llama"], change=checkpointed),
    "parametrizations": Feature(["vit"], change=normed),
    "RMSprop": Feature(["vit"], optimizer=of(
        torch.optim.RMSprop, lr=1e-3, eps=1e-3, momentum=0.9, centered=True)),
    "Adagrad": Feature(["gpt2"], optimizer=of(
        torch.optim.Adagrad, lr=1e-2, eps=1e-2, initial_accumulator_value=0.1)),
    "amsgrad": Feature(["resnet"], optimizer=of(
        torch.optim.AdamW, lr=1e-3, eps=1e-3, amsgrad=True)),
    "an optimizer of one's own": Feature(["llama", "resnet"], optimizer=of(Lion, lr=1e-3)),
}  # fmt: skip
#: each feature with each of its models
CASES = [(name, model) for name, feature in FEATURES.items() for model in feature.models]


def made(name: str, model_name: str) -> tuple[Feature, nn.Module, Inputs]:
    """A feature, its model and a batch, the same each time."""
    feature = FEATURES[name]
    model, inputs = build(model_name)
    torch.manual_seed(1)
    return feature, feature.change(model), inputs


def differ(mine: Any, theirs: Any) -> float:
    """The largest difference over the largest element."""
    a, b = torch.as_tensor(mine).detach().double(), torch.as_tensor(theirs).detach().double()
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-2))


def step_errors(name: str, model_name: str, steps: int = 3) -> dict[str, float]:
    """Errors of a compiled train step after some steps beside eager, in float32.

    Keys: results of the step, parameters and buffers, optimizer states. Structures, types and names
    are asserted to be equal, and that one plan served all learning rates.
    """
    feature, ours, inputs = made(name, model_name)
    theirs = deepcopy(ours)
    mine, other = feature.optimizer(ours), feature.optimizer(theirs)
    compiled = weft.compile(feature.step)
    results = 0.0
    for _ in range(steps):
        for group in (*mine.param_groups, *other.param_groups):
            group["lr"] *= 0.8  # as a schedule does
        got, want = compiled(ours, mine, inputs), feature.step(theirs, other, inputs)
        (made_here, _, shape), (expected, _, wanted) = flatten(got), flatten(want)
        assert repr(shape.body) == repr(wanted.body)
        results = max(results, *map(differ, made_here, expected))
    assert len(compiled.compiler.entries) == 1
    compiled.sync()
    held, expected_state = ours.state_dict(), theirs.state_dict()
    assert list(held) == list(expected_state)
    kept, wanted_states = mine.state_dict()["state"], other.state_dict()["state"]
    assert kept.keys() == wanted_states.keys()
    states = [0.0]
    for number, state in wanted_states.items():
        assert kept[number].keys() == state.keys()
        assert all(type(kept[number][key]) is type(value) for key, value in state.items())
        states += [differ(kept[number][key], value) for key, value in state.items()]
    return {
        "results": results,
        "parameters": max(differ(held[key], value) for key, value in expected_state.items()),
        "states": max(states),
    }


def traced(name: str, model_name: str) -> tuple[TracedStep, Inputs]:
    """The traced step of a feature, and its batch."""
    feature, model, inputs = made(name, model_name)
    return trace_train_step(feature.step, model, feature.optimizer(model), (inputs,)), inputs
