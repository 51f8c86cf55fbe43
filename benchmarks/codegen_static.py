"""Kernels of twenty regions next to what torch.compile's Inductor emits for them, without a GPU.

    python benchmarks/codegen_static.py [--quick] [--json FILE]

Ten regions of Llama-7B, GPT-2, Mixtral and ViT between their matrix products, forward and backward (the
gradients of the inputs from inputs and cotangents, so that both compilers are free in what they
compute again). Counted are kernel launches, library calls among them, and bytes moved, each tensor
of a kernel once; compiled for sm_90 are registers, spills and shared memory, the most of any kernel.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from inductor_triton import emit, pretend
from rich.console import Console
from rich.table import Table
from rows import Row, arguments, finish, show
from torch import Tensor

from weft.codegen.binary import Resources
from weft.codegen.compile import compile_kernels
from weft.codegen.emit import kernel_functions
from weft.codegen.source import KernelSource, generate
from weft.frontend.joint import joint, prepare
from weft.frontend.trace import trace_forward
from weft.ir.errors import CompileError
from weft.ir.module import Module
from weft.ir.types import Mesh
from weft.passes.fuse import fuse
from weft.passes.simplify import Simplify
from weft.passes.traffic import Traffic, traffic_of

TARGET = "cuda:90"
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


@dataclass(frozen=True)
class Made:
    """What a compiler makes of a region."""

    launches: int
    bytes_moved: int
    needs: tuple[Resources, ...]


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


def by_weft(region: Region, *, backward: bool) -> Made:
    """What weft launches: kernels, the library's sums behind kernels, ops outside of kernels."""
    module = weft_module(region, backward=backward)
    calls = [str(op.attrs["callee"]) for op in module.entry.ops if op.name == "call"]
    sources = {f.name: generate(f) for f in kernel_functions(module)}
    traffic = Traffic()
    for found in traffic_of(module).values():
        traffic.add(found)
    outside = sum(bool(t) for t in outside_of(module))
    launches = outside + sum(1 + sources[name].launches_behind for name in calls)
    moved = traffic.moved + sum(sources[name].bytes_behind for name in calls)
    return Made(launches, moved, needs_of([sources[name] for name in dict.fromkeys(calls)]))


def outside_of(module: Module) -> list[int]:
    """Bytes of each op that runs by itself."""
    rest = module.entry.with_(ops=())
    out = []
    for op in module.entry.ops:
        if op.name != "call":
            alone = module.with_(functions=(rest.with_(ops=(op,)),))
            out.append(sum(t.moved for t in traffic_of(alone).values()))
    return out


def needs_of(sources: Sequence[KernelSource]) -> tuple[Resources, ...]:
    """The needs of kernels. Raises CompileError where one cannot be built."""
    found = []
    for binary in compile_kernels(list(sources), TARGET):
        if isinstance(binary, CompileError):
            raise binary
        found.append(binary.resources)
    return tuple(found)


def by_inductor(region: Region, *, backward: bool) -> Made:
    """What Inductor launches."""
    inputs = region.inputs()
    if not backward:
        emitted = emit(region.function, [x.detach() for x in inputs])
    else:
        outputs = outputs_of(region.function(*inputs))
        cotangents = [torch.empty_like(x).detach() for x in outputs]
        emitted = emit(backward_of(region), [x.detach() for x in (*inputs, *cotangents)])
    return Made(emitted.launches, emitted.bytes_moved, emitted.needs)


def most(needs: Sequence[Resources], field: str) -> int:
    return max((getattr(need, field) for need in needs), default=0)


def main() -> int:
    """Compare, print, write; 1 when a target is missed."""
    parser = arguments(__doc__, "four regions")
    parser.add_argument("--only", default="", metavar="NAME", help="regions whose name begins so")
    options = parser.parse_args()
    table = Table("region", *(f"{what}{who}" for what in ("launches", "MB", "registers", "spills",
                                                          "shared") for who in (" weft", " Ind.")))
    rows, fewer = [], 0
    named = [region for region in REGIONS if region.function.__name__.startswith(options.only)]
    regions = [(region, back) for region in named for back in (False, True)]
    regions = regions[:4] if options.quick else regions
    ours = [by_weft(region, backward=back) for region, back in regions]
    pretend()  # from here on torch believes that there is a GPU
    for (region, back), mine in zip(regions, ours, strict=True):
        name = f"{region.function.__name__} {'backward' if back else 'forward'}"
        theirs = by_inductor(region, backward=back)
        cells = [str(mine.launches), str(theirs.launches),
                 f"{mine.bytes_moved / 1e6:.1f}", f"{theirs.bytes_moved / 1e6:.1f}"]  # fmt: skip
        for field in ("registers", "spill_bytes", "shared_bytes"):
            cells += [str(most(mine.needs, field)), str(most(theirs.needs, field))]
        table.add_row(name, *cells)
        fewer += mine.launches < theirs.launches or mine.bytes_moved < 0.99 * theirs.bytes_moved
        rows.append(Row(f"{name}: launches", mine.launches, "", theirs.launches, "Inductor"))
        # 1 %: scalars and paddings are counted in different ways
        rows.append(Row(f"{name}: bytes", mine.bytes_moved / theirs.bytes_moved, "of Inductor's",
                        1.01, f"{theirs.bytes_moved / 1e6:.1f} MB"))  # fmt: skip
    count = len(rows) // 2
    rows.append(Row("regions without fewer launches or bytes", (count - fewer) / count,
                    "of all", 0.5, "Inductor"))  # fmt: skip
    Console(width=190).print(table)
    show([row for row in rows if row.holds is False])
    return finish(rows, options.json)


if __name__ == "__main__":
    sys.exit(main())
