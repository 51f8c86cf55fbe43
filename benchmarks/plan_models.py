"""Train steps that `plan_quality.py` plans: traced on meta tensors, no data."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from weft.frontend.api import trace_target
from weft.frontend.driver import logical
from weft.frontend.load_target import Target
from weft.ir.module import Module


def _text(model: nn.Module, rows: int, length: int) -> Module:
    ids = torch.zeros((rows, length), dtype=torch.int64, device="meta")
    target = Target(type(model).__name__, model, (), {"input_ids": ids, "labels": ids})
    return logical(trace_target(target, "adamw", {"lr": 1e-4}))


def _llama(layers: int, hidden: int, vocab: int, rows: int, length: int, heads: int = 16) -> Module:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(
            vocab_size=vocab, hidden_size=hidden, intermediate_size=hidden * 11 // 4,
            num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads // 2,
            max_position_embeddings=length, use_cache=False, attn_implementation="sdpa",
        ))  # fmt: skip
    return _text(model.to(torch.bfloat16), rows, length)


def _gpt2() -> Module:
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(
            vocab_size=50304, n_positions=1024, n_embd=1024, n_layer=12, n_head=16, resid_pdrop=0.0,
            embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False, attn_implementation="sdpa",
        ))  # fmt: skip
    return _text(model.to(torch.bfloat16), 32, 1024)


class _Tower(nn.Module):
    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.first = nn.Linear(512, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(),
                          nn.Linear(4 * width, width)) for _ in range(layers)
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return x.mean(1)


class _Towers(nn.Module):
    """Two towers of unequal width that meet in the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = _Tower(2048, 6), _Tower(1024, 6)
        self.join = nn.Linear(2048, 1024)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return (self.join(self.left(a)) - self.right(b)).square().mean()


def _towers() -> Module:
    with torch.device("meta"):
        model = _Towers().to(torch.bfloat16)
        a, b = (torch.zeros((64, 256, 512), dtype=torch.bfloat16) for _ in range(2))
    return logical(trace_target(Target("towers", model, (a, b), {}), "adamw", {"lr": 1e-4}))


def _mixtral() -> Module:
    with torch.device("meta"):
        model = MixtralForCausalLM(MixtralConfig(
            vocab_size=32000, hidden_size=1024, intermediate_size=3584, num_hidden_layers=6,
            num_attention_heads=16, num_key_value_heads=8, num_local_experts=8,
            max_position_embeddings=1024, use_cache=False, attn_implementation="sdpa",
        ))  # fmt: skip
    return _text(model.to(torch.bfloat16), 32, 1024)


def _t5() -> Module:
    with torch.device("meta"):
        model = T5ForConditionalGeneration(T5Config(
            vocab_size=32128, d_model=1024, d_kv=64, d_ff=2816, num_layers=8, num_heads=16,
            feed_forward_proj="gated-gelu", dropout_rate=0.0, use_cache=False,
        ))  # fmt: skip
    return _text(model.to(torch.bfloat16), 32, 512)


#: name -> what makes its logical module
MODELS: dict[str, Callable[[], Module]] = {
    "llama, 8 x 2048": lambda: _llama(8, 2048, 32000, 32, 1024),
    "llama, large vocabulary": lambda: _llama(4, 1024, 128256, 32, 1024),
    "gpt2 medium, 12 x 1024": _gpt2,
    "two towers": _towers,
}
WIDE: dict[str, Callable[[], Module]] = {
    "llama, deep and thin": lambda: _llama(24, 768, 32000, 32, 1024, 12),
    "llama, long sequences": lambda: _llama(6, 2048, 32000, 2, 16384),
    "llama, wide": lambda: _llama(4, 4096, 32000, 16, 2048, 32),
    "mixtral": _mixtral,
    "t5": _t5,
}
