"""ATen entries: grouped matrix products, and the counts that say where their groups end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..ir.module import Op, Value
from ..ir.opdef import full_attrs
from ..ir.types import TensorType
from .aten import TABLE, Lowering, Number, Unsupported, aten
from .aten_contract import bmm


def _line(c: Lowering, count: int, dim: int) -> Value:
    """0, 1, ... along one of two dims."""
    shape = (count, 1) if dim == 0 else (1, count)
    return c.emit("iota", [], {"dim": dim}, TensorType("i64", shape))


@aten("histc.default")
def histc(c: Lowering, x: Value, bins: int = 100, min: Number = 0, max: Number = 0) -> Value:
    if min == max:
        raise Unsupported("a histogram over the range of its data")
    count = x.type.numel
    source = c.definition(x)
    if source is not None and source.name == "cast" and not _is_float(source.operands[0]) \
            and min == 0 and max == bins - 1:  # fmt: skip
        number, inside = source.operands[0], None  # integers, each a bin of its own
    else:
        wide = c.apply("div", c.apply("mul", c.apply("sub", x, min), bins), max - min)
        number = c.cast(c.emit("floor", [wide]), "i64")
        number = c.emit("where", [c.apply("eq", x, max), c.constant(bins - 1, "i64"), number])
        inside = c.emit("logical_and", [c.apply("ge", x, min), c.apply("le", x, max)])
        inside = c.reshape(inside, (count, 1))
    falls = c.emit("eq", [c.reshape(c.cast(number, "i64"), (count, 1)), _line(c, bins, 1)])
    if inside is not None:
        falls = c.emit("logical_and", [falls, inside])
    return c.reduce(c.cast(falls, c.out.dtype), [0])


def _is_float(x: Value) -> bool:
    return x.type.dtype[0] in "fb" and x.type.dtype != "bool"


@aten("_grouped_mm.default")
def grouped_mm(
    c: Lowering, x: Value, weight: Value, offs: Value | None = None, bias: Value | None = None,
    out_dtype: Any = None,
) -> Value:  # fmt: skip
    ranks = len(x.type.shape), len(weight.type.shape)
    if ranks == (3, 3) and bias is None:
        return c.cast(bmm(c, x, weight), c.out.dtype)
    if ranks != (2, 3) or offs is None or bias is not None:
        raise Unsupported("a grouped product that is not of rows by matrices")
    y = c.emit("grouped_product", [x, weight, _group_of_rows(c, offs, x.type.shape[0])])
    return c.cast(y, c.out.dtype)


def _rows_by_groups(x: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[-1]))


#: `_grouped_mm` of rows, in any dtype, while a program is traced
grouped_op = torch.library.custom_op("weft::grouped_mm", _rows_by_groups, mutates_args=())
grouped_op.register_fake(_rows_by_groups)
# the first and an operator of transformers have the meaning of `_grouped_mm`, in any dtype
TABLE["weft.grouped_mm.default"] = grouped_mm
TABLE["transformers.grouped_mm_fallback.default"] = grouped_mm


class AnyDtype(TorchFunctionMode):
    """Lets grouped products be traced in the dtypes that their CPU kernel takes: without data,
    torch takes bfloat16 only. Active while the user's program runs for tracing."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Call `func`, or the operator that stands for it."""
        kwargs = kwargs or {}
        if func is torch._grouped_mm:
            x, weight, *rest = args
            given = {**dict(zip(("offs", "bias", "out_dtype"), rest, strict=False)), **kwargs}
            offs, ranks = given.pop("offs", None), (x.dim(), weight.dim())
            plain = offs is not None and all(value is None for value in given.values())
            if plain and ranks == (2, 3) and x.dtype != torch.bfloat16:
                return torch.ops.weft.grouped_mm(x, weight, offs)
        return func(*args, **kwargs)


def _group_of_rows(c: Lowering, ends: Value, rows: int) -> Value:
    """The group of each row, from where the groups end: the number of groups before it."""
    known = _counted(c, ends)
    if known is not None and known.type.shape == (rows,):
        return known
    count = ends.type.shape[0]
    over = c.emit("le", [c.reshape(c.cast(ends, "i64"), (1, count)), _line(c, rows, 0)])
    return c.reduce(c.cast(over, "i64"), [1])


def _counted(c: Lowering, ends: Value) -> Value | None:
    """The sorted numbers of which `ends` is the running sum of counts; None if it is not seen.

    Only positions that topk or argmax found, which are not negative, so that the first row has the
    first group. Too large ones come last, and have no group.
    """
    total = _source(c, ends, "cumsum")
    column = None if total is None else _counts_of(c, total.operands[0])
    order = None if column is None else _source(c, column, "sort")
    if order is None or order.attrs.get("descending"):
        return None
    keys = order.operands[0]
    found = _source(c, keys, "topk") or _source(c, keys, "argmax")
    if found is None or found.operands[0].type.dtype == keys.type.dtype:
        return None  # they may be values, not positions
    return c.cast(order.results[0], "i64")


def _counts_of(c: Lowering, counts: Value) -> Value | None:
    """The numbers of which `counts` has how often 0, 1, ... occur: the sum of a table of equality
    with those, or ones added up in their places."""
    added = _source(c, counts, "scatter_add")
    if added is not None:
        base, index, ones = added.operands
        return index if _is_full(c, base, 0) and _is_full(c, ones, 1) else None
    table = _source(c, counts, "reduce_sum")
    falls = None if table is None else _source(c, table.operands[0], "eq")
    if falls is None or table is None or table.attrs["dims"] != (0,):
        return None
    column, line = falls.operands
    bins = c.definition(line)
    if bins is None or bins.name != "iota":
        return None
    attrs, shape = full_attrs("iota", bins.attrs), line.type.shape
    plain = (attrs["start"], attrs["step"]) == (0, 1)
    return column if plain and attrs["dim"] == len(shape) - 1 and shape[-1:] == counts.type.shape else None


def _is_full(c: Lowering, x: Value, number: int) -> bool:
    op = c.definition(x)
    return op is not None and op.name == "constant" and op.attrs["value"] == number


def _source(c: Lowering, x: Value, name: str) -> Op | None:
    """The op of this name behind casts and views of `x`."""
    op = c.definition(x)
    while op is not None and op.name in ("cast", "reshape", "permute"):
        op = c.definition(op.operands[0])
    return op if op is not None and op.name == name else None
