"""Reductions, and ops that need a dim whole: scans, sorts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..module import Attr, Op
from ..opdef import AttrSpec, define, maps_signature
from ..signature import Dim, Shape, Signature, SignatureError
from ..types import TensorType
from .movement import aligned


def _reduced_shape(shape: Shape, attrs: Mapping[str, Attr]) -> Shape:
    dims = attrs["dims"]
    assert isinstance(dims, tuple)
    if len(set(dims)) != len(dims) or not set(dims) <= set(range(len(shape))):
        raise SignatureError(f"dims {list(dims)} are not distinct dims of {list(shape)}")
    keep = bool(attrs.get("keepdim", False))
    return tuple(1 if d in dims else size for d, size in enumerate(shape) if keep or d not in dims)


def _reduce(combine: str, linear: tuple[tuple[int, ...], ...] = ()) -> Callable[..., Signature]:
    def signature(
        ins: Sequence[Shape], outs: Sequence[Shape], attrs: Mapping[str, Attr]
    ) -> Signature:
        (shape,) = ins
        reduced = _reduced_shape(shape, attrs)
        if outs and tuple(outs[0]) != reduced:
            raise SignatureError(f"result is {list(outs[0])}, not {list(reduced)}")
        dims_attr = attrs["dims"]
        assert isinstance(dims_attr, tuple)
        dims = {
            f"a{d}": Dim(f"a{d}", size, whole=d in dims_attr and not combine,
                         combine=combine if d in dims_attr else "")
            for d, size in enumerate(shape)
        }  # fmt: skip
        keep = bool(attrs.get("keepdim", False))
        result = tuple(
            () if d in dims_attr else (f"a{d}",)
            for d in range(len(shape))
            if keep or d not in dims_attr
        )
        operand = tuple((f"a{d}",) for d in range(len(shape)))
        return maps_signature(dims, [operand], [result] * max(1, len(outs)), linear)

    return signature


def _types(dtype: str = "") -> Callable[..., Sequence[TensorType]]:
    def rule(ins: Sequence[TensorType], attrs: Mapping[str, Attr]) -> Sequence[TensorType]:
        return [TensorType(dtype or ins[0].dtype, _reduced_shape(ins[0].shape, attrs))]

    return rule


def _sum(c: Any, x: Any) -> Any:
    if not c.attrs["dims"]:
        return x.to(c.dtype())
    return x.sum(c.attrs["dims"], keepdim=c.attrs["keepdim"], dtype=c.dtype())


def _extreme(name: str) -> Callable[..., Any]:
    def ref(c: Any, x: Any) -> Any:
        if not c.attrs["dims"]:
            return x
        return getattr(c.torch, name)(x, c.attrs["dims"], keepdim=c.attrs["keepdim"])

    return ref


_DIMS = {
    "dims": AttrSpec("ints", doc="tensor dims"),
    "keepdim": AttrSpec("bool", False, doc="keep reduced dims, of size 1"),
}
define(name="reduce_sum", family="reduction", doc="sum over dims", signature=_reduce("sum", ((0,),)),
       linear=((0,),), attrs=_DIMS, types=_types(), ref=_sum)  # fmt: skip
define(name="reduce_max", family="reduction", doc="maximum over dims", signature=_reduce("max"),
       attrs=_DIMS, types=_types(), ref=_extreme("amax"))  # fmt: skip
define(name="reduce_min", family="reduction", doc="minimum over dims", signature=_reduce("min"),
       attrs=_DIMS, types=_types(), ref=_extreme("amin"))  # fmt: skip


def _prod(c: Any, x: Any) -> Any:
    for dim in sorted(c.attrs["dims"], reverse=True):
        x = x.prod(dim, keepdim=c.attrs["keepdim"])
    return x


define(name="reduce_prod", family="reduction", doc="product over dims, which must be whole",
       signature=_reduce(""), attrs=_DIMS, types=_types(), ref=_prod)  # fmt: skip
def _argmax_verify(op: Op) -> str:
    if op.operands[0].type.dtype == "bool":
        return "argmax of bools has no meaning"
    dims = op.attrs["dims"]
    return "" if isinstance(dims, tuple) and len(dims) == 1 else "argmax goes along one dim"


define(name="argmax", family="reduction", verify=_argmax_verify,
       doc="index of the first largest element of one dim",
       signature=_reduce(""), attrs=_DIMS, types=_types("i64"),
       ref=lambda c, x: x.argmax(c.attrs["dims"][0], keepdim=c.attrs["keepdim"]))  # fmt: skip


def along(linear: tuple[tuple[int, ...], ...] = ()) -> Callable[..., Signature]:
    """Signature of ops that keep dim `dim` whole and treat every other dim alike."""

    def signature(
        ins: Sequence[Shape], outs: Sequence[Shape], attrs: Mapping[str, Attr]
    ) -> Signature:
        dim = attrs["dim"]
        assert isinstance(dim, int)
        rank = len(ins[0])
        if not 0 <= dim < max(rank, 1):
            raise SignatureError(f"dim {dim} is not in 0..{rank - 1}")
        return aligned(ins, outs, {dim}, linear)

    return signature


_DIM = {"dim": AttrSpec("int", doc="a tensor dim, >= 0")}
define(name="cumsum", family="reduction", doc="running sum along a dim, which must be whole",
       signature=along(((0,),)), linear=((0,),), attrs=_DIM, types=lambda ins, attrs: [ins[0]],
       ref=lambda c, x: x.cumsum(c.attrs["dim"], dtype=c.dtype()))  # fmt: skip
define(name="sort", family="reduction", doc="sorted values along a dim, and their old indices",
       signature=along(), attrs={**_DIM, "descending": AttrSpec("bool", False, doc="largest first")},
       types=lambda ins, attrs: [ins[0], TensorType("i64", ins[0].shape)],
       ref=lambda c, x: tuple(
           x.sort(dim=c.attrs["dim"], descending=c.attrs["descending"], stable=True)))  # fmt: skip


def _topk_types(ins: Sequence[TensorType], attrs: Mapping[str, Attr]) -> list[TensorType]:
    shape, dim, k = list(ins[0].shape), attrs["dim"], attrs["k"]
    assert isinstance(dim, int) and isinstance(k, int)
    if not 0 <= k <= shape[dim]:
        raise SignatureError(f"there are no {k} largest of {shape[dim]} values")
    shape[dim] = k
    return [TensorType(ins[0].dtype, tuple(shape)), TensorType("i64", tuple(shape))]


define(name="topk", family="reduction", doc="the k largest values along a dim, and their indices",
       signature=along(), attrs={**_DIM, "k": AttrSpec("int", doc="how many")}, types=_topk_types,
       ref=lambda c, x: tuple(x.topk(c.attrs["k"], dim=c.attrs["dim"])))  # fmt: skip
