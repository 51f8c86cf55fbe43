"""Joins attention over parts of the keys by their log-sum-exps: a shared prefix and what follows it.

All sequences that share a prefix are rows of one attention over it, and each has its own over the
rest; the two results are one attention over all keys. Rows that a part has no keys for have lse -inf
there and take nothing from it. Juravsky et al., Hydragen, 2024.
"""

from __future__ import annotations

from ..ir.types import DTYPES
from .hole import POINTER, Draft, text
from .layout import power_of_two
from .source import KernelSource

_BODY = """
row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
in_rows = row < M
col = tl.arange(0, BLOCK_E)
inside = in_rows[:, None] & (col < E)[None, :]
at = row[:, None].to(tl.int64) * E + col[None, :]
left_lse = tl.load(left_lse_ptr + row, mask=in_rows, other=0.0)
right_lse = tl.load(right_lse_ptr + row, mask=in_rows, other=0.0)
top = tl.maximum(left_lse, right_lse)
safe = tl.where(top == float("-inf"), 0.0, top)
left_part = tl.exp(left_lse - safe)
right_part = tl.exp(right_lse - safe)
total = left_part + right_part
whole = tl.where(total == 0, 1.0, total)
left = tl.load(left_ptr + at, mask=inside).to(tl.float32) * (left_part / whole)[:, None]
right = tl.load(right_ptr + at, mask=inside).to(tl.float32) * (right_part / whole)[:, None]
tl.store(out_ptr + at, (left + right).to(out_ptr.dtype.element_ty), mask=inside)
tl.store(lse_ptr + row, safe + tl.log(total), mask=in_rows)
"""


def merge_source(name: str, rows: int, e: int, dtype: str) -> KernelSource:
    """`launch(left, left_lse, right, right_lse) -> out, lse` of `[..., e]` and `[...]`."""
    kinds = {"left": dtype, "left_lse": "f32", "right": dtype, "right_lse": "f32", "out": dtype, "lse": "f32"}
    arguments = {f"{stem}_ptr": POINTER[kind] for stem, kind in kinds.items()} | {"M": "i32"}
    width = power_of_two(e)
    constants = {"BLOCK_M": max(1, 1024 // width), "E": e, "BLOCK_E": width}
    launch = text(
        """
        def launch(left, left_lse, right, right_lse):
            \"\"\"Run the kernel: two parts' (out, lse) -> (out, lse) of both.\"\"\"
            M = left_lse.numel()
            left, right = left.contiguous(), right.contiguous()
            left_lse, right_lse = left_lse.contiguous(), right_lse.contiguous()
            out, lse = torch.empty_like(left), torch.empty_like(left_lse)
            if M:
                <call>
            return (out, lse)
        """,
        call=Draft.call([*kinds, "M"], constants, {}, "(triton.cdiv(M, BLOCK_M),)"),
    )
    moved = 3 * rows * (e * DTYPES[dtype] + DTYPES["f32"])
    doc = f"Merge {name}: attention over two parts of the keys.\n"
    return Draft(name, doc, arguments, constants, {}, _BODY, launch, (), 4, 1,
                 "attention_merge", moved).source()  # fmt: skip


__all__ = ["merge_source"]
