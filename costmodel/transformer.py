"""A transformer and how it is trained, by their sizes: what a whole-step estimate starts from.

No program is traced: an outer search asks these estimates for thousands of meshes before any
program is placed on one.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..ir.errors import CompileError

RECOMPUTE = ("none", "selective", "full")


@dataclass(frozen=True)
class Experts:
    """The mixture of experts of a layer.

    Attributes:
        count: experts of a layer.
        per_token: experts that each token visits.
        ffn: hidden width of one expert.
        shared_ffn: hidden width of the expert that all tokens visit; 0 without one.
        dense_layers: layers at the bottom that have a dense feed-forward block instead.
    """

    count: int
    per_token: int
    ffn: int
    shared_ffn: int = 0
    dense_layers: int = 0


@dataclass(frozen=True)
class Transformer:
    """A decoder's sizes.

    Attributes:
        layers, hidden, heads, kv_heads, head_dim: of the attention blocks.
        ffn: hidden width of a dense feed-forward block.
        gated: two projections into the feed-forward block (SwiGLU) instead of one.
        vocab: rows of the embedding and columns of the head.
        experts: of the feed-forward blocks; None for dense ones.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    gated: bool = False
    experts: Experts | None = None

    @property
    def attention_params(self) -> int:
        """Weights of the projections of one layer's attention."""
        return self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)

    @property
    def dense_ffn_params(self) -> int:
        """Weights of one dense feed-forward block."""
        return self.hidden * self.ffn * (3 if self.gated else 2)

    @property
    def expert_params(self) -> int:
        """Weights of all experts of one layer, the shared one not counted."""
        return 3 * self.hidden * self.experts.ffn * self.experts.count if self.experts else 0


@dataclass(frozen=True)
class TrainingPlan:
    """How a step is spread over devices, in the terms that published tables use.

    Attributes:
        gpus, gpus_per_node: devices in all and devices that share the fast fabric.
        seq: tokens of a sequence.
        micro_batch, global_batch: sequences of one micro-batch on a pipeline, of a step.
        tp, pp, cp, ep: degrees of tensor, pipeline, context and expert parallelism.
        vp: virtual stages of each pipeline rank.
        fsdp: parameters sharded over the data-parallel ranks (ZeRO-3).
        sequence_parallel: activations between tensor-parallel blocks are sharded.
        precision: number format of the layers' matrix products: bf16, f16, f8 or f4.
        recompute: activations computed again in backward: `none`, `selective` (the scores), `full`.
    """

    gpus: int
    seq: int
    micro_batch: int
    global_batch: int
    gpus_per_node: int = 8
    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    vp: int = 1
    fsdp: bool = False
    sequence_parallel: bool = False
    precision: str = "bf16"
    recompute: str = "none"

    def __post_init__(self) -> None:
        for name in ("gpus", "seq", "micro_batch", "global_batch", "gpus_per_node", "tp", "pp",
                     "cp", "ep", "vp"):  # fmt: skip
            if getattr(self, name) < 1:
                raise CompileError("W0402", f"{name} is {getattr(self, name)}", hint="at least 1")
        if self.recompute not in RECOMPUTE:
            raise CompileError(
                "W0402", f"recompute is {self.recompute!r}", hint=f"one of {', '.join(RECOMPUTE)}"
            )
        if self.gpus % (self.tp * self.pp * self.cp):
            raise CompileError(
                "W0402",
                f"{self.gpus} devices do not divide into tp {self.tp} x pp {self.pp} x cp {self.cp}",
                hint="the product of the degrees divides the number of devices",
            )

    @property
    def dp(self) -> int:
        """Degree of data parallelism."""
        return self.gpus // (self.tp * self.pp * self.cp)

    @property
    def micro_batches(self) -> int:
        """Micro-batches that a pipeline runs in a step."""
        return max(1, round(self.global_batch / self.dp / self.micro_batch))
