"""The small train steps that `overhead.py` measures: Llama, GPT-2, BERT and ResNet on one CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
)

VOCABULARY, ROWS, LENGTH = 256, 8, 128
IMAGES = 16
#: rows of the batch of a sharded plan: enough that splitting the batch is faster than the weights
SHARDED_ROWS = 32
#: (model, optimizer, batch): what a train step takes
State = tuple[torch.nn.Module, torch.optim.Optimizer, tuple[Tensor, ...]]


def text_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor) -> Tensor:
    """One step of a language model."""
    loss: Tensor = model(input_ids=ids, labels=ids).loss
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    optimizer.zero_grad()
    return loss


def image_step(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, pixels: Tensor, labels: Tensor
) -> Tensor:
    """One step of a classifier."""
    logits: Tensor = model(pixel_values=pixels).logits
    loss = torch.nn.functional.cross_entropy(logits, labels)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    optimizer.zero_grad()
    return loss


def _optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


def token_ids(rows: int = ROWS) -> Tensor:
    """A batch of text."""
    return torch.randint(0, VOCABULARY, (rows, LENGTH), generator=torch.Generator().manual_seed(0))


def llama() -> State:
    """Four layers of width 256, as `examples/llama.py`."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=688, num_hidden_layers=4,
        num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=512,
        use_cache=False, attn_implementation="sdpa",
    ))  # fmt: skip
    return model, _optimizer(model), (token_ids(),)


def gpt2() -> State:
    """Four layers of width 256, without dropout, so that all runs have the same numbers."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(
        vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=256, n_layer=4, n_head=8,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
        attn_implementation="sdpa",
    ))  # fmt: skip
    return model, _optimizer(model), (token_ids(),)


def bert() -> State:
    """Four layers of width 256, without dropout."""
    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig(
        vocab_size=VOCABULARY, max_position_embeddings=LENGTH, hidden_size=256,
        num_hidden_layers=4, num_attention_heads=8, intermediate_size=1024,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, attn_implementation="sdpa",
    ))  # fmt: skip
    return model, _optimizer(model), (token_ids(),)


def resnet() -> State:
    """Four stages of basic blocks on 64 x 64 images."""
    torch.manual_seed(0)
    model = ResNetForImageClassification(ResNetConfig(
        embedding_size=32, hidden_sizes=[32, 64, 128, 256], depths=[2, 2, 2, 2],
        layer_type="basic", num_labels=10,
    ))  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(IMAGES, 3, 64, 64, generator=generator)
    labels = torch.randint(0, 10, (IMAGES,), generator=generator)
    return model, _optimizer(model), (pixels, labels)


#: name -> (what makes a fresh model, optimizer and batch; the step)
STEPS: dict[str, tuple[Callable[[], State], Callable[..., Tensor]]] = {
    "llama": (llama, text_step), "gpt2": (gpt2, text_step), "resnet": (resnet, image_step),
    "bert": (bert, text_step),
}  # fmt: skip


def runner(name: str, wrap: Callable[[Callable[..., Tensor]], Any]) -> Callable[[], Tensor]:
    """A call without arguments that runs one step of a fresh model through `wrap(step)`."""
    make, step = STEPS[name]
    model, optimizer, batch = make()
    wrapped = wrap(step)

    def run() -> Tensor:
        loss: Tensor = wrapped(model, optimizer, *batch)
        return loss

    return run
