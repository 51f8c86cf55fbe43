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
from ..types import FLOATS, TensorType

#: An op whose values depend on their position, on a part of its iterations: set where a batch is
#: computed in micro-batches, so that they get the numbers of the whole batch.
PART = {"part": AttrSpec("any", (), "(iteration dim, first, total): a part of a larger op")}


def _created(ins: Sequence[Shape], outs: Sequence[Shape], attrs: Mapping[str, Attr]) -> Signature:
    return instantiate(", ".join("_" for _ in ins) + " -> a...", ins, outs)


def _scalar_types(ins: Sequence[TensorType], attrs: Mapping[str, Attr]) -> Sequence[TensorType]:
    return [ins[0]]


define(name="constant", family="creation", flops_per_point=0,
       doc="a tensor filled with `value`", signature=_created,
       attrs={"value": AttrSpec("any", doc="of every element")},
       ref=lambda c: c.torch.full(
           c.shape(), c.attrs["value"], dtype=c.dtype(), device=c.device))  # fmt: skip


def _literal_verify(op: Op) -> str:
    values = op.attrs["values"]
    count = len(values) if isinstance(values, tuple) else -1
    wanted = op.result.type.numel
    part = op.attrs.get("part")
    if isinstance(part, tuple) and part:
        size = op.result.type.shape[int(str(part[0])[1:])]
        wanted = wanted // size * int(part[2])  # type: ignore[arg-type]
    return "" if count == wanted else f"{count} values for {op.result.type}"


def _literal(c: Any) -> Any:
    whole = c.torch.tensor(c.attrs["values"], dtype=c.dtype(), device=c.device)
    return whole[c.index(0)] if c.shape() else whole.reshape(())


define(name="literal", family="creation", flops_per_point=0, verify=_literal_verify,
       doc="a small tensor written out in row-major order", signature=_created,
       attrs={"values": AttrSpec("any", doc="in row-major order"), **PART}, ref=_literal)  # fmt: skip


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
       attrs={"dim": AttrSpec("int", 0, doc="a tensor dim, >= 0"),
              "start": AttrSpec("any", 0, doc="the first"),
              "step": AttrSpec("any", 1, doc="the distance"), **PART})  # fmt: skip

_M0, _M1, _W0, _W1 = 0xD2511F53, 0xCD9E8D57, 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF


#: elements at a time, so that the intermediates stay in a core's cache (measured: 2x faster)
_CHUNK = 1 << 14


def philox(torch: Any, seed: Any, counter: Any) -> tuple[Any, Any]:
    """Two of the four 32-bit words (as int64) of Philox 4x32-10 at each counter.

    Between the rounds only the low 32 bits of the int64 words count: they are masked where they
    are multiplied. A product wraps modulo 2**64, which keeps all bits of the unsigned product.
    """
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    w0 = (counter & _MASK) * _M0  # the first round: the other two words of the counter are 0
    c0, c1, c2, c3 = (counter >> 32) ^ k0, 0, (w0 >> 32) ^ k1, w0
    for _ in range(9):
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
        w0, w1 = (c0 & _MASK) * _M0, (c2 & _MASK) * _M1
        c0, c1, c2, c3 = (w1 >> 32) ^ (c1 ^ k0), w1, (w0 >> 32) ^ (c3 ^ k1), w0
    return c0 & _MASK, c1 & _MASK


def random_words(c: Any, seed: Any, index: Any) -> tuple[Any, Any]:
    """`philox` at each position, in chunks where the context may use what is fast."""
    if not c.fused or index.numel() <= _CHUNK:
        return philox(c.torch, seed, index)
    chunks = [philox(c.torch, seed, part) for part in index.reshape(-1).split(_CHUNK)]
    first, second = (c.torch.cat(words).reshape(index.shape) for words in zip(*chunks))
    return first, second


def to_uniform(torch: Any, word: Any) -> Any:
    """32 random bits to [0, 1), as `tl.rand` does: fold the sign, scale by 2**-31."""
    return torch.minimum(word, word ^ _MASK).to(torch.float32) * 4.6566127342e-10


def _uniform(c: Any, seed: Any) -> Any:
    word, _ = random_words(c, seed, c.index(0, seed.device))
    unit, dtype = to_uniform(c.torch, word), c.dtype()
    if dtype.itemsize < 4:  # rounding to nearest would give 1.0; eps is 1 in the last place of 1.0
        eps = c.torch.finfo(dtype).eps / 2
        unit = (unit / eps).floor() * eps
    return unit.to(dtype)


def _normal(c: Any, seed: Any) -> Any:
    first, second = random_words(c, seed, c.index(0, seed.device))
    radius = (-2.0 * to_uniform(c.torch, first).clamp_min(1e-7).log()).sqrt()
    return (radius * (2 * pi * to_uniform(c.torch, second)).cos()).to(c.dtype())


def _dropout(c: Any, x: Any, seed: Any) -> Any:
    word, _ = random_words(c, seed, c.index(0, seed.device))
    keep = to_uniform(c.torch, word) >= c.attrs["p"]
    scale = 1.0 / (1.0 - c.attrs["p"]) if c.attrs["p"] < 1 else 0.0
    return x * (keep.to(x.dtype) * scale)


def _float_verify(op: Op) -> str:
    dtype = op.result.type.dtype
    return "" if dtype in FLOATS else f"random numbers are floats, not {dtype}"


define(name="uniform", family="random", verify=_float_verify,
       flops_per_point=60, signature=_created, ref=_uniform, attrs=PART,
       doc="uniform numbers in [0, 1) from a seed (i64 scalar) and the logical position")  # fmt: skip
define(name="normal", family="random", verify=_float_verify,
       flops_per_point=90, signature=_created, ref=_normal, attrs=PART,
       doc="standard normal numbers from a seed and the logical position (Box-Muller)")  # fmt: skip
define(name="dropout", family="random", flops_per_point=62, signature="a..., _ -> a...",
       linear=((0,),), attrs={"p": AttrSpec("float", doc="probability of a 0"), **PART},
       types=_scalar_types, dtypes="fi", ref=_dropout,
       doc="x / (1 - p) where a uniform number is >= p, else 0; the same call on dy is its "
           "gradient")  # fmt: skip


def _fold_seed(c: Any, seed: Any) -> Any:
    first, second = philox(c.torch, seed, c.torch.full_like(seed, c.attrs["by"]))
    return (first & 0x7FFFFFFF) << 32 | second


define(name="fold_seed", family="random", flops_per_point=60, signature="_ -> _",
       attrs={"by": AttrSpec("int", doc="the number to fold in")}, types=_scalar_types, ref=_fold_seed,
       doc="an independent seed from a seed and a number, one for each random op or call")  # fmt: skip
