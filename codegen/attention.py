"""Attention as Triton skeletons: forward, gradients, decoding against a cache, and merging parts.

Online softmax with base-2 exponentials, Dao et al., FlashAttention-2, 2023. Tensors are
`[b, h, s, d]` with any strides whose last is 1, or `[tokens, h, d]` with `cu_q` and `cu_k`, where
sequences start in q and in k (variable length). `h` may be a multiple of k's heads. Results of a row
that sees nothing are 0, its log-sum-exp (natural logarithm) is -inf.

The hole of the scores, `Modifier`, sees `score` at (row: query, column: key) and may load masks
`[b, h, s, t]` (dims of size 1 repeat). A block list says which blocks of keys a block of queries
visits: `visit[i] .. visit[i + 1]` are the places of its blocks in `blocks`; dK/dV takes the list of
the transpose. Gradients: dQ also makes `delta`, the row sums of out times dout, which dK/dV reads.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..ir.errors import CompileError
from ..ir.types import DTYPES
from .attention_body import VECTORS, Attention, Bodies, Modifier, mask_modifier
from .hole import POINTER, Draft, text
from .layout import power_of_two
from .source import _TORCH as TORCH
from .source import KernelSource


@dataclass(frozen=True)
class AttentionTile:
    """Queries and keys of a tile, warps, stages, and programs that share a row of a decoding."""

    m: int
    n: int
    warps: int
    stages: int
    splits: int = 1


def default_attention_tile(attention: Attention, target: str = "cuda:90") -> AttentionTile:
    """A tile that compiles without spills, forward at least; a search may find faster ones."""
    size = power_of_two(max(attention.d, attention.e))
    stages = 1 if target.startswith("hip") else 2
    if attention.kind == "decode":
        rows = max(16, power_of_two(attention.heads // attention.groups))
        return AttentionTile(rows, 64, 4, stages, 8)
    if attention.dtype == "f32":
        return AttentionTile(32, 32, 4, 1)
    if attention.kind == "forward":
        keys = 128 if size == 128 and target in ("cuda:90", "cuda:100") else 64
        return AttentionTile(128, keys, 8 if size > 64 else 4, stages)
    return AttentionTile(64, 64, 8 if size > 64 else 4, stages)


def attention_source(attention: Attention, tile: AttentionTile | None = None) -> KernelSource:
    """The Triton source of an attention. Operands of `launch`, then `scale` and `shift`:

    - forward: q, k, v -> out, lse
    - dq: dout, q, k, v, out, lse -> dq, delta
    - dkdv: dout, q, k, v, lse, delta -> dk, dv
    - decode: q `[b, h, d]`, k, v, lengths of the caches i32 `[b]` -> out, lse

    then cu_q, cu_k, most queries, most keys of a sequence (variable length), visit, blocks (block
    list), tensors of the modifier. Raises CompileError W0901 for a decoding with features.
    """
    plain = not (attention.causal or attention.varlen or attention.sparse or attention.modifier)
    if attention.kind == "decode" and not plain:
        raise CompileError(
            "W0901", f"attention {attention.name} cannot be generated",
            reason="decoding sees a whole cache, and its scores as they are",
            hint="the forward kernel has masks, variable length and modifiers",
        )  # fmt: skip
    return _Writer(attention, tile or default_attention_tile(attention)).draft().source()


#: tensors of each kind: parameters, results
_PARTS = {
    "forward": (("q", "k", "v"), ("out", "lse")),
    "dq": (("dout", "q", "k", "v", "out", "lse"), ("dq", "delta")),
    "dkdv": (("dout", "q", "k", "v", "lse", "delta"), ("dk", "dv")),
    "decode": (("q", "k", "v"), ("out", "lse")),
}


@dataclass
class _Writer(Bodies):
    tile: AttentionTile

    def arguments(self) -> dict[str, str]:
        a = self.a
        params, results = _PARTS[a.kind]
        out = {f"{n}_ptr": "*fp32" if n in VECTORS else POINTER[a.dtype] for n in (*params, *results)}
        if a.kind == "decode":
            out |= {"lengths_ptr": "*i32", "sums_ptr": "*fp32", "tops_ptr": "*fp32", "count_ptr": "*i32"}
        if a.varlen:
            out |= {"cu_q_ptr": "*i32", "cu_k_ptr": "*i32"}
        if a.sparse:
            out |= {"visit_ptr": "*i32", "blocks_ptr": "*i32"}
        tensors = a.modifier.tensors if a.modifier else ()
        out |= {f"{t.name}_ptr": POINTER[t.dtype] for t in tensors}
        for name in (*params, *results):
            if a.kind == "decode" and name == "lse":
                continue
            axes = "bh" if name in VECTORS or (a.kind == "decode" and name in ("q", "out")) else "bhs"
            out |= {f"{name}_{axis}": "i32" for axis in axes}
        for t in tensors:
            out |= {f"{t.name}_b": "i32", f"{t.name}_h": "i32"}
            out |= {t.stride: "i32"} if t.stride else {}
        if a.kind != "decode":
            out |= {"S": "i32", "T": "i32", "shift": "i32"}
        return out | {"scale": "fp32"}

    def aligned(self) -> tuple[str, ...]:
        """Strides, wherever the head sizes are multiples of 16: without it, copies are narrow."""
        a, sizes = self.a, dict[str, int]()
        for name in self.arguments():
            stem, _, axis = name.rpartition("_")
            if axis in ("b", "h", "s") and stem:
                of_e = stem in ("v", "out", "dout", "dv")
                sizes[name] = 1 if stem in VECTORS else a.e if of_e else a.d
            elif axis == "s0":
                sizes[name] = a.keys
        tensors = a.modifier.tensors if a.modifier else ()
        sizes |= {f"{t.name}_{axis}": a.keys for t in tensors for axis in "bh"}
        return tuple(name for name in self.arguments() if sizes.get(name, 1) % 16 == 0)

    def draft(self) -> Draft:
        a, tile = self.a, self.tile
        constants = {"BLOCK_M": tile.m, "BLOCK_N": tile.n, "D": a.d, "E": a.e}
        constants |= {f"BLOCK_{name}": max(16, power_of_two(constants[name])) for name in "DE"}
        # a rank may have another number of heads than the first
        derived = {"HEADS": (a.heads, "q.shape[1]"), "GROUPS": (a.groups, "k.shape[1]")}
        if a.kind == "decode":
            constants["SPLITS"] = tile.splits
        features = {"causal": a.causal, "variable length": a.varlen, "block list": a.sparse,
                    "modified scores": a.modifier}  # fmt: skip
        shown = ", ".join([a.kind, *(name for name, on in features.items() if on)])
        doc = f"Attention {a.name}: {shown}.\n\n{a.doc}\n"
        bodies = {"forward": self.forward, "dq": self.dq, "dkdv": self.dkdv, "decode": self.decode}
        params, results = _PARTS[a.kind]
        size = {"k": (a.groups * a.keys, a.d), "v": (a.groups * a.keys, a.e), "q": (a.heads * a.queries, a.d),
                "out": (a.heads * a.queries, a.e), "lse": (a.heads * a.queries, 2)}  # fmt: skip
        twin = {"dk": "k", "dv": "v", "dq": "q", "dout": "out", "delta": "lse"}
        moved = sum(rows * width * DTYPES[a.dtype] for rows, width in
                    (size[twin.get(name, name)] for name in (*params, *results)))  # fmt: skip
        return Draft(
            a.name, doc, self.arguments(), constants, derived, bodies[a.kind](),
            self.launch(constants, derived), self.aligned(), tile.warps, tile.stages, "attention", moved,
        )  # fmt: skip

    def launch(self, constants: dict[str, int], derived: dict[str, tuple[int, str]]) -> str:
        a = self.a
        params, results = _PARTS[a.kind]
        tensors = a.modifier.tensors if a.modifier else ()
        given = [*params, *(["lengths"] if a.kind == "decode" else [])]
        given += [] if a.scale is not None else ["scale"] if a.kind == "decode" else ["scale", "shift"]
        given += ["cu_q", "cu_k", "S", "T"] if a.varlen else []
        given += ["visit", "blocks"] if a.sparse else []
        given += [t.name for t in tensors]
        like = {"out": "(*q.shape[:-1], v.shape[-1])", "lse": "q.shape[:-1]", "delta": "q.shape[:-1]",
                "dq": "q.shape", "dk": "k.shape", "dv": "v.shape"}  # fmt: skip
        made = []
        for name in results:
            dtype = "torch.float32" if name in VECTORS else f"torch.{TORCH[a.dtype]}"
            shape = "q.shape[1::-1]" if a.varlen and name in VECTORS else like[name]
            made.append(f"{name} = torch.empty({shape}, dtype={dtype}, device=q.device)")
        sizes, extra = list[str](), list[str]()
        values = [self.value(name) for name in self.arguments()]
        if a.scale is not None:
            sizes.append(f"scale, shift = {a.scale!r}, {a.shift}")
        if a.kind == "decode":
            sizes += ["pairs = k.shape[0] * k.shape[1]"]
            grid = "(SPLITS, pairs)"
            extra = ["sums = torch.empty(pairs * SPLITS * BLOCK_M * BLOCK_E, device=q.device)",
                     "tops = torch.empty(pairs * SPLITS * BLOCK_M * 2, device=q.device)",
                     "count = torch.zeros(pairs, dtype=torch.int32, device=q.device)"]
        else:
            keys = a.kind == "dkdv"
            if a.varlen:
                sizes += [f"pairs = (len(cu_q) - 1) * {'k' if keys else 'q'}.shape[1]"]
            else:
                sizes += ["S, T = q.shape[2], k.shape[2]",
                         f"pairs = q.shape[0] * {'k' if keys else 'q'}.shape[1]"]
            blocks = "triton.cdiv(T, BLOCK_N)" if keys else "triton.cdiv(S, BLOCK_M)"
            grid = f"({blocks}, pairs)"
        return text(
            """
            def dense(tensor):
                \"\"\"The tensor, its last dim without gaps.\"\"\"
                return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] < 2 else tensor.contiguous()


            def launch(<given>):
                \"\"\"Run the kernel: see the file's head.\"\"\"
                if (q.shape[-1], v.shape[-1]) != (D, E):
                    raise ValueError("the kernel was made for heads of another size")
                <dense>
                <made>
                <sizes>
                <expand>
                if pairs and <some>.numel():
                    <extra>
                    <call>
                return (<results>,)
            """,
            dense=[f"{name} = dense({name})" for name in params], made=made, sizes=sizes, extra=extra,
            expand=[f"{t.name} = dense({t.name}.expand(q.shape[0], q.shape[1], "
                    f"{'S' if t.rows else '1'}, {'T' if t.column else '1'}))"
                    + ("" if t.column else ".contiguous()") for t in tensors],
            call=Draft.call(values, constants, derived, grid),
            given=", ".join(given), results=", ".join(results), some=results[0],
        )  # fmt: skip

    def value(self, argument: str) -> str:
        """What `launch` passes for an argument."""
        stem, _, axis = argument.rpartition("_")
        if axis == "ptr" or not stem:
            return stem or argument
        if axis == "s0":
            return f"{stem}.stride(2)"
        if stem in VECTORS:  # variable length: [h, tokens]
            dims = {"h": 0} if self.a.varlen else {"b": 0, "h": 1}
        else:
            mask = not any(stem in names for names in _PARTS[self.a.kind])
            dims = {"h": 1, "s": 0} if self.a.varlen and not mask else {"b": 0, "h": 1, "s": 2}
        return f"{stem}.stride({dims[axis]})" if axis in dims else "0"


__all__ = [
    "Attention", "AttentionTile", "Modifier", "attention_source", "default_attention_tile",
    "mask_modifier",
]  # fmt: skip
