"""Train steps that the model zoo does not have equal eager PyTorch: convolutions with groups and
batch norm, torch's own encoder and decoder, nested inputs, parameter groups, frozen and tied
parameters, clipping, accumulation, a dataclass as output."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adam, AdamW, Optimizer

import weft
from weft.frontend.structure import flatten


class ConvNet(nn.Module):
    """Strided, grouped and dilated convolutions with batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 12, 3, stride=2, padding=1, groups=4, bias=False)
        self.second_norm = nn.BatchNorm2d(12)
        self.third = nn.Conv2d(12, 8, 3, dilation=2, padding=2)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.first(x))), 2)
        x = F.silu(self.second_norm(self.second(x)))
        out: Tensor = self.head(F.leaky_relu(self.third(x)).mean((2, 3)))
        return out


class Seq2Seq(nn.Module):
    """torch's own encoder-decoder transformer, embeddings tied to the output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, 16)
        self.body = nn.Transformer(16, 2, 1, 1, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, 30, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        padding = source == 0
        hidden = self.body(
            self.embedding(source), self.embedding(target), tgt_mask=mask, tgt_is_causal=True,
            src_key_padding_mask=padding, memory_key_padding_mask=padding,
        )  # fmt: skip
        out: Tensor = self.head(hidden)
        return out


@dataclass
class Pair:
    """What the two towers give."""

    scores: Tensor
    user: Tensor
    item: Tensor
    note: str = "towers"


class TwoTower(nn.Module):
    """A retrieval model: dicts in, a dataclass out, in-batch negatives."""

    def __init__(self) -> None:
        super().__init__()
        self.user = nn.Embedding(20, 8)
        self.age = nn.Linear(1, 8)
        self.item = nn.EmbeddingBag(40, 8, mode="mean")
        self.temperature = nn.Parameter(torch.tensor(0.5))

    def forward(self, batch: dict[str, dict[str, Tensor]]) -> Pair:
        user = self.user(batch["user"]["id"]) + self.age(batch["user"]["age"][:, None])
        item = self.item(batch["item"]["words"])
        user, item = F.normalize(user, dim=-1), F.normalize(item, dim=-1)
        return Pair(user @ item.T / self.temperature.exp(), user, item)


Step = Callable[..., Any]


@dataclass(frozen=True)
class Case:
    """A train step with what it needs.

    Attributes:
        model: makes the model.
        optimizer: makes the optimizer of a model.
        step: the train step.
        batch: makes a batch.
    """

    model: Callable[[], nn.Module]
    optimizer: Callable[[nn.Module], Optimizer]
    step: Step
    batch: Callable[[], tuple[Any, ...]]


def classify(model: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """A step that returns a dict."""
    optimizer.zero_grad()
    logits = model(x)
    loss = F.cross_entropy(logits, y, label_smoothing=0.1)
    loss.backward()
    optimizer.step()
    return {"loss": loss, "correct": (logits.argmax(-1) == y).sum()}


def images() -> tuple[Tensor, Tensor]:
    return torch.randn(10, 3, 8, 8), torch.randint(0, 5, (10,))


def conv_optimizer(model: nn.Module) -> Optimizer:
    norms = [p for p in model.parameters() if p.ndim == 1]
    rest = [p for p in model.parameters() if p.ndim > 1]
    return SGD([{"params": rest, "weight_decay": 1e-2}, {"params": norms, "lr": 0.02}],
               lr=0.05, momentum=0.9, nesterov=True)  # fmt: skip


def translate(model: nn.Module, optimizer: Optimizer, source: Tensor, target: Tensor) -> Tensor:
    """Two micro-batches, gradients clipped."""
    optimizer.zero_grad()
    total = torch.zeros(())
    for src, tgt in zip(source.chunk(2), target.chunk(2)):
        logits = model(src, tgt[:, :-1])
        loss = F.cross_entropy(logits.transpose(1, 2), tgt[:, 1:], ignore_index=0) / 2
        loss.backward()
        total = total + loss.detach()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()
    return total


def sentences() -> tuple[Tensor, Tensor]:
    source = torch.randint(1, 30, (6, 7))
    source[:, -2:] = 0
    return source, torch.randint(0, 30, (6, 6))


def decayed(model: nn.Module) -> Optimizer:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1},
              {"params": vectors, "weight_decay": 0.0, "lr": 3e-3}]  # fmt: skip
    return AdamW(groups, lr=1e-3, eps=1e-3)  # a key's bias has a gradient of rounding only


def two_tower() -> nn.Module:
    model = TwoTower()
    model.user.weight.requires_grad_(False)
    return model


def trained(model: nn.Module) -> Optimizer:
    return Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def contrast(model: nn.Module, optimizer: Optimizer, batch: Any) -> Pair:
    """Returns the model's own dataclass."""
    out: Pair = model(batch)
    labels = torch.arange(out.scores.shape[0])
    loss = F.cross_entropy(out.scores, labels) + F.cross_entropy(out.scores.T, labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return Pair(loss, out.user, out.item)


def purchases() -> tuple[Any, ...]:
    user = {"id": torch.randint(0, 20, (6,)), "age": torch.rand(6)}
    return ({"user": user, "item": {"words": torch.randint(0, 40, (6, 3))}},)


CASES = {
    "conv": Case(ConvNet, conv_optimizer, classify, images),
    "seq2seq": Case(Seq2Seq, decayed, translate, sentences),
    "towers": Case(two_tower, trained, contrast, purchases),
}


def differ(a: Any, b: Any) -> float:
    a, b = torch.as_tensor(a).detach().double(), torch.as_tensor(b).detach().double()
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-3))


@pytest.mark.filterwarnings("ignore:.*nested tensors.*")
@pytest.mark.parametrize("name", CASES)
def test_the_compiled_step_equals_eager(name: str) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    ours = case.model()
    theirs = deepcopy(ours)
    mine, other = case.optimizer(ours), case.optimizer(theirs)
    compiled = weft.compile(case.step)
    for _ in range(3):
        for group in (*mine.param_groups, *other.param_groups):
            group["lr"] *= 0.9
        batch = case.batch()
        got, want = compiled(ours, mine, *batch), case.step(theirs, other, *batch)
        (ours_out, _, made), (theirs_out, _, wanted) = flatten(got), flatten(want)
        assert repr(made.body) == repr(wanted.body)
        assert max(map(differ, ours_out, theirs_out)) < 1e-5
    assert len(compiled.step.compiler.entries) == 1
    compiled.sync()
    for (key, value), expected in zip(ours.state_dict().items(), theirs.state_dict().values()):
        assert differ(value, expected) < 1e-4, key
    states, expected_states = mine.state_dict()["state"], other.state_dict()["state"]
    assert states.keys() == expected_states.keys()
    for number, state in expected_states.items():
        assert states[number].keys() == state.keys()
        assert all(differ(states[number][key], value) < 1e-4 for key, value in state.items())
