"""Five models for the comparison of plans, each with its tensor-parallel plan as an expert writes it.

They differ in what a good plan has to weigh: bytes of parameters against bytes of activations.
All compute a mean over the batch, so that equal shards of it give the same loss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel
from torch.nn import functional as F

#: module name (with * for a number) -> how its weights are split
Styles = dict[str, ParallelStyle]


class FeedForward(nn.Module):
    """A residual feed-forward block."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> the same."""
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Attention(nn.Module):
    """Residual self-attention; the number of heads follows from the width that a rank has."""

    def __init__(self, width: int, head: int, causal: bool) -> None:
        super().__init__()
        self.head, self.causal = head, causal
        self.norm = nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """[batch, time, width] -> the same."""
        y = self.norm(x)
        q, k, v = (m(y).unflatten(-1, (-1, self.head)).transpose(1, 2)
                   for m in (self.q, self.k, self.v))  # fmt: skip
        out = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return x + self.o(out.transpose(1, 2).flatten(2))


class Net(nn.Module):
    """Blocks in a row, the square of the distance to y as loss."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The loss."""
        for block in self.blocks:
            x = block(x)
        return F.mse_loss(x, y)


class Language(nn.Module):
    """A small language model with a large vocabulary."""

    def __init__(self, vocabulary: int, width: int, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(blocks)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        """The loss."""
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), labels.flatten())


class Mixer(nn.Module):
    """An MLP-Mixer block (Tolstikhin et al., 2021)."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.tokens, self.channels = FeedForward(tokens, 2 * tokens), FeedForward(width, 4 * width)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, tokens, width] -> the same."""
        return self.channels(self.tokens(x.transpose(1, 2)).transpose(1, 2))


def _feed_forward(prefix: str) -> Styles:
    return {f"{prefix}up": ColwiseParallel(), f"{prefix}down": RowwiseParallel()}


def _attention(prefix: str) -> Styles:
    return {f"{prefix}{n}": ColwiseParallel() for n in "qkv"} | {f"{prefix}o": RowwiseParallel()}


def _pairs(count: int, width: int, head: int, inner: int, causal: bool) -> list[nn.Module]:
    out: list[nn.Module] = []
    for _ in range(count):
        out += [Attention(width, head, causal), FeedForward(width, inner)]
    return out


def _pair_styles(count: int) -> Styles:
    out: Styles = {}
    for number in range(count):
        out |= _attention(f"blocks.{2 * number}.") | _feed_forward(f"blocks.{2 * number + 1}.")
    return out


def _random(*shape: int) -> Callable[[], tuple[Tensor, Tensor]]:
    return lambda: (torch.randn(shape), torch.randn(shape))


def _ids(*shape: int, vocabulary: int) -> Callable[[], tuple[Tensor, Tensor]]:
    return lambda: (torch.randint(vocabulary, shape), torch.randint(vocabulary, shape))


@dataclass(frozen=True)
class Example:
    """A model.

    Attributes:
        make: the model, with random weights.
        batch: its inputs, the first dim is the batch.
        styles: Megatron's plan for it (Shoeybi et al., 2019) in torch's words.
    """

    make: Callable[[], nn.Module]
    batch: Callable[[], tuple[Tensor, Tensor]]
    styles: Callable[[], Styles]


EXAMPLES = {
    # many parameters, few activations
    "wide": Example(
        lambda: Net([FeedForward(512, 2048) for _ in range(3)]), _random(64, 512),
        lambda: {k: v for i in range(3) for k, v in _feed_forward(f"blocks.{i}.").items()}),
    "llama": Example(
        lambda: Net(_pairs(2, 256, 32, 768, True)), _random(8, 64, 256), lambda: _pair_styles(2)),
    "vocabulary": Example(
        lambda: Language(8192, 128, _pairs(1, 128, 32, 512, True)),
        _ids(8, 32, vocabulary=8192),
        lambda: _pair_styles(1) | {
            "embed": RowwiseParallel(input_layouts=Replicate()),
            "head": ColwiseParallel(output_layouts=Replicate())}),
    "mixer": Example(
        lambda: Net([Mixer(64, 192) for _ in range(2)]), _random(16, 64, 192),
        lambda: {k: v for i in range(2) for k, v in _feed_forward(f"blocks.{i}.channels.").items()}),
    # few parameters, many activations
    "long": Example(
        lambda: Net(_pairs(2, 64, 16, 128, False)), _random(16, 256, 64), lambda: _pair_styles(2)),
}  # fmt: skip


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Tensor:
    """A train step."""
    loss: Tensor = model(x, y)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    optimizer.zero_grad()
    return loss


def made(name: str) -> tuple[nn.Module, torch.optim.Optimizer, tuple[Tensor, Tensor]]:
    """Model, optimizer and batch, the same in every process."""
    torch.manual_seed(0)
    example = EXAMPLES[name]
    model = example.make()
    return model, optimizer_of(model), example.batch()


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """What trains all of them."""
    return torch.optim.AdamW(model.parameters(), lr=1e-3)
