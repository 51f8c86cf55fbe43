"""A small Llama from a Hugging Face config, and its train step.

    weft compile examples.llama:train_step --cluster 2x2:cpu --train adamw -o out/
    weft run out/
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

#: one token per byte
VOCABULARY = 256


def build(
    hidden: int = 256, layers: int = 4, heads: int = 8, intermediate: int = 688, seed: int = 0
) -> LlamaForCausalLM:
    """A Llama-style model with random weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=512,
        use_cache=False,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config)


def loss_and_update(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, ids: torch.Tensor
) -> torch.Tensor:
    """One training step on a batch of token ids, as anyone writes it for one device."""
    loss: torch.Tensor = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss


def _batch(batch: int = 8, length: int = 128) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, VOCABULARY, (batch, length), generator=generator)


def train_step() -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Factory: the train step with its example inputs."""
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return loss_and_update, (model, optimizer, _batch()), {}


def model() -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Factory: the model, whose output carries a loss; `--train` adds the optimizer."""
    ids = _batch()
    return build(), (), {"input_ids": ids, "labels": ids}
