"""Weight formats: how a weight `[n, k]` is stored, packed, and decoded in a kernel.

| format | stored as | scales |
| --- | --- | --- |
| plain | the dtype of the product | none |
| int8 | i8 [n, k] | f32 [n] |
| fp8 | e4m3 [n, k] | f32 [n] |
| int4 | u8 [n, k / 2], two weights a byte | scale and zero point, [k / group, n] |

A byte of int4 holds weights that are 64 columns apart: column j of each block of 128 in its low half
and column 64 + j in its high half. So a tile of bytes becomes two tiles of weights that are each a
left operand of the matrix unit as they are; neighbours in one byte would have to be interleaved.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..ir.errors import CompileError

#: columns of a block of int4: two tiles of 64, the longest k of which 16-bit rows fill 128 bytes
BLOCK = 128
HALF = BLOCK // 2
#: largest magnitudes: two's complement without its lowest number, e4m3 (Micikevicius et al., 2022)
_INT8_MAX, _E4M3_MAX, _INT4_MAX = 127.0, 448.0, 15.0


@dataclass(frozen=True)
class Format:
    """A weight format.

    Attributes:
        name: `plain`, `int8`, `fp8` or `int4`.
        storage: dtype of the stored weight; empty for the dtype of the product.
        group: columns that share a scale, of int4.
    """

    name: str = "plain"
    storage: str = ""
    group: int = 0

    @property
    def scaled(self) -> bool:
        """Is there one scale a channel, which the accumulator is multiplied with?"""
        return self.name in ("int8", "fp8")


PLAIN, INT8, FP8 = Format(), Format("int8", "i8"), Format("fp8", "f8e4m3")


def int4(group: int = BLOCK) -> Format:
    """int4 with a scale and a zero point for `group` columns. Raises CompileError W0901."""
    if group < HALF or group % HALF:
        raise CompileError(
            "W0901", f"int4 weights with groups of {group} columns have no kernel",
            hint=f"take a multiple of {HALF}",
        )  # fmt: skip
    return Format("int4", "u8", group)


def quantize_rows(x: Tensor, storage: str) -> tuple[Tensor, Tensor]:
    """(values, f32 scale of each row) of a matrix in `i8` or `f8e4m3`: rows times scale is about x.

    Rows of zeros have scale 1. Serves weights `[n, k]` and, for w8a8, activations `[m, k]`.
    """
    most = _INT8_MAX if storage == "i8" else _E4M3_MAX
    top = x.float().abs().amax(1) if x.shape[1] else x.new_zeros(len(x), dtype=torch.float32)
    scale = torch.where(top > 0, top / most, 1.0)
    scaled = (x.float() / scale[:, None]).clamp(-most, most)  # the quotient may round up past it
    if storage == "i8":
        return scaled.round().to(torch.int8), scale
    return scaled.to(torch.float8_e4m3fn), scale


def pack_int4(weight: Tensor, group: int = BLOCK) -> tuple[Tensor, Tensor, Tensor]:
    """(bytes [n, k / 2], scales [k / group, n], zero points [k / group, n]) of a weight `[n, k]`.

    Columns are padded to whole blocks with zeros. Scales and zero points, which are whole numbers
    in 0..15, have the weight's dtype; each group's range is widened to hold 0, which stays exact.
    """
    fmt = int4(group)
    n, k = weight.shape
    padded = -(-k // BLOCK) * BLOCK
    wide = torch.nn.functional.pad(weight.float(), (0, -k % max(BLOCK, fmt.group)))
    groups = wide.reshape(n, wide.shape[1] // group, group)
    low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
    scale = torch.where(high > low, (high - low) / _INT4_MAX, 1.0).to(weight.dtype)
    zero = (-low / scale.float()).round().clamp(0, _INT4_MAX)
    codes = (groups / scale.float()[..., None] + zero[..., None]).round().clamp(0, _INT4_MAX)
    codes = codes.to(torch.uint8).reshape(n, wide.shape[1])[:, :padded].reshape(n, -1, 2, HALF)
    packed = (codes[:, :, 0] | (codes[:, :, 1] << 4)).reshape(n, padded // 2)
    return packed, scale.t().contiguous(), zero.to(weight.dtype).t().contiguous()


def unpack_int4(
    packed: Tensor, scale: Tensor, zero: Tensor, k: int, group: int = BLOCK
) -> Tensor:
    """The weight `[n, k]`, in f32, that a kernel computes with: the inverse of `pack_int4`."""
    n = len(packed)
    bytes_ = packed.reshape(n, -1, 1, HALF)
    codes = torch.cat([bytes_ & 15, bytes_ >> 4], 2).reshape(n, -1).float()[:, :k]
    number = torch.arange(k, device=packed.device) // group
    return (codes - zero.float()[number].t()) * scale.float()[number].t()


__all__ = [
    "BLOCK", "FP8", "HALF", "INT8", "PLAIN", "Format", "int4", "pack_int4", "quantize_rows",
    "unpack_int4",
]  # fmt: skip
