"""Train steps that are cut into micro-batches and stages: all in float64, batches of 5 rows."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weft.frontend.train_step import trace_train_step
from weft.ir.module import Module
from weft.passes.simplify import Simplify

BATCH, LENGTH, WIDTH, WORDS = 5, 4, 6, 11
#: (model, optimizer, step, batch)
Case = Callable[[], tuple[nn.Module, torch.optim.Optimizer, Callable[..., Tensor], tuple[Tensor, ...]]]


class Block(nn.Module):
    """A layer with a norm, two projections and dropout."""

    def __init__(self, width: int = WIDTH, p: float = 0.0) -> None:
        super().__init__()
        self.norm, self.drop = nn.LayerNorm(width), nn.Dropout(p)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.down(torch.relu(self.up(self.norm(x)))))


class Tied(nn.Module):
    """Embedding and head are one parameter; positions are a parameter, a mask is a buffer."""

    def __init__(self, p: float = 0.0, layers: int = 3) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, WIDTH), nn.Parameter(torch.randn(LENGTH, WIDTH))
        self.blocks = nn.ModuleList(Block(p=p) for _ in range(layers))
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids) + self.places[torch.arange(ids.shape[1])]
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Attention(nn.Module):
    """One transformer layer with a causal mask and dropout of the probabilities."""

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.p = p

    def forward(self, x: Tensor, seen: Tensor | None = None) -> Tensor:
        seen = x if seen is None else seen
        q, k, v = (
            f(t).unflatten(-1, (2, -1)).transpose(1, 2)
            for f, t in ((self.q, x), (self.k, seen), (self.v, seen))
        )
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=seen is x, dropout_p=self.p if self.training else 0.0
        )
        return x + out.transpose(1, 2).flatten(2)


class EncoderDecoder(nn.Module):
    """The decoder's layers all read the encoder's result."""

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(WORDS, WIDTH), nn.Embedding(WORDS, WIDTH)
        self.encoder = nn.ModuleList((Attention(p), Block(p=p)))
        self.decoder = nn.ModuleList((Attention(p), Attention(p), Block(), Attention(p)))
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(self, ids: Tensor, seen: Tensor) -> Tensor:
        memory, x = self.source(seen), self.target(ids)
        for layer in self.encoder:
            memory = layer(memory)
        for number, layer in enumerate(self.decoder):
            x = layer(x, memory) if number % 2 else layer(x)
        return self.head(x)


class TwoTower(nn.Module):
    """Two towers that meet in a score."""

    def __init__(self) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(WORDS, WIDTH), nn.Embedding(WORDS, WIDTH)
        self.left = nn.ModuleList(Block() for _ in range(2))
        self.right = nn.ModuleList(Block() for _ in range(2))

    def forward(self, users: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
        x, y = self.users(users), self.items(items)
        for one, two in zip(self.left, self.right, strict=True):
            x, y = one(x), two(y)
        return x, y


class Skips(nn.Module):
    """A U: each layer on the way down is added on the way up."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(Block() for _ in range(3))
        self.up = nn.ModuleList(Block() for _ in range(3))
        self.cls = nn.Parameter(torch.randn(1, 1, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat((self.cls.expand(x.shape[0], -1, -1), x), 1)
        kept = []
        for block in self.down:
            kept.append(x := block(x))
        for block in self.up:
            x = block(x) + kept.pop()
        return x[:, 0]


def _ids(*shape: int) -> Tensor:
    return torch.randint(0, WORDS, shape)


def _words_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=3)


def _case(
    model: nn.Module, loss: Callable[..., Tensor], batch: tuple[Tensor, ...], *, clip: float = 0.0,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW, parts: int = 1, **more: Any,
) -> tuple[nn.Module, torch.optim.Optimizer, Callable[..., Tensor], tuple[Tensor, ...]]:  # fmt: skip
    model = model.double()

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, *batch: Tensor) -> Any:
        optimizer.zero_grad()
        value = loss(model, *batch)
        first = value[0] if isinstance(value, tuple) else value
        first.backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        return value

    return model, optimizer(model.parameters(), lr=1e-2, **more), step, batch


def tied(p: float = 0.0, clip: float = 0.0) -> Any:
    """A language model; the labels hold some that are ignored."""
    loss = lambda m, ids, labels: _words_loss(m(ids), labels)  # noqa: E731
    return _case(Tied(p), loss, (_ids(BATCH, LENGTH), _ids(BATCH, LENGTH)), clip=clip)


def encoder_decoder(p: float) -> Any:
    loss = lambda m, ids, seen, labels: _words_loss(m(ids, seen), labels)  # noqa: E731
    batch = (_ids(BATCH, LENGTH), _ids(BATCH, LENGTH + 2), _ids(BATCH, LENGTH))
    return _case(EncoderDecoder(p), loss, batch, clip=0.5, optimizer=torch.optim.SGD, momentum=0.9)


def two_tower() -> Any:
    def loss(model: nn.Module, users: Tensor, items: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        x, y = model(users, items)
        score = (x * y).sum(-1)
        return F.mse_loss(score, wanted), score

    batch = (_ids(BATCH), _ids(BATCH), torch.randn(BATCH, dtype=torch.float64))
    return _case(TwoTower(), loss, batch, optimizer=torch.optim.Adam)


def contrastive() -> Any:
    """Each user's item against the others of the batch: this needs all of the batch."""

    def loss(model: nn.Module, users: Tensor, items: Tensor) -> Tensor:
        x, y = model(users, items)
        return F.cross_entropy(x @ y.T, torch.arange(x.shape[0]))

    return _case(TwoTower(), loss, (_ids(BATCH), _ids(BATCH)))


def normalized() -> Any:
    """Batch statistics need all of the batch."""
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, 1))
    loss = lambda m, x: m(x).square().mean()  # noqa: E731
    return _case(model, loss, (torch.randn(BATCH, WIDTH, dtype=torch.float64),))


def skips() -> Any:
    def loss(model: nn.Module, x: Tensor, wanted: Tensor) -> Tensor:
        decay = sum((p * p).sum() for p in model.parameters())
        return F.smooth_l1_loss(model(x), wanted) + 1e-3 * decay

    x = torch.randn(BATCH, LENGTH, WIDTH, dtype=torch.float64)
    wanted = torch.randn(BATCH, WIDTH, dtype=torch.float64)
    return _case(Skips(), loss, (x, wanted), optimizer=torch.optim.SGD)


def sequence_first() -> Any:
    """The batch is the second dim of the inputs."""

    def loss(model: nn.Module, x: Tensor, wanted: Tensor) -> Tensor:
        out = model(x.transpose(0, 1))
        return (out - wanted).square().sum(-1).mean()

    model = nn.Sequential(Attention(), Block(), Attention(), Block())
    x = torch.randn(LENGTH, BATCH, WIDTH, dtype=torch.float64)
    wanted = torch.randn(BATCH, LENGTH, WIDTH, dtype=torch.float64)
    return _case(model, loss, (x, wanted))


STEPS: dict[str, Callable[[], Any]] = {
    "tied": tied,
    "tied, clipped, dropout": lambda: tied(0.3, 0.1),
    "encoder-decoder": lambda: encoder_decoder(0.0),
    "encoder-decoder, dropout": lambda: encoder_decoder(0.2),
    "two towers": two_tower,
    "skips": skips,
    "sequence first": sequence_first,
}


def traced(case: Case) -> Any:
    """The traced step of a case."""
    torch.manual_seed(0)
    model, optimizer, step, batch = case()
    return trace_train_step(step, model, optimizer, batch), batch


@lru_cache(maxsize=None)
def logical(case: Case) -> tuple[Module, list[Tensor]]:
    """The differentiated module of a case, and a tensor for each entry parameter."""
    step, batch = traced(case)
    module = Simplify().run(step.module)
    entry = module.entry
    given = {**step.tensors, **dict(zip(step.input_names, batch, strict=True))}
    tensors = []
    for value, attrs in zip(entry.params, entry.param_attrs, strict=True):
        role, name = str(attrs["role"]), str(attrs.get("name", ""))
        if role == "seed":
            tensors.append(torch.tensor(7))
        elif role == "lr":
            tensors.append(torch.tensor(1e-2, dtype=torch.float64))
        elif role == "state":
            tensors.append(torch.full(value.type.shape, 2.0, dtype=torch.float64))
        else:
            tensors.append(given[name].detach())
    return module, tensors
