"""Small models of many architectures of `transformers`, made from their default configurations.

A table of names and sizes shrinks any configuration; the auto classes find the model. What a
configuration needs besides stands in one line of a table below.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers as hf

logging.getLogger("transformers").setLevel(logging.ERROR)

Example = tuple[torch.nn.Module, dict[str, Any]]
VOCABULARY = 61
#: attribute of a configuration -> its value in a small model, where the default is larger
_LARGEST = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "emb_dim",
                     "embedding_size", "word_embed_proj_dim", "projection_dim",
                     "attention_hidden_size", "d_embed", "hidden_dim", "expert_hidden_size"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff",
                     "n_inner", "dim_feedforward", "ffn_hidden_size", "d_inner", "feed_forward_size",
                     "intermediate_size_mlp", "intermediate_ff"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size",
                     "shared_intermediate_size"), 16),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers",
                     "decoder_layers", "num_decoder_layers", "num_encoder_layers",
                     "num_hidden_groups"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "nhead",
                     "encoder_attention_heads", "decoder_attention_heads",
                     "num_encoder_attention_heads", "num_decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "n_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "attention_head_size", "d_head"), 8),
    "vocab_size": VOCABULARY,
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"), 64),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk"), 2),
    "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
#: names of the list of the layers' kinds, which some configurations compute
_KINDS = ("layer_types", "layers_block_type")
#: these are ids of tokens
_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 1}


def shrink(cls: type, **overrides: Any) -> Any:
    """A configuration like the default one, two layers deep and 32 wide, without dropout.

    Args:
        overrides: values that hold as they are; a dict for a sub-configuration adds to its own.
    """
    default = cls()
    values: dict[str, Any] = {}
    for name, value in vars(default).items():
        sub = getattr(cls, "sub_configs", {}).get(name)
        if sub is not None and isinstance(value, hf.PreTrainedConfig):
            given = overrides.pop(name, {})
            if isinstance(given, dict):
                given = shrink(type(value), **given).to_dict()
            values[name] = given
        elif isinstance(value, float) and ("drop" in name or name.startswith("mask_")):
            values[name] = 0.0
        elif isinstance(value, (list, tuple)) and "drop" in name:
            values[name] = [0.0 for _ in value]
        elif isinstance(value, bool) or isinstance(getattr(cls, name, None), property):
            continue
        elif isinstance(value, int) and name in _IDS:
            values[name] = _IDS[name]
        elif isinstance(value, int) and name in _LARGEST:
            values[name] = min(value, _LARGEST[name])
    values.update(overrides)
    kinds = getattr(default, "layer_types", None)
    fixed = any(isinstance(getattr(cls, name, None), property) for name in _KINDS)
    if isinstance(kinds, list) and not fixed and "layer_types" not in overrides:
        values["layer_types"] = (list(dict.fromkeys(kinds)) * 2)[:2]
    return cls(**values)


class WithLoss(torch.nn.Module):
    """A model with a loss of its outputs: a weighted mean of each, added up."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> dict[str, Any]:
        """The loss, and the model's outputs."""
        output = self.model(**inputs)
        leaves = torch.utils._pytree.tree_leaves(output)
        loss: Any = 0.0
        for x in leaves:
            if isinstance(x, torch.Tensor) and x.is_floating_point() and x.numel():
                ramp = torch.linspace(-1.0, 1.0, x.numel(), dtype=x.dtype).reshape(x.shape)
                loss = loss + (x * ramp).mean()
        return {"loss": loss, "output": output}


def _ids(batch: int = 4, length: int = 8) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (batch, length))


def _text(labels: bool = True) -> dict[str, Any]:
    ids = _ids()
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    given = {"input_ids": ids, "attention_mask": mask}
    return {**given, "labels": ids.clone()} if labels else given


def _config(kind: str, overrides: dict[str, Any]) -> Any:
    return shrink(hf.CONFIG_MAPPING[kind], **overrides)


def causal(kind: str, **overrides: Any) -> Example:
    """A language model on a batch of tokens."""
    ids = _ids()
    model = hf.AutoModelForCausalLM.from_config(_config(kind, overrides))
    return model, {"input_ids": ids, "labels": ids.clone()}


def masked(kind: str, **overrides: Any) -> Example:
    """A masked language model on padded tokens."""
    return hf.AutoModelForMaskedLM.from_config(_config(kind, overrides)), _text()


def pair(kind: str, **overrides: Any) -> Example:
    """An encoder and a decoder of text."""
    model = hf.AutoModelForSeq2SeqLM.from_config(_config(kind, overrides))
    return model, {**_text(False), "labels": _ids(4, 6)}


def image(kind: str, **overrides: Any) -> Example:
    """A classifier of images."""
    model = hf.AutoModelForImageClassification.from_config(_config(kind, {"num_labels": 5, **overrides}))
    size = getattr(model.config, "image_size", 32)
    size = size if isinstance(size, int) else size[0]
    return model, {"pixel_values": torch.randn(4, 3, size, size), "labels": torch.tensor([1, 3, 0, 4])}


def base(kind: str, inputs: Callable[[Any], dict[str, Any]], **overrides: Any) -> Example:
    """A bare model; the loss is made of its outputs."""
    config = _config(kind, overrides)
    return WithLoss(hf.AutoModel.from_config(config)), inputs(config)


def of(cls: str, inputs: Callable[[Any], dict[str, Any]], loss: bool = False, **overrides: Any) -> Example:
    """A model by its class; `loss` says whether it computes one itself."""
    model_class = getattr(hf, cls)
    config = shrink(model_class.config_class, **overrides)
    model = model_class(config)
    return (model if loss else WithLoss(model)), inputs(config)


#: sizes of latent attention, and of its routed experts
_LATENT = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "head_dim": 8, "num_key_value_heads": 4, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1,
}  # fmt: skip
_CAUSAL: dict[str, dict[str, Any]] = {
    "qwen2": {}, "gemma": {}, "gemma2": {}, "gemma3_text": {}, "deepseek_v3": _LATENT,
    "qwen2_moe": {}, "qwen3_moe": {}, "gpt_oss": {}, "olmoe": {}, "granite": {}, "granitemoe": {},
    "falcon": {}, "gptj": {"rotary_dim": 4}, "codegen": {"rotary_dim": 4}, "gpt_bigcode": {},
    "starcoder2": {}, "phi": {}, "stablelm": {}, "cohere": {}, "cohere2": {}, "nemotron": {"num_key_value_heads": 2, "head_dim": 8},
    "glm": {}, "glm4": {}, "olmo": {}, "olmo3": {}, "smollm3": {}, "ernie4_5": {}, "exaone4": {},
    "llama4_text": {}, "phimoe": {}, "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2}, "minimax": {}, "deepseek_v2": {**_LATENT, "num_experts_per_tok": 2},
    "glm4_moe": {}, "qwen3_next": {}, "falcon_mamba": {}, "bamba": {},
    "recurrent_gemma": {}, "rwkv": {}, "lfm2": {}, "gpt_neo": {"attention_types": [[["global", "local"], 1]]}, "biogpt": {},
    "ctrl": {}, "xglm": {}, "persimmon": {}, "mpt": {}, "modernbert-decoder": {}, "diffllama": {},
    "seed_oss": {}, "arcee": {},
    "helium": {}, "apertus": {}, "bitnet": {}, "openai-gpt": {},
    "doge": {}, "jetmoe": {}, "gemma4_text": {},
    "minimax_m2": {}, "ernie4_5_moe": {}, "olmo_hybrid": {}, "zaya": {},
    "flex_olmo": {}, "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}, "qwen3_5_text": {}, "qwen3_5_moe_text": {},
}  # fmt: skip
_MASKED: dict[str, dict[str, Any]] = {
    "roberta": {}, "distilbert": {"dim": 32}, "electra": {}, "albert": {}, "deberta": {},
    "deberta-v2": {}, "modernbert": {}, "xlm-roberta": {}, "camembert": {}, "funnel": {},
    "longformer": {"attention_window": 4}, "big_bird": {"attention_type": "original_full"},
    "mpnet": {}, "layoutlm": {}, "esm": {"vocab_size": VOCABULARY, "pad_token_id": 0, "mask_token_id": 3}, "fnet": {}, "mobilebert": {}, "squeezebert": {},
    "convbert": {}, "megatron-bert": {}, "nystromformer": {}, "rembert": {}, "roformer": {},
    "xlm": {}, "ernie": {}, "data2vec-text": {}, "ibert": {}, "yoso": {}, "flaubert": {},
    "mvp": {}, "eurobert": {}, "nomic_bert": {}, "mra": {}, "luke": {},
}  # fmt: skip
_PAIRS: dict[str, dict[str, Any]] = {
    "mt5": {}, "umt5": {}, "switch_transformers": {"decoder_start_token_id": 0}, "pegasus": {}, "pegasus_x": {}, "mbart": {},
    "led": {"attention_window": 4}, "m2m_100": {}, "marian": {}, "prophetnet": {}, "longt5": {"decoder_start_token_id": 0},
    "blenderbot": {}, "fsmt": {}, "nllb-moe": {}, "plbart": {}, "bigbird_pegasus": {}, "t5gemma": {},
}  # fmt: skip
_IMAGES: dict[str, dict[str, Any]] = {
    "beit": {}, "convnext": {}, "convnextv2": {}, "dinov2": {}, "swinv2": {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
    "mobilenet_v1": {}, "mobilenet_v2": {}, "segformer": {},
    "regnet": {}, "poolformer": {}, "pvt": {}, "pvt_v2": {},
    "bit": {}, "cvt": {}, "focalnet": {}, "hiera": {}, "swiftformer": {}, "vit_msn": {},
    "data2vec-vision": {}, "siglip": {},
    "dinov2_with_registers": {}, "ijepa": {}, "hgnet_v2": {}, "textnet": {},
    "resnet": {},
}  # fmt: skip


def _sound(config: Any) -> dict[str, Any]:
    return {"input_values": torch.randn(2, 1600)}


def _video(config: Any) -> dict[str, Any]:
    return {"pixel_values": torch.randn(2, config.num_frames, 3, config.image_size, config.image_size)}


def _picture(config: Any) -> dict[str, Any]:
    size = config.image_size
    return {"pixel_values": torch.randn(2, 3, *((size, size) if isinstance(size, int) else size))}


def _two_towers(config: Any) -> dict[str, Any]:
    pixels = torch.randn(4, 3, 32, 32)
    return {"input_ids": _ids(), "pixel_values": pixels, "return_loss": True}


def _series(config: Any) -> dict[str, Any]:
    past = torch.randn(4, config.context_length, config.num_input_channels)
    return {"past_values": past, "future_values": torch.randn(4, config.prediction_length, config.num_input_channels)}


def _decisions(config: Any) -> dict[str, Any]:
    return {
        "states": torch.randn(2, 5, config.state_dim), "actions": torch.randn(2, 5, config.act_dim),
        "rewards": torch.randn(2, 5, 1), "returns_to_go": torch.randn(2, 5, 1),
        "timesteps": torch.arange(5).repeat(2, 1), "attention_mask": torch.ones(2, 5),
    }  # fmt: skip


_SOUND = {"conv_dim": [16, 16, 16], "conv_kernel": [10, 3, 2], "conv_stride": [5, 2, 2],
          "num_feat_extract_layers": 3, "num_conv_pos_embeddings": 16,
          "num_conv_pos_embedding_groups": 4, "apply_spec_augment": False}  # fmt: skip
_OTHERS: dict[str, Callable[[], Example]] = {
    "deit": partial(of, "DeiTForImageClassification", lambda c: {**_picture(c), "labels": torch.tensor([1, 0])},
                    loss=True),
    "wav2vec2": partial(of, "Wav2Vec2Model", _sound, **_SOUND),
    "hubert": partial(of, "HubertModel", _sound, **_SOUND),
    "wavlm": partial(of, "WavLMModel", _sound, **_SOUND),
    "videomae": partial(of, "VideoMAEModel", _video, num_frames=4),
    "yolos": partial(of, "YolosModel", _picture, image_size=[32, 32]),
    "siglip-pair": partial(of, "SiglipModel", _two_towers, loss=True),
    "patchtst": partial(of, "PatchTSTForPrediction", _series, loss=True, context_length=32, patch_length=4,
                        patch_stride=4, prediction_length=8, num_input_channels=3),
    "decision_transformer": partial(of, "DecisionTransformerModel", _decisions, hidden_size=32, n_head=4),
}  # fmt: skip


def _table() -> dict[str, Callable[[], Example]]:
    kinds = ((causal, _CAUSAL, ""), (masked, _MASKED, ""), (pair, _PAIRS, ""), (image, _IMAGES, "-image"))
    table: dict[str, Callable[[], Example]] = {}
    for make, entries, suffix in kinds:
        for kind, overrides in entries.items():
            name = kind if kind not in table else kind + suffix
            table[name] = partial(make, kind, **overrides)
    return {**table, **_OTHERS}


WIDE: dict[str, Callable[[], Example]] = _table()


def build(name: str) -> Example:
    """A model in training mode, the same each time."""
    torch.manual_seed(0)
    model, inputs = WIDE[name]()
    return model.train(), inputs
