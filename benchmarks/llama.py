"""Llamas of any shape without weights, for the benchmarks of the compiler."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM


class Shape(NamedTuple):
    """Sizes of a model; the order is that of most model cards."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_heads: int
    vocabulary: int


#: published models; Touvron et al., 2023 (7 B), Llama team, 2024 (70 B and 405 B)
LLAMAS = {
    "7B": Shape(4096, 11008, 32, 32, 32, 32000),
    "70B": Shape(8192, 28672, 80, 64, 8, 128256),
    "405B": Shape(16384, 53248, 126, 128, 8, 128256),
}


def on_meta(
    shape: Shape, batch: int, length: int, dtype: torch.dtype
) -> tuple[LlamaForCausalLM, dict[str, Tensor]]:
    """A model on the meta device, and its inputs: token ids that are their own labels."""
    config = LlamaConfig(
        hidden_size=shape.hidden, intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads, vocab_size=shape.vocabulary,
        max_position_embeddings=length, use_cache=False, attn_implementation="sdpa",
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(dtype)
        ids = torch.zeros(batch, length, dtype=torch.int64)
    return model, {"input_ids": ids, "labels": ids}
