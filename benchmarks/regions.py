"""Ten regions of Llama-7B, GPT-2, Mixtral and ViT between their matrix products, and their kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from weft.frontend.joint import joint, prepare
from weft.frontend.trace import trace_forward
from weft.ir.module import Module
from weft.ir.types import Mesh
from weft.passes.fuse import fuse
from weft.passes.simplify import Simplify

BF16, F32 = torch.bfloat16, torch.float32


def _rms(x: Tensor, w: Tensor) -> Tensor:
    wide = x.float()
    return w * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


def llama_norm(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    h = x + r
    return _rms(h, w), h


def llama_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def llama_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    def turned(x: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        low, high = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
        return x * cos + torch.cat((-high, low), -1) * sin

    return turned(q), turned(k)


def llama_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), labels)


def gpt2_norm(x: Tensor, y: Tensor, bias: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    h = x + (y + bias)
    return F.layer_norm(h, (h.shape[-1],), w, b), h


def gpt2_gelu(h: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(h + bias, approximate="tanh")


def gpt2_softmax(scores: Tensor) -> Tensor:
    n = scores.shape[-1]
    rows = torch.arange(n, device=scores.device)
    mask = rows[:, None] >= rows[None, :]
    return torch.where(mask, scores * 0.125, -1e4).softmax(-1)


def mixtral_expert(gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
    return F.silu(gate) * up * weight[:, None]


def mixtral_router(logits: Tensor) -> tuple[Tensor, Tensor]:
    p = logits.float().softmax(-1)
    return p.to(logits.dtype), p.mean(0)


def vit_norm(x: Tensor, y: Tensor, bias: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    h = x + (y + bias)
    return F.layer_norm(h, (h.shape[-1],), w, b), h


@dataclass(frozen=True)
class Region:
    """A region: its function, and the shapes and dtypes of its inputs."""

    function: Callable[..., Tensor | tuple[Tensor, ...]]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...] = ()
    fixed: int = 0  #: how many of the last inputs take no gradients

    def inputs(self) -> list[Tensor]:
        """Meta tensors; floats take gradients."""
        dtypes = self.dtypes or (BF16,) * len(self.shapes)
        pairs = enumerate(zip(self.shapes, dtypes, strict=True))
        return [
            torch.empty(shape, dtype=dtype, device="meta").requires_grad_(self.varies(i))
            for i, (shape, dtype) in pairs
        ]

    def samples(self, device: torch.device) -> list[Tensor]:
        """Random inputs; integers are labels."""
        high = self.shapes[0][-1]
        return [
            torch.randn(x.shape, device=device).to(x.dtype) if x.dtype.is_floating_point
            else torch.randint(0, high, x.shape, device=device)
            for x in self.inputs()
        ]  # fmt: skip

    def smaller(self) -> Region:
        """The same with dims of at most 16, for the interpreter."""
        return replace(self, shapes=tuple(tuple(min(d, 16) for d in s) for s in self.shapes))

    def varies(self, i: int) -> bool:
        """Does an input take a gradient?"""
        floats = not self.dtypes or self.dtypes[i].is_floating_point
        return floats and i < len(self.shapes) - self.fixed


_HEADS, _TURN = (1, 2048, 32, 128), (1, 1, 2048, 128)
REGIONS = [
    Region(llama_norm, ((2048, 4096), (2048, 4096), (4096,))),
    Region(llama_swiglu, ((2048, 11008), (2048, 11008))),
    Region(llama_rope, (_HEADS, _HEADS, _TURN, _TURN), fixed=2),
    Region(llama_loss, ((2048, 32000), (2048,)), (BF16, torch.int64)),
    Region(gpt2_norm, ((8, 1024, 768), (8, 1024, 768), (768,), (768,), (768,))),
    Region(gpt2_gelu, ((8, 1024, 3072), (3072,))),
    Region(gpt2_softmax, ((8, 12, 1024, 1024),)),
    Region(mixtral_expert, ((4096, 14336), (4096, 14336), (4096,))),
    Region(mixtral_router, ((4096, 8),)),
    Region(vit_norm, ((64, 197, 768), (64, 197, 768), (768,), (768,), (768,)), (F32,) * 5),
]


def outputs_of(result: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def backward_of(region: Region) -> Callable[..., list[Tensor]]:
    """(inputs, cotangents of the outputs) -> gradients of the inputs that are floats."""
    count = len(region.shapes)

    def backward(*tensors: Tensor) -> list[Tensor]:
        inputs = [x.detach().requires_grad_(region.varies(i)) for i, x in enumerate(tensors[:count])]
        outputs = outputs_of(region.function(*inputs))
        wanted = [x for x in inputs if x.requires_grad]
        return list(torch.autograd.grad(outputs, wanted, list(tensors[count:])))

    return backward


def weft_module(region: Region, *, backward: bool) -> Module:
    """The region as weft plans it for an H200: simplified, differentiated, fused."""
    traced = trace_forward(region.function, [x.detach() for x in region.inputs()])
    entry = traced.module.entry
    if backward:
        wrt = [value.name for i, value in enumerate(entry.params) if region.varies(i)]
        both = joint(prepare(entry, frozenset(wrt)), wrt).entry
        pairs = zip(both.results, both.result_attrs, strict=True)
        grads = [(value, attrs) for value, attrs in pairs if attrs.get("role") == "grad"]
        # cotangents are inputs like the others here, not what a later stage of a step brings
        entry = both.with_(
            results=tuple(v for v, _ in grads), result_attrs=tuple({} for _ in grads),
            param_attrs=tuple({} for _ in both.params),
        )  # fmt: skip
    module = Simplify().run(Module("logical", (entry,)))
    return fuse(module.with_(mesh=Mesh((), "h200")))
