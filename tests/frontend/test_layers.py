"""Recurrent layers, attention, bags of embeddings: train steps equal eager, on one rank and four."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from tests.frontend.stepping import RATE, Stepper
from tests.passes.equality import assert_equal_on_ranks
from torch import Tensor, nn

from weft.frontend.train_step import trace_module_train
from weft.frontend.verify import random_inputs
from weft.passes.random_place import parse_mesh
from weft.runtime.interpreter import evaluate


class Rows(nn.Module):
    """A layer on a batch of sequences, and a loss of its first result."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        result = self.layer(x)
        out = result[0] if isinstance(result, tuple) else result
        ramp = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)
        return {"loss": (out * ramp).sum()}


class Loop(nn.Module):
    """A cell in a loop of Python."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[0], 8)
        for step in range(x.shape[1]):
            h = self.cell(x[:, step], h)
        return h


class Attention(nn.Module):
    """An encoder with padding, and a decoder that sees the past only."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True)
        self.decoder = nn.TransformerDecoderLayer(4, 2, 8, 0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        padding = torch.arange(5)[None] >= torch.tensor([5, 4, 3, 5])[:, None]
        future = torch.ones(5, 5, dtype=torch.bool).triu(1)
        encoded = self.encoder(x, src_key_padding_mask=padding)
        out: Tensor = self.decoder(x, encoded, tgt_mask=future, memory_key_padding_mask=padding)
        return out


class Bags(nn.Module):
    """Rows of words, and bags of different lengths with weights that need a gradient."""

    words: Tensor
    sum: nn.EmbeddingBag

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.EmbeddingBag(20, 4, mode="mean", padding_idx=1)
        self.max = nn.EmbeddingBag(20, 4, mode="max")
        self.sum = nn.EmbeddingBag(20, 4, mode="sum")
        self.weights = nn.Parameter(torch.rand(12))
        self.register_buffer("words", torch.randint(0, 20, (4, 3)))

    def forward(self, x: Tensor) -> Tensor:
        offsets = torch.tensor([0, 3, 3, 8])
        bags = self.sum(self.words.flatten(), offsets, per_sample_weights=self.weights)
        out: Tensor = x.mean(1) * (bags + self.mean(self.words) + self.max(self.words))
        return out


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "lstm": lambda: nn.LSTM(4, 8, batch_first=True),
    "lstm-deep": lambda: nn.LSTM(4, 8, num_layers=2, bidirectional=True, batch_first=True),
    "lstm-projected": lambda: nn.LSTM(4, 8, proj_size=4, batch_first=True),
    "gru-deep": lambda: nn.GRU(4, 8, num_layers=2, bidirectional=True, batch_first=True),
    "rnn-deep": lambda: nn.RNN(4, 8, num_layers=2, bidirectional=True, batch_first=True),
    "rnn-relu": lambda: nn.RNN(4, 8, nonlinearity="relu", batch_first=True),
    "loop": Loop,
    "attention": Attention,
    "bags": Bags,
}


def example(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Rows(LAYERS[name]()).double(), torch.randn(4, 5, 4, dtype=torch.float64)


@pytest.mark.parametrize("name", LAYERS)
def test_a_step_equals_eager_and_its_plan_too_without_a_warning(name: str) -> None:
    model, x = example(name)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        traced = trace_module_train(model, (x,), {}, optimizer="sgd", lr=RATE)
    stepper = Stepper(traced)
    loss, expected = stepper([x]), model(x)["loss"]
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-10, atol=1e-10)
    for parameter, value in model.named_parameters():
        mine = (before[parameter] - stepper.state[parameter]) / RATE
        torch.testing.assert_close(mine, value.grad, rtol=1e-10, atol=1e-10)
    values = random_inputs(traced.module, {n: t.detach() for n, t in traced.tensors.items()})
    mesh = parse_mesh(("4", "2x2")[list(LAYERS).index(name) % 2])
    assert_equal_on_ranks(traced.module, values, evaluate(traced.module, values), mesh, seed=1)


def test_an_attribute_that_the_program_assigns_is_still_warned_of() -> None:
    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.LSTM(4, 8, batch_first=True)
            self.last = torch.zeros(1, dtype=torch.float64)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            out, _ = self.layer(x)
            self.last = out.sum()
            return {"loss": out.sum()}

    x = torch.randn(4, 5, 4, dtype=torch.float64)
    with pytest.warns(UserWarning, match="self.*last"):
        trace_module_train(Keeps().double(), (x,), {}, optimizer="sgd", lr=RATE)
