"""Small configurations of five models of `transformers`, with example inputs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

logging.getLogger("transformers").setLevel(logging.ERROR)

Example = tuple[torch.nn.Module, dict[str, Any]]
VOCABULARY = 61


def _ids(batch: int = 4, length: int = 8) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (batch, length))


def llama(layers: int = 2, kv_heads: int = 2, tied: bool = False) -> Example:
    """Rotary positions, grouped queries, RMS norm, gated MLP."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=kv_heads, max_position_embeddings=32,
        use_cache=False, attn_implementation="sdpa", tie_word_embeddings=tied,
    )  # fmt: skip
    ids = _ids()
    return LlamaForCausalLM(config), {"input_ids": ids, "labels": ids.clone()}


def gpt2(dropout: float = 0.0) -> Example:
    """Learned positions, tied weights, Conv1D, GELU in parts."""
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=32, use_cache=False,
        attn_implementation="sdpa", resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout,
        bos_token_id=1, eos_token_id=2, loss_type="ForCausalLM",
    )  # fmt: skip
    ids = _ids()
    return GPT2LMHeadModel(config), {"input_ids": ids, "labels": ids.clone()}


def bert() -> Example:
    """Bidirectional, a padding mask, labels that are ignored in part."""
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48, max_position_embeddings=32, attn_implementation="sdpa",
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    ids = _ids()
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    labels = ids.clone()
    labels[:, ::3] = -100
    return BertForMaskedLM(config), {"input_ids": ids, "attention_mask": mask, "labels": labels}


def vit() -> Example:
    """Patches by convolution, a class token, no causality."""
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        image_size=16, patch_size=4, num_labels=5, attn_implementation="sdpa",
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    images, labels = torch.randn(4, 3, 16, 16), torch.tensor([1, 3, 0, 4])
    return ViTForImageClassification(config), {"pixel_values": images, "labels": labels}


def resnet() -> Example:
    """Convolutions, batch norm with running statistics, pooling."""
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2], layer_type="basic", num_labels=5
    )
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([1, 3, 0, 4])
    return ResNetForImageClassification(config), {"pixel_values": images, "labels": labels}


ZOO: dict[str, Callable[[], Example]] = {
    "llama": llama, "gpt2": gpt2, "bert": bert, "vit": vit, "resnet": resnet,
}  # fmt: skip


def build(name: str, dtype: torch.dtype = torch.float32) -> Example:
    """A model of the zoo in training mode, the same each time."""
    torch.manual_seed(0)
    model, inputs = ZOO[name]()
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    return model.to(dtype).train(), inputs
