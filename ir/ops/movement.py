"""Data movement: ops that only rearrange elements. They pass partial sums through."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Any

from ..module import Attr
from ..opdef import AttrSpec, define, maps_signature
from ..signature import Dim, DimMap, Shape, Signature, SignatureError, reshape_signature
from ..types import TensorType

Attrs = Mapping[str, Attr]


def _reshape(ins: Sequence[Shape], outs: Sequence[Shape], attrs: Attrs) -> Signature:
    operand, result, sizes = reshape_signature(ins[0], outs[0])
    # `w*` factors are groups whose boundaries do not divide each other
    dims = {name: Dim(name, size, whole=name[0] == "w") for name, size in sizes.items()}
    return maps_signature(dims, [operand], [result], ((0,),))


define(name="reshape", family="movement", doc="the same elements in row-major order, another shape",
       signature=_reshape, linear=((0,),), flops_per_point=0,
       ref=lambda c, x: x.reshape(c.shape()))  # fmt: skip


def _permute(ins: Sequence[Shape], outs: Sequence[Shape], attrs: Attrs) -> Signature:
    order = attrs["dims"]
    assert isinstance(order, tuple)
    if sorted(order) != list(range(len(ins[0]))):
        raise SignatureError(f"{list(order)} is not a permutation of {len(ins[0])} dims")
    if tuple(ins[0][d] for d in order) != tuple(outs[0]):  # type: ignore[index]
        raise SignatureError(f"result is {list(outs[0])}, not the permuted {list(ins[0])}")
    dims = {f"a{d}": Dim(f"a{d}", size) for d, size in enumerate(ins[0])}
    operand = tuple((f"a{d}",) for d in range(len(order)))
    return maps_signature(dims, [operand], [tuple((f"a{d}",) for d in order)], ((0,),))


define(name="permute", family="movement", doc="reorder the dims: result dim i is operand dim dims[i]",
       signature=_permute, linear=((0,),), flops_per_point=0,
       attrs={"dims": AttrSpec("ints", doc="the order of the dims")},
       types=lambda ins, attrs: [
           TensorType(ins[0].dtype, tuple(ins[0].shape[d] for d in attrs["dims"]))],
       ref=lambda c, x: x.permute(c.attrs["dims"]))  # fmt: skip


def _expand(ins: Sequence[Shape], outs: Sequence[Shape], attrs: Attrs) -> Signature:
    shape, result = ins[0], outs[0]
    extra = len(result) - len(shape)
    if extra < 0:
        raise SignatureError(f"cannot expand {list(shape)} to {list(result)}")
    operand: list[tuple[str, ...]] = []
    for d, size in enumerate(shape):
        if size not in (1, result[d + extra]):
            raise SignatureError(f"cannot expand {list(shape)} to {list(result)}")
        operand.append((f"a{d + extra}",) if size == result[d + extra] else ())
    dims = {f"a{d}": Dim(f"a{d}", size) for d, size in enumerate(result)}
    outs_map: DimMap = tuple((f"a{d}",) for d in range(len(result)))
    return maps_signature(dims, [tuple(operand)], [outs_map], ((0,),))


define(name="expand", family="movement", doc="repeat dims of size 1, and new leading dims",
       signature=_expand, linear=((0,),), flops_per_point=0,
       ref=lambda c, x: x.expand(c.shape()))  # fmt: skip


def aligned(
    ins: Sequence[Shape],
    outs: Sequence[Shape],
    touched: Set[int],
    linear: tuple[tuple[int, ...], ...],
) -> Signature:
    """All tensors side by side: dim d is the same in each, but for the touched dims, which are
    whole, and whose size may differ between tensors. Raises SignatureError."""
    rank = len(outs[0])
    dims: dict[str, Dim] = {}
    maps = []
    for index, shape in enumerate((*ins, *outs)):
        if len(shape) != rank:
            raise SignatureError(f"ranks differ: {len(shape)} and {rank}")
        row = []
        for d, size in enumerate(shape):
            name = f"w{index}_{d}" if d in touched else f"a{d}"
            known = dims.setdefault(name, Dim(name, size, whole=d in touched))
            if known.size != size:
                raise SignatureError(f"dim {d} is {known.size} in one tensor, {size} in another")
            row.append((name,))
        maps.append(tuple(row))
    return maps_signature(dims, maps[: len(ins)], maps[len(ins) :], linear)


def resized(linear: tuple[tuple[int, ...], ...] = ((0,),)) -> Any:
    """Signature where a dim that changes its size is whole and every other dim is kept."""

    def signature(ins: Sequence[Shape], outs: Sequence[Shape], attrs: Attrs) -> Signature:
        touched = _touched(attrs, len(outs[0]))
        group = tuple(range(len(ins))) if linear and linear[0] == (-1,) else None
        return aligned(ins, outs, touched, (group,) if group else linear)

    return signature


def _touched(attrs: Attrs, rank: int) -> set[int]:
    if "dim" in attrs:
        dim = attrs["dim"]
        assert isinstance(dim, int)
        if not 0 <= dim < rank:
            raise SignatureError(f"dim {dim} is not in 0..{rank - 1}")
        return {dim}
    low, high = attrs["low"], attrs["high"]
    assert isinstance(low, tuple) and isinstance(high, tuple)
    if not len(low) == len(high) == rank:
        raise SignatureError(f"`low` and `high` need {rank} numbers each")
    return {d for d in range(rank) if low[d] or high[d]}


def _slice_types(ins: Sequence[TensorType], attrs: Attrs) -> Sequence[TensorType]:
    shape = list(ins[0].shape)
    start, stop, step = (int(attrs[k]) for k in ("start", "stop", "step"))  # type: ignore[arg-type]
    dim = int(attrs["dim"])  # type: ignore[arg-type]
    if not 0 <= start <= stop <= shape[dim] or step < 1:
        raise SignatureError(f"there is no slice {start}:{stop}:{step} of {shape[dim]} elements")
    shape[dim] = len(range(start, stop, step))
    return [TensorType(ins[0].dtype, tuple(shape))]


def _slice(c: Any, x: Any) -> Any:
    index = [slice(None)] * x.dim()
    index[c.attrs["dim"]] = slice(c.attrs["start"], c.attrs["stop"], c.attrs["step"])
    return x[tuple(index)]


define(name="slice", family="movement", doc="elements start, start + step, ... < stop of a dim",
       signature=resized(), linear=((0,),), flops_per_point=0, ref=_slice, types=_slice_types,
       attrs={"dim": AttrSpec("int", doc="a tensor dim, >= 0"),
              "start": AttrSpec("int", 0, doc="the first"),
              "stop": AttrSpec("int", doc="end, exclusive"),
              "step": AttrSpec("int", 1, doc="the distance")})  # fmt: skip


def _pad(c: Any, x: Any) -> Any:
    sides = [n for pair in zip(c.attrs["low"][::-1], c.attrs["high"][::-1]) for n in pair]
    return c.torch.nn.functional.pad(x, sides, value=c.attrs["value"])


def _pad_signature(ins: Sequence[Shape], outs: Sequence[Shape], attrs: Attrs) -> Signature:
    # padding with something other than 0 does not commute with a sum
    return resized(((0,),) if attrs.get("value", 0) == 0 else ())(ins, outs, attrs)  # type: ignore[no-any-return]


define(name="pad", family="movement",
       doc="add `low[d]` elements before and `high[d]` after each dim; negative numbers crop",
       signature=_pad_signature, linear=((0,),), flops_per_point=0, ref=_pad,
       types=lambda ins, attrs: [TensorType(ins[0].dtype, tuple(
           s + lo + hi for s, lo, hi in zip(ins[0].shape, attrs["low"], attrs["high"])))],
       attrs={"low": AttrSpec("ints", doc="elements before each dim"),
              "high": AttrSpec("ints", doc="elements behind each dim"),
              "value": AttrSpec("float", 0.0, doc="of the new elements")})  # fmt: skip


def _concat_types(ins: Sequence[TensorType], attrs: Attrs) -> Sequence[TensorType]:
    shape = list(ins[0].shape)
    dim = int(attrs["dim"])  # type: ignore[arg-type]
    shape[dim] = sum(t.shape[dim] for t in ins)
    return [TensorType(ins[0].dtype, tuple(shape))]


define(name="concat", family="movement", doc="join tensors along a dim",
       signature=resized(((-1,),)), flops_per_point=0,
       attrs={"dim": AttrSpec("int", doc="a tensor dim, >= 0")},
       types=_concat_types, ref=lambda c, *xs: c.torch.cat(xs, c.attrs["dim"]))  # fmt: skip
define(name="flip", family="movement", doc="reverse a dim, which must be whole",
       signature=resized(), linear=((0,),), flops_per_point=0,
       attrs={"dim": AttrSpec("int", doc="a tensor dim, >= 0")},
       types=lambda ins, attrs: [ins[0]], ref=lambda c, x: x.flip(c.attrs["dim"]))  # fmt: skip
