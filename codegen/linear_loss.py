"""Cross-entropy of a linear layer's results, which are never in memory as a whole.

`loss = cross_entropy(x w^T, labels)` with x `[rows, k]`, w `[vocabulary, k]`: the forward kernel
keeps a tile of logits in registers and sums exponentials online, as attention does with keys. The
vocabulary is cut into parts that programs share; the last one of a row block merges (see the split
of `gemm` for why this needs no order). The gradient walks the vocabulary in chunks: a product whose
epilogue turns logits into their gradient, and two library products with that chunk. This multiplies
four times where stored logits would need three. Wijmans et al., Cut Your Losses, 2025.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..ir.types import DTYPES
from .expr import Graph
from .gemm import Gemm, Result, Tile, default_tile, gemm_source
from .hole import POINTER, Draft, Tensor, leaf, text
from .source import _TORCH as TORCH
from .source import KernelSource


@dataclass(frozen=True)
class LinearLoss:
    """A linear layer with cross-entropy: rows, size of the vocabulary, columns of x and w.

    Attributes:
        ignore: the label whose rows have loss 0 and no gradient.
        parts: programs that share a block of rows, forward.
        chunk: vocabulary of a chunk, backward: `rows * chunk` gradients are in memory.
    """

    name: str
    rows: int
    vocabulary: int
    k: int
    dtype: str
    ignore: int = -100
    parts: int = 8
    chunk: int = 8192


def linear_loss_source(loss: LinearLoss, tile: Tile | None = None) -> KernelSource:
    """The forward kernel: `launch(x, w, labels) -> loss, lse`, f32 `[rows]` both."""
    tile = tile or (Tile(32, 32, 32, 4, 2) if loss.dtype == "f32" else Tile(128, 128, 64, 8, 3))
    pointer = POINTER[loss.dtype]
    arguments = {"x_ptr": pointer, "w_ptr": pointer, "labels_ptr": "*i64", "loss_ptr": "*fp32",
                 "lse_ptr": "*fp32", "parts_ptr": "*fp32", "count_ptr": "*i32",
                 **dict.fromkeys(("M", "N", "K", "x_stride", "w_stride"), "i32")}  # fmt: skip
    constants = {"BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k, "PARTS": loss.parts}
    derived = {"EVEN_K": (int(loss.k % tile.k == 0), "K % BLOCK_K == 0")}
    size = DTYPES[loss.dtype]
    values = ["x", "w", "labels", "loss", "lse", "parts", "count", "M", "N", "K", "x.stride(0)",
              "w.stride(0)"]  # fmt: skip
    launch = text(
        """
        def launch(x, w, labels):
            \"\"\"Run the kernel: x [M, K], w [N, K], labels [M] -> (loss, lse).\"\"\"
            x, w, labels = matrix(x), matrix(w), labels.reshape(-1).contiguous()
            (M, K), N = x.shape, len(w)
            blocks = triton.cdiv(M, BLOCK_M)
            loss = torch.empty(M, dtype=torch.float32, device=x.device)
            lse = torch.empty_like(loss)
            parts = torch.empty(blocks * PARTS * 3 * BLOCK_M, dtype=torch.float32, device=x.device)
            count = torch.zeros(blocks, dtype=torch.int32, device=x.device)
            if M:
                <call>
            return (loss, lse)
        """,
        call=Draft.call(values, constants, derived, "(blocks * PARTS,)"),
    )
    sizes = {"N": loss.vocabulary, "K": loss.k, "x_stride": loss.k, "w_stride": loss.k}
    aligned = tuple(name for name, size in sizes.items() if size % 16 == 0)
    doc = f"Linear layer with cross-entropy {loss.name}: losses and log-sum-exps.\n"
    precision = ', input_precision="ieee"' if loss.dtype == "f32" else ""
    body = text(_FORWARD, ignore=str(loss.ignore), precision=precision)
    moved = (loss.rows + loss.vocabulary) * loss.k * size + 16 * loss.rows
    return Draft(loss.name, doc, arguments, constants, derived, body, launch, aligned, tile.warps,
                 tile.stages, "linear_loss", moved).source()  # fmt: skip


_FORWARD = """
blocks = tl.cdiv(M, BLOCK_M)
block = tl.program_id(0) % blocks  # programs that run at the same time share w
part = tl.program_id(0) // blocks
row = block * BLOCK_M + tl.arange(0, BLOCK_M)
in_rows = row < M
k = tl.arange(0, BLOCK_K)
label = tl.load(labels_ptr + row, mask=in_rows, other=<ignore>)
top = tl.full([BLOCK_M], float("-inf"), tl.float32)
total = tl.zeros([BLOCK_M], tl.float32)
picked = tl.zeros([BLOCK_M], tl.float32)
x_row = x_ptr + row[:, None].to(tl.int64) * x_stride + k[None, :]
length = tl.cdiv(tl.cdiv(N, BLOCK_N), PARTS) * BLOCK_N
for start in range(part * length, min(N, (part + 1) * length), BLOCK_N):
    col = start + tl.arange(0, BLOCK_N)
    in_cols = col < N
    x_tile = x_row
    w_tile = w_ptr + col[None, :].to(tl.int64) * w_stride + k[:, None]
    logits = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k0 in range(0, K, BLOCK_K):
        in_x = in_rows[:, None]
        in_w = in_cols[None, :]
        if not EVEN_K:
            in_x = in_rows[:, None] & (k0 + k < K)[None, :]
            in_w = in_cols[None, :] & (k0 + k < K)[:, None]
        x = tl.load(x_tile, mask=in_x, other=0.0)
        w = tl.load(w_tile, mask=in_w, other=0.0)
        logits = tl.dot(x, w, logits<precision>)
        x_tile += BLOCK_K
        w_tile += BLOCK_K
    picked += tl.sum(tl.where(col[None, :] == label[:, None], logits, 0.0), 1)
    logits = tl.where(in_cols[None, :], logits, float("-inf"))
    new = tl.maximum(top, tl.max(logits, 1))
    safe = tl.where(new == float("-inf"), 0.0, new)
    total = total * tl.exp(top - safe) + tl.sum(tl.exp(logits - safe[:, None]), 1)
    top = new
parts = parts_ptr + block * (PARTS * 3 * BLOCK_M) + tl.arange(0, BLOCK_M)
own = parts + part * (3 * BLOCK_M)
tl.store(own, top)
tl.store(own + BLOCK_M, total)
tl.store(own + 2 * BLOCK_M, picked)
tl.debug_barrier()
before = tl.atomic_add(count_ptr + block, 1, sem="acq_rel")
if before == PARTS - 1:
    top = tl.load(parts, cache_modifier=".cg")
    total = tl.load(parts + BLOCK_M, cache_modifier=".cg")
    picked = tl.load(parts + 2 * BLOCK_M, cache_modifier=".cg")
    for other in range(1, PARTS):
        its = parts + other * (3 * BLOCK_M)
        its_top = tl.load(its, cache_modifier=".cg")
        new = tl.maximum(top, its_top)
        safe = tl.where(new == float("-inf"), 0.0, new)
        its_total = tl.load(its + BLOCK_M, cache_modifier=".cg")
        total = total * tl.exp(top - safe) + its_total * tl.exp(its_top - safe)
        picked += tl.load(its + 2 * BLOCK_M, cache_modifier=".cg")
        top = new
    lse = top + tl.log(total)
    loss = tl.where(label == <ignore>, 0.0, lse - picked)
    tl.store(loss_ptr + row, loss, mask=in_rows)
    tl.store(lse_ptr + row, lse, mask=in_rows)
"""


def linear_loss_gradient_source(loss: LinearLoss, tile: Tile | None = None) -> KernelSource:
    """The gradient: `launch(dloss, x, w, labels, lse) -> dx, dw`, chunk by chunk.

    dx is summed in f32 over the chunks. The signature is that of the chunk's kernel.
    """
    graph = Graph()
    tensors = tuple(Tensor(name, dtype, column=False) for name, dtype in (
        ("dloss", "f32"), ("labels", "i64"), ("lse", "f32")))  # fmt: skip
    first = Tensor("first", "i64", rows=False, column=False)
    dloss, label, lse = (tensor.load(graph) for tensor in tensors)
    column = graph.make("column", (), "i32", (0,), rows=False, column=True)
    hit = (column.to("i64") + first.load(graph)).equals(label).to("f32")
    scale = graph.where(label.equals(loss.ignore), 0.0, dloss)
    gradient = (graph.unary("exp", leaf(graph, "acc") - lse) - hit) * scale
    chunk = min(loss.chunk, loss.vocabulary)
    gemm = Gemm(loss.name, loss.rows, chunk, loss.k, loss.dtype,
                (Result("dlogits", loss.dtype, gradient),), (*tensors, first),
                doc="The gradient of a chunk of logits of a linear layer with cross-entropy.")  # fmt: skip
    # the last chunk may be of any length, which tensor descriptors do not allow
    tile = tile or (Tile(128, 128, 64, 8, 3) if DTYPES[loss.dtype] == 2 else default_tile(gemm))
    source = gemm_source(gemm, tile)
    driver = text(
        """
        def launch(dloss, x, w, labels, lse):
            \"\"\"The gradients of x [M, K] and w [N, K]: (dx, dw).\"\"\"
            shape, x, w, labels = x.shape, matrix(x), matrix(w), labels.reshape(-1)
            dx = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
            dw = torch.empty(w.shape, dtype=torch.<dtype>, device=w.device)
            firsts = torch.arange(0, len(w), <chunk>, device=x.device)
            for number, part in enumerate(w.split(<chunk>)):
                (dlogits,) = chunk_gradient(x, part, dloss, labels, lse, firsts[number])
                dx += dlogits @ part
                torch.mm(dlogits.t(), x, out=dw[number * <chunk> : number * <chunk> + len(part)])
            return (dx.to(torch.<dtype>).reshape(shape), dw)
        """,
        dtype=TORCH[loss.dtype], chunk=str(chunk),
    )  # fmt: skip
    body = source.text.replace("def launch(", "def chunk_gradient(")
    return replace(source, text=f"{body}\n\n{driver}\n", kind="linear_loss")


__all__ = ["LinearLoss", "linear_loss_gradient_source", "linear_loss_source"]
