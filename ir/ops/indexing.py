"""Indexing: embedding tables, gather, scatter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from ..module import Attr
from ..opdef import AttrSpec, define
from ..signature import Shape, Signature, instantiate
from ..types import TensorType


def _first(s: Signature) -> float:
    """One addition for each element of the first operand."""
    return float(prod(s.size(name) for factors in s.operands[0] for name in factors))


def _rows_here(c: Any, ids: Any, count: int) -> tuple[Any, Any]:
    """(row of each id in this rank's part of the table, does this rank have it)."""
    local = ids - c.offset("v")
    here = (local >= 0) & (local < count)
    return local.clamp(0, max(count - 1, 0)), here


def _embedding(c: Any, ids: Any, table: Any) -> Any:
    if table.shape[0] == c.size("v"):
        return c.torch.nn.functional.embedding(ids, table)
    rows, here = _rows_here(c, ids, table.shape[0])
    return c.torch.where(here.unsqueeze(-1), table[rows], table.new_zeros(()))


def _embedding_backward(c: Any, dy: Any, ids: Any) -> Any:
    count = c.shape()[0]
    rows, here = _rows_here(c, ids, count)
    grad = dy.new_zeros(c.shape())
    source = c.torch.where(here.unsqueeze(-1), dy, dy.new_zeros(()))
    skip = c.attrs["padding_idx"]
    if skip >= 0:
        source = c.torch.where((ids == skip).unsqueeze(-1), dy.new_zeros(()), source)
    return grad.index_add_(0, rows.reshape(-1), source.reshape(-1, dy.shape[-1]))


define(name="embedding", family="indexing", dtypes="iT", flops_per_point=0,
       doc="rows of a table: (ids, table) -> rows; a row held by another rank gives 0. Row "
           "`padding_idx` (or -1) gets no gradient",
       signature="a..., v d -> a... d ; v=sum", linear=((1,),),
       attrs={"padding_idx": AttrSpec("int", -1, doc="a row without gradient, or -1")},
       types=lambda ins, attrs: [TensorType(ins[1].dtype, (*ins[0].shape, ins[1].shape[1]))],
       ref=_embedding)  # fmt: skip
define(name="embedding_backward", family="indexing", dtypes="Ti", flops=_first,
       doc="gradient of embedding for its table: (dy, ids) -> dtable; `padding_idx` (or -1) gets 0",
       signature="a... d, a... -> v d ; a=sum", linear=((0,),),
       attrs={"padding_idx": AttrSpec("int", -1, doc="a row without gradient, or -1")},
       ref=_embedding_backward)  # fmt: skip


def _along(line: str, linear: tuple[tuple[int, ...], ...]):  # type: ignore[no-untyped-def]
    """Dim `dim` of each tensor is whole (lengths may differ), the others are shared."""

    def signature(
        ins: Sequence[Shape], outs: Sequence[Shape], attrs: Mapping[str, Attr]
    ) -> Signature:
        dim = int(attrs["dim"])  # type: ignore[arg-type]
        before = " ".join(f"b{i}" for i in range(dim))
        after = " ".join(f"c{i}" for i in range(len(outs[0]) - dim - 1))
        return instantiate(line.replace("PRE", before).replace("POST", after), ins, outs, linear)

    return signature


_DIM = {"dim": AttrSpec("int", doc="a tensor dim, >= 0")}
define(name="gather", family="indexing", dtypes="Ti", flops_per_point=0,
       doc="y[i, j] = x[i, index[i, j]] for dim 1, and alike for others: (x, index) -> y",
       signature=_along("PRE n! POST, PRE m! POST -> PRE m! POST", ((0,),)), linear=((0,),), attrs=_DIM,
       types=lambda ins, attrs: [TensorType(ins[0].dtype, ins[1].shape)],
       ref=lambda c, x, index: x.gather(c.attrs["dim"], index))  # fmt: skip
define(name="scatter", family="indexing", dtypes="TiT", flops_per_point=0,
       doc="a copy of x with y[i, index[i, j]] = src[i, j]: (x, index, src) -> y",
       signature=_along("PRE n! POST, PRE m! POST, PRE m! POST -> PRE n! POST", ((0, 2),)), linear=((0, 2),),
       attrs=_DIM, types=lambda ins, attrs: [ins[0]],
       ref=lambda c, x, index, src: x.scatter(c.attrs["dim"], index, src))  # fmt: skip
define(name="scatter_add", family="indexing", dtypes="TiT", flops=_first,
       doc="x with src[i, j] added to y[i, index[i, j]]: (x, index, src) -> y",
       signature=_along("PRE n! POST, PRE m! POST, PRE m! POST -> PRE n! POST", ((0, 2),)), linear=((0, 2),),
       attrs=_DIM, types=lambda ins, attrs: [ins[0]],
       ref=lambda c, x, index, src: x.scatter_add(c.attrs["dim"], index, src))  # fmt: skip
define(name="take", family="indexing", dtypes="Ti", flops_per_point=0,
       doc="select along a dim by a vector of indices: (x, index) -> y",
       signature=_along("PRE n! POST, m -> PRE m POST", ((0,),)), linear=((0,),), attrs=_DIM,
       types=lambda ins, attrs: [TensorType(ins[0].dtype, (
           *ins[0].shape[:attrs["dim"]], *ins[1].shape, *ins[0].shape[attrs["dim"] + 1:]))],
       ref=lambda c, x, index: x.index_select(c.attrs["dim"], index))  # fmt: skip


def _take_backward(c: Any, dy: Any, index: Any) -> Any:
    return dy.new_zeros(c.shape()).index_add_(c.attrs["dim"], index, dy)


define(name="take_backward", family="indexing", dtypes="Ti", flops=_first,
       doc="gradient of take for its tensor: (dy, index) -> dx",
       signature=_along("PRE m POST, m -> PRE n! POST ; m=sum", ((0,),)), linear=((0,),), attrs=_DIM,
       ref=_take_backward)  # fmt: skip
