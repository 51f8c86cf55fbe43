"""Tensors out of nothing: constants, positions, random numbers.

Random numbers come from Philox 4x32-10 with the seed as key and the *logical position* of each
element (its linear index in the global tensor) as counter: any split gives the same stream, and a
GPU kernel (`tl.rand`) gives it too. Salmon et al., Parallel random numbers: as easy as 1, 2, 3, 2011.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import pi
from typing import Any

from ..module import Attr, Op
from ..opdef import AttrSpec, define
from ..signature import Shape, Signature, instantiate
from ..types import TensorType


def _created(ins: Sequence[Shape], outs: Sequence[Shape], attrs: Mapping[str, Attr]) -> Signature:
    return instantiate(", ".join("_" for _ in ins) + " -> a...", ins, outs)


def _scalar_types(ins: Sequence[TensorType], attrs: Mapping[str, Attr]) -> Sequence[TensorType]:
    return [ins[0]]


define(name="constant", family="creation", flops_per_point=0,
       doc="a tensor filled with `value`", signature=_created, attrs={"value": AttrSpec("any")},
       ref=lambda c: c.torch.full(
           c.shape(), c.attrs["value"], dtype=c.dtype(), device=c.device))  # fmt: skip


def _literal_verify(op: Op) -> str:
    values = op.attrs["values"]
    count = len(values) if isinstance(values, tuple) else -1
    return "" if count == op.result.type.numel else f"{count} values for {op.result.type}"


def _literal(c: Any) -> Any:
    whole = c.torch.tensor(c.attrs["values"], dtype=c.dtype(), device=c.device)
    return whole[c.index(0)] if c.shape() else whole.reshape(())


define(name="literal", family="creation", flops_per_point=0, verify=_literal_verify,
       doc="a small tensor written out in row-major order", signature=_created,
       attrs={"values": AttrSpec("any")}, ref=_literal)  # fmt: skip


def _iota(c: Any) -> Any:
    dim = c.attrs["dim"]
    shape = c.shape()
    start = c.offset(f"a{dim}")
    line = c.torch.arange(start, start + shape[dim], device=c.device)
    view = [1] * len(shape)
    view[dim] = shape[dim]
    line = line * c.attrs["step"] + c.attrs["start"]
    return line.to(c.dtype()).reshape(view).expand(shape)


def _iota_verify(op: Op) -> str:
    dim, rank = op.attrs.get("dim", 0), len(op.result.type.shape)
    return "" if dim in range(rank) else f"there is no dim {dim} in {op.result.type}"


define(name="iota", family="creation", verify=_iota_verify, flops_per_point=1,
       doc="start + step * (position along `dim`)", signature=_created, ref=_iota,
       attrs={"dim": AttrSpec("int", 0), "start": AttrSpec("any", 0),
              "step": AttrSpec("any", 1)})  # fmt: skip

_M0, _M1, _W0, _W1 = 0xD2511F53, 0xCD9E8D57, 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF


def _mulhilo(a: int, b: Any) -> tuple[Any, Any]:
    wide = b * a  # wraps modulo 2**64, which keeps all 64 bits of the unsigned product
    return (wide >> 32) & _MASK, wide & _MASK


def philox(torch: Any, seed: Any, counter: Any) -> tuple[Any, Any]:
    """Two of the four 32-bit words (as int64) of Philox 4x32-10 at each counter."""
    c0, c1 = counter & _MASK, (counter >> 32) & _MASK
    c2 = c3 = torch.zeros_like(c0)
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        hi0, lo0 = _mulhilo(_M0, c0)
        hi1, lo1 = _mulhilo(_M1, c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1


def _to_uniform(torch: Any, word: Any) -> Any:
    """32 random bits to [0, 1), as `tl.rand` does: fold the sign, scale by 2**-31."""
    signed = torch.where(word >= 1 << 31, word - (1 << 32), word)
    folded = torch.where(signed < 0, -signed - 1, signed)
    return folded.to(torch.float32) * 4.6566127342e-10


def _uniform(c: Any, seed: Any) -> Any:
    word, _ = philox(c.torch, seed, c.index(0, seed.device))
    unit, dtype = _to_uniform(c.torch, word), c.dtype()
    if dtype.itemsize < 4:  # rounding to nearest would give 1.0; eps is 1 in the last place of 1.0
        eps = c.torch.finfo(dtype).eps / 2
        unit = (unit / eps).floor() * eps
    return unit.to(dtype)


def _normal(c: Any, seed: Any) -> Any:
    first, second = philox(c.torch, seed, c.index(0, seed.device))
    radius = (-2.0 * _to_uniform(c.torch, first).clamp_min(1e-7).log()).sqrt()
    return (radius * (2 * pi * _to_uniform(c.torch, second)).cos()).to(c.dtype())


def _dropout(c: Any, x: Any, seed: Any) -> Any:
    word, _ = philox(c.torch, seed, c.index(0, seed.device))
    keep = _to_uniform(c.torch, word) >= c.attrs["p"]
    scale = 1.0 / (1.0 - c.attrs["p"]) if c.attrs["p"] < 1 else 0.0
    return x * (keep.to(x.dtype) * scale)


define(name="uniform", family="random", flops_per_point=60, signature=_created, ref=_uniform,
       doc="uniform numbers in [0, 1) from a seed (i64 scalar) and the logical position")  # fmt: skip
define(name="normal", family="random", flops_per_point=90, signature=_created, ref=_normal,
       doc="standard normal numbers from a seed and the logical position (Box-Muller)")  # fmt: skip
define(name="dropout", family="random", flops_per_point=62, signature="a..., _ -> a...",
       linear=((0,),), attrs={"p": AttrSpec("float")}, types=_scalar_types, dtypes="fi", ref=_dropout,
       doc="x / (1 - p) where a uniform number is >= p, else 0; the same call on dy is its "
           "gradient")  # fmt: skip


def _fold_seed(c: Any, seed: Any) -> Any:
    first, second = philox(c.torch, seed, c.torch.full_like(seed, c.attrs["by"]))
    return (first & 0x7FFFFFFF) << 32 | second


define(name="fold_seed", family="random", flops_per_point=60, signature="_ -> _",
       attrs={"by": AttrSpec("int")}, types=_scalar_types, ref=_fold_seed,
       doc="an independent seed from a seed and a number, one for each random op or call")  # fmt: skip
