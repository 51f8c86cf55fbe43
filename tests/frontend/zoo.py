"""Small configurations of twenty architectures of `transformers`, with example inputs.

Dropout is off. Models keep their cache on, as their users do, so outputs carry cache objects.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
import transformers as hf

logging.getLogger("transformers").setLevel(logging.ERROR)

Example = tuple[torch.nn.Module, dict[str, Any]]
VOCABULARY = 61
#: a cluster of four devices so slow that even small work is worth sharing
SLOW = """
[[groups]]
device = "cpu"
hosts = 1
devices = 4
[links.intra]
bytes_per_s = 1e12
latency_s = 1e-9
[device]
flops_per_s = {f32 = 1e6}
"""
#: sizes of a small transformer under the names that most configurations give them
_SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
_TEXT = {"vocab_size": VOCABULARY, "max_position_embeddings": 32, **_SMALL}
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_GROUPED = {**_TEXT, **_TOKENS, "num_key_value_heads": 2}
#: an encoder and a decoder, as Bart's family names their sizes
_PAIR = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "dropout": 0.0,
}  # fmt: skip


def _ids(batch: int = 4, length: int = 8) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (batch, length))


def _causal(model: torch.nn.Module) -> Example:
    ids = _ids()
    return model, {"input_ids": ids, "labels": ids.clone()}


def _images(size: int = 16) -> dict[str, Any]:
    return {"pixel_values": torch.randn(4, 3, size, size), "labels": torch.tensor([1, 3, 0, 4])}


def _padded() -> dict[str, Any]:
    ids = _ids()
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def llama(layers: int = 2, kv_heads: int = 2, tied: bool = False) -> Example:
    """Rotary positions, grouped queries, RMS norm, gated MLP."""
    config = hf.LlamaConfig(**{
        **_GROUPED, "num_hidden_layers": layers, "num_key_value_heads": kv_heads,
        "use_cache": False, "attn_implementation": "sdpa", "tie_word_embeddings": tied,
    })  # fmt: skip
    return _causal(hf.LlamaForCausalLM(config))


def gpt2(dropout: float = 0.0) -> Example:
    """Learned positions, tied weights, Conv1D, GELU in parts."""
    config = hf.GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=32, use_cache=False,
        attn_implementation="sdpa", resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout,
        bos_token_id=1, eos_token_id=2, loss_type="ForCausalLM",
    )  # fmt: skip
    return _causal(hf.GPT2LMHeadModel(config))


def bert() -> Example:
    """Bidirectional, a padding mask, labels that are ignored in part."""
    config = hf.BertConfig(
        attn_implementation="sdpa", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        **_TEXT,
    )  # fmt: skip
    inputs = _padded()
    labels = inputs["input_ids"].clone()
    labels[:, ::3] = -100
    return hf.BertForMaskedLM(config), {**inputs, "labels": labels}


def vit() -> Example:
    """Patches by convolution, a class token, no causality."""
    config = hf.ViTConfig(
        image_size=16, patch_size=4, num_labels=5, attn_implementation="sdpa",
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **_SMALL,
    )  # fmt: skip
    return hf.ViTForImageClassification(config), _images()


def resnet() -> Example:
    """Convolutions, batch norm with running statistics, pooling."""
    config = hf.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2], layer_type="basic", num_labels=5
    )
    return hf.ResNetForImageClassification(config), _images(32)


def qwen3() -> Example:
    """Norms of queries and keys; a cache among the outputs."""
    return _causal(hf.Qwen3ForCausalLM(hf.Qwen3Config(head_dim=8, **_GROUPED)))


def mistral() -> Example:
    """Sliding-window attention."""
    return _causal(hf.MistralForCausalLM(hf.MistralConfig(sliding_window=4, **_GROUPED)))


def mixtral() -> Example:
    """A mixture of experts: routing, grouped matrix products, the routers' own loss."""
    config = hf.MixtralConfig(
        num_local_experts=4, num_experts_per_tok=2, output_router_logits=True, **_GROUPED
    )
    return _causal(hf.MixtralForCausalLM(config))


def phi3() -> Example:
    """One projection for queries, keys and values, one for gate and up."""
    return _causal(hf.Phi3ForCausalLM(hf.Phi3Config(**_GROUPED)))


def olmo2() -> Example:
    """Norms behind the blocks."""
    return _causal(hf.Olmo2ForCausalLM(hf.Olmo2Config(**_GROUPED)))


def gptneox() -> Example:
    """Parallel residuals, partial rotary positions."""
    return _causal(hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**_TEXT, **_TOKENS)))


def opt() -> Example:
    """Learned positions from the mask's cumulative sum."""
    config = hf.OPTConfig(
        vocab_size=VOCABULARY, hidden_size=32, ffn_dim=48, num_hidden_layers=2, dropout=0.0,
        num_attention_heads=4, max_position_embeddings=32, word_embed_proj_dim=32, **_TOKENS,
    )  # fmt: skip
    return _causal(hf.OPTForCausalLM(config))


def bloom() -> Example:
    """Positions by ALiBi biases."""
    config = hf.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, **_TOKENS)
    return _causal(hf.BloomForCausalLM(config))


def t5() -> Example:
    """Encoder and decoder, relative position buckets, RMS norm, tied scaled head."""
    config = hf.T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
        dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return hf.T5ForConditionalGeneration(config), {**_padded(), "labels": _ids(4, 6)}


def bart() -> Example:
    """Encoder and decoder, cross attention, one embedding in three places."""
    config = hf.BartConfig(
        vocab_size=VOCABULARY, max_position_embeddings=32, decoder_start_token_id=2,
        **_PAIR, **_TOKENS,
    )  # fmt: skip
    return hf.BartForConditionalGeneration(config), {**_padded(), "labels": _ids(4, 6)}


def swin() -> Example:
    """Shifted windows, relative position tables, merging of patches."""
    config = hf.SwinConfig(
        image_size=16, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4,
        num_labels=5, drop_path_rate=0.0,
    )  # fmt: skip
    return hf.SwinForImageClassification(config), _images()


def clip() -> Example:
    """Two towers, a contrastive loss, a flag among the inputs."""
    text = {**_TEXT, **_TOKENS, "max_position_embeddings": 16}
    vision = {**_SMALL, "image_size": 16, "patch_size": 8}
    config = hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    images = torch.randn(4, 3, 16, 16)
    return hf.CLIPModel(config), {
        "input_ids": _ids(), "pixel_values": images, "return_loss": True,
    }  # fmt: skip


def whisper() -> Example:
    """Convolutions over sound, then encoder and decoder."""
    config = hf.WhisperConfig(
        vocab_size=VOCABULARY, num_mel_bins=8, max_source_positions=8, max_target_positions=16,
        decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None,
        **_PAIR, **_TOKENS,
    )  # fmt: skip
    features = torch.randn(4, 8, 16)
    return hf.WhisperForConditionalGeneration(config), {
        "input_features": features, "labels": _ids(4, 6),
    }  # fmt: skip


def mamba() -> Example:
    """A selective state space, its scan written as a loop over positions."""
    config = hf.MambaConfig(
        vocab_size=VOCABULARY, hidden_size=16, state_size=4, num_hidden_layers=2, conv_kernel=4,
        time_step_rank=4, **_TOKENS,
    )  # fmt: skip
    return _causal(hf.MambaForCausalLM(config))


def mamba2() -> Example:
    """A state space in chunks: segment sums, grouped heads, a gated norm."""
    config = hf.Mamba2Config(
        vocab_size=VOCABULARY, hidden_size=16, state_size=8, num_hidden_layers=2, num_heads=4,
        head_dim=8, n_groups=2, chunk_size=4, expand=2, conv_kernel=4, **_TOKENS,
    )  # fmt: skip
    return _causal(hf.Mamba2ForCausalLM(config))


#: those that most tests use
ZOO: dict[str, Callable[[], Example]] = {
    "llama": llama, "gpt2": gpt2, "bert": bert, "vit": vit, "resnet": resnet,
}  # fmt: skip
ALL: dict[str, Callable[[], Example]] = {
    **ZOO, "qwen3": qwen3, "mistral": mistral, "mixtral": mixtral, "phi3": phi3, "olmo2": olmo2,
    "gptneox": gptneox, "opt": opt, "bloom": bloom, "t5": t5, "bart": bart, "swin": swin,
    "clip": clip, "whisper": whisper, "mamba": mamba, "mamba2": mamba2,
}  # fmt: skip


def tensors_of(inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors among a model's inputs; the others are constants of the program."""
    return {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}


def build(name: str, dtype: torch.dtype = torch.float32) -> Example:
    """A model of the zoo in training mode, the same each time."""
    torch.manual_seed(0)
    model, inputs = ALL[name]()
    floats = {k: v.to(dtype) for k, v in tensors_of(inputs).items() if v.is_floating_point()}
    return model.to(dtype).train(), {**inputs, **floats}
