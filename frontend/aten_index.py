"""ATen entries: indexing."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from ..ir.module import Value
from .aten import Lowering, Number, Unsupported, aten


@aten("embedding.default")
def embedding(
    c: Lowering, weight: Value, indices: Value, padding_idx: int = -1,
    scale_grad_by_freq: bool = False, sparse: bool = False,
) -> Value:  # fmt: skip
    if scale_grad_by_freq:
        raise Unsupported("embedding with scale_grad_by_freq")
    return c.emit("embedding", [indices, weight], {"padding_idx": padding_idx})


@aten("gather.default")
def gather(c: Lowering, x: Value, dim: int, index: Value, sparse_grad: bool = False) -> Value:
    dim = dim % max(len(x.type.shape), 1)
    x = _crop(c, x, index.type.shape, dim)
    return c.emit("gather", [x, index], {"dim": dim})


def _crop(c: Lowering, x: Value, shape: Sequence[int], dim: int) -> Value:
    """Torch lets an index be smaller than the tensor in the other dims; the IR does not."""
    for d, size in enumerate(shape):
        if d != dim:
            x = c.slice(x, d, 0, size)
    return x


def _scatter(c: Lowering, name: str, x: Value, dim: int, index: Value, source: Value) -> Value:
    dim = dim % max(len(x.type.shape), 1)
    shape = index.type.shape
    source = _crop(c, source, (*shape[:dim], shape[dim], *shape[dim + 1 :]), dim)
    source = c.slice(source, dim, 0, shape[dim])
    if any(a != b for d, (a, b) in enumerate(zip(shape, x.type.shape)) if d != dim):
        raise Unsupported("scatter with an index smaller than the tensor")
    return c.emit(name, [x, index, source], {"dim": dim})


@aten("scatter.src")
def scatter(c: Lowering, x: Value, dim: int, index: Value, source: Value) -> Value:
    return _scatter(c, "scatter", x, dim, index, source)


@aten("scatter.value")
def scatter_value(c: Lowering, x: Value, dim: int, index: Value, value: Number) -> Value:
    return _scatter(c, "scatter", x, dim, index, c.constant(value, x.type.dtype, index.type.shape))


@aten("scatter_add.default")
def scatter_add(c: Lowering, x: Value, dim: int, index: Value, source: Value) -> Value:
    return _scatter(c, "scatter_add", x, dim, index, source)


@aten("index_select.default")
def index_select(c: Lowering, x: Value, dim: int, index: Value) -> Value:
    return c.emit("take", [x, c.cast(index, "i64")], {"dim": dim % len(x.type.shape)})


def _wrapped(c: Lowering, index: Value, size: int) -> Value:
    """An index with negative positions counted from the end."""
    index = c.cast(index, "i64")
    source = c.definition(index)
    while source is not None and source.name in ("reshape", "expand", "permute", "slice"):
        source = c.definition(source.operands[0])
    if source is not None and source.name == "iota":
        start, step = source.attrs.get("start", 0), source.attrs.get("step", 1)
        if start >= 0 and step >= 0:  # type: ignore[operator]
            return index
    return c.apply("remainder", index, size)


def _linear_index(
    c: Lowering, shape: Sequence[int], indices: Sequence[Value | None]
) -> tuple[list[int], Value]:
    """The indexed dims, and one index into their flattened product."""
    dims = [d for d, index in enumerate(indices) if index is not None]
    if any(i is not None and i.type.dtype in ("bool", "u8") for i in indices):
        raise Unsupported("a boolean mask as an index")
    flat: Value | None = None
    for d in dims:
        index = indices[d]
        assert index is not None
        part = _wrapped(c, index, shape[d])
        flat = part if flat is None else c.emit(
            "add", [c.apply("mul", flat, shape[d]), part])  # fmt: skip
    assert flat is not None
    return dims, flat


@aten("index.Tensor", "_unsafe_index.Tensor")
def index(c: Lowering, x: Value, indices: Sequence[Value | None]) -> Value:
    shape = x.type.shape
    dims, flat = _linear_index(c, shape, indices)
    rest = [d for d in range(len(shape)) if d not in dims]
    first = dims[0] if dims == list(range(dims[0], dims[-1] + 1)) else 0
    before, after = rest[:first], rest[first:]
    x = c.permute(x, [*before, *dims, *after])
    sizes = [shape[d] for d in before], prod(shape[d] for d in dims), [shape[d] for d in after]
    x = c.reshape(x, [*sizes[0], sizes[1], *sizes[2]])
    vector = c.reshape(flat, [flat.type.numel])
    picked = c.emit("take", [x, vector], {"dim": len(before)})
    return c.reshape(picked, [*sizes[0], *flat.type.shape, *sizes[2]])


@aten("index_put.default", "_unsafe_index_put.default")
def index_put(
    c: Lowering, x: Value, indices: Sequence[Value | None], values: Value,
    accumulate: bool = False,
) -> Value:  # fmt: skip
    shape = x.type.shape
    if len(indices) == 1 and indices[0] is not None and indices[0].type.dtype == "bool":
        if values.type.numel != 1:
            raise Unsupported("index_put of many values through a mask")
        mask = indices[0]
        mask = c.reshape(mask, mask.type.shape + (1,) * (len(shape) - len(mask.type.shape)))
        value = c.reshape(c.cast(values, x.type.dtype), ())
        return c.emit("where", [mask, c.emit("add", [x, value]) if accumulate else value, x])
    dims, flat = _linear_index(c, shape, indices)
    if dims != list(range(len(dims))):
        raise Unsupported("index_put into inner dims")
    tail = shape[len(dims) :]
    rows, columns = prod(shape[: len(dims)]), prod(tail)
    count = flat.type.numel
    values = c.expand(c.cast(values, x.type.dtype), (*flat.type.shape, *tail))
    where = c.expand(c.reshape(flat, [count, 1]), [count, columns])
    out = c.emit(
        "scatter_add" if accumulate else "scatter",
        [c.reshape(x, [rows, columns]), where, c.reshape(values, [count, columns])], {"dim": 0},
    )  # fmt: skip
    return c.reshape(out, shape)
