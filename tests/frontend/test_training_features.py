"""What training programs do, on models of `transformers`: features x models, each equal to eager.

Each case runs three steps of a compiled train step beside eager in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from tests.frontend.zoo import build, tensors_of
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim import Optimizer

import weft
from weft.frontend.structure import flatten

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
    "averages": Feature(["gpt2"], averaged, change=Averaged),
}  # fmt: skip
CASES = [(name, model) for name, feature in FEATURES.items() for model in feature.models]


def made(name: str, model_name: str) -> tuple[Feature, nn.Module, Inputs]:
    feature = FEATURES[name]
    model, inputs = build(model_name)
    torch.manual_seed(1)
    return feature, feature.change(model), inputs


def differ(a: Any, b: Any) -> float:
    a, b = torch.as_tensor(a).detach().double(), torch.as_tensor(b).detach().double()
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-2))


@pytest.mark.parametrize(("name", "model_name"), CASES)
def test_steps_equal_eager(name: str, model_name: str) -> None:
    feature, ours, inputs = made(name, model_name)
    theirs = deepcopy(ours)
    mine, other = feature.optimizer(ours), feature.optimizer(theirs)
    compiled = weft.compile(feature.step)
    for _ in range(3):
        for group in (*mine.param_groups, *other.param_groups):
            group["lr"] *= 0.8  # as a schedule does
        got, want = compiled(ours, mine, inputs), feature.step(theirs, other, inputs)
        (results, _, shape), (expected, _, wanted) = flatten(got), flatten(want)
        assert repr(shape.body) == repr(wanted.body)
        assert max(map(differ, results, expected)) < 1e-5
    assert len(compiled.compiler.entries) == 1
    compiled.sync()
    for (key, value), held in zip(ours.state_dict().items(), theirs.state_dict().values()):
        assert differ(value, held) < 1e-4, key
    kept, wanted_states = mine.state_dict()["state"], other.state_dict()["state"]
    assert kept.keys() == wanted_states.keys()
    for number, state in wanted_states.items():
        assert kept[number].keys() == state.keys()
        for key, value in state.items():
            assert type(kept[number][key]) is type(value)
            assert differ(kept[number][key], value) < 1e-4, (number, key)

