"""ATen entries: reductions, sorts, running sums."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from ..ir.module import Value
from .aten import Lowering, Number, Unsupported, aten, dims_of


@aten("sum.default", "sum.dim_IntList")
def sum_(
    c: Lowering, x: Value, dim: Any = None, keepdim: bool = False, dtype: Any = None
) -> Value:
    return c.reduce(c.cast(x, c.out.dtype), dims_of(dim, len(x.type.shape)), keepdim)


def mean_of(c: Lowering, x: Value, dims: Sequence[int], keepdim: bool) -> Value:
    """The mean over dims; half-precision sums are taken in float32, as torch takes them."""
    dtype = x.type.dtype
    wide = c.cast(x, "f32") if dtype in ("f16", "bf16") else x
    count = prod(x.type.shape[dim] for dim in dims)
    total = c.reduce(wide, dims, keepdim)
    return c.cast(c.apply("mul", total, 1.0 / count if count else float("nan")), dtype)


@aten("mean.default", "mean.dim")
def mean(
    c: Lowering, x: Value, dim: Any = None, keepdim: bool = False, dtype: Any = None
) -> Value:
    return mean_of(c, c.cast(x, c.out.dtype), dims_of(dim, len(x.type.shape)), keepdim)


def moments(
    c: Lowering, x: Value, dims: Sequence[int], correction: Number, keepdim: bool
) -> tuple[Value, Value]:
    """(variance, mean) over dims, from the squared distances to the mean."""
    average = mean_of(c, x, dims, True)
    centred = c.emit("sub", [x, average])
    count = prod(x.type.shape[dim] for dim in dims)
    total = c.reduce(c.emit("mul", [centred, centred]), dims, keepdim)
    freedom = max(count - correction, 0)
    variance = c.apply("mul", total, 1.0 / freedom if freedom else float("nan"))
    return variance, average if keepdim else c.reshape(average, variance.type.shape)


@aten("var.correction")
def var(
    c: Lowering, x: Value, dim: Any = None, *, correction: Number | None = None,
    keepdim: bool = False,
) -> Value:  # fmt: skip
    dims = dims_of(dim, len(x.type.shape))
    return moments(c, x, dims, 1 if correction is None else correction, keepdim)[0]


@aten("var_mean.correction")
def var_mean(
    c: Lowering, x: Value, dim: Any = None, *, correction: Number | None = None,
    keepdim: bool = False,
) -> tuple[Value, Value]:  # fmt: skip
    dims = dims_of(dim, len(x.type.shape))
    return moments(c, x, dims, 1 if correction is None else correction, keepdim)


@aten("amax.default", "max.default")
def amax(c: Lowering, x: Value, dim: Any = None, keepdim: bool = False) -> Value:
    return c.reduce(x, dims_of(dim, len(x.type.shape)), keepdim, "reduce_max")


@aten("amin.default", "min.default")
def amin(c: Lowering, x: Value, dim: Any = None, keepdim: bool = False) -> Value:
    return c.reduce(x, dims_of(dim, len(x.type.shape)), keepdim, "reduce_min")


@aten("argmax.default")
def argmax(c: Lowering, x: Value, dim: int | None = None, keepdim: bool = False) -> Value:
    if dim is None:
        x = c.reshape(x, [prod(x.type.shape)])
    dims = (0,) if dim is None else (dim % max(len(x.type.shape), 1),)
    x = c.cast(x, "i8") if x.type.dtype == "bool" else x
    return c.reshape(c.emit("argmax", [x], {"dims": dims, "keepdim": keepdim}), c.out.shape)


@aten("max.dim")
def max_dim(c: Lowering, x: Value, dim: int, keepdim: bool = False) -> tuple[Value, Value]:
    # through the index, so that the gradient goes to one element, as torch's does
    dim = dim % len(x.type.shape)
    ordered = c.cast(x, "i8") if x.type.dtype == "bool" else x
    index = c.emit("argmax", [ordered], {"dims": (dim,), "keepdim": True})
    value = c.emit("gather", [x, index], {"dim": dim})
    return c.reshape(value, c.outs[0].shape), c.reshape(index, c.outs[1].shape)


def _any(c: Lowering, x: Value, dim: Any, keepdim: bool, how: str) -> Value:
    truth = c.cast(x if x.type.dtype == "bool" else c.apply("ne", x, 0), "i32")
    return c.cast(c.reduce(truth, dims_of(dim, len(x.type.shape)), keepdim, how), "bool")


@aten("any.default", "any.dim", "any.dims")
def any_(c: Lowering, x: Value, dim: Any = None, keepdim: bool = False) -> Value:
    return _any(c, x, dim, keepdim, "reduce_max")


@aten("all.default", "all.dim", "all.dims")
def all_(c: Lowering, x: Value, dim: Any = None, keepdim: bool = False) -> Value:
    return _any(c, x, dim, keepdim, "reduce_min")


@aten("linalg_vector_norm.default")
def vector_norm(
    c: Lowering, x: Value, ord: Number = 2, dim: Any = None, keepdim: bool = False,
    dtype: Any = None,
) -> Value:  # fmt: skip
    x = c.cast(x, c.out.dtype)
    dims = dims_of(dim, len(x.type.shape))
    if ord == 2:
        return c.emit("sqrt", [c.reduce(c.emit("mul", [x, x]), dims, keepdim)])
    size = c.emit("abs", [x])
    if ord in (float("inf"), 1):
        return c.reduce(size, dims, keepdim, "reduce_sum" if ord == 1 else "reduce_max")
    raise Unsupported(f"norm of order {ord}")


@aten("prod.default", "prod.dim_int")
def prod_(
    c: Lowering, x: Value, dim: Any = None, keepdim: bool = False, dtype: Any = None
) -> Value:
    dims = dims_of(dim, len(x.type.shape))
    return c.reduce(c.cast(x, c.out.dtype), dims, keepdim, "reduce_prod")


@aten("cumsum.default")
def cumsum(c: Lowering, x: Value, dim: int, dtype: Any = None) -> Value:
    if not x.type.shape:
        return c.cast(x, c.out.dtype)
    return c.emit("cumsum", [c.cast(x, c.out.dtype)], {"dim": dim % len(x.type.shape)})


@aten("sort.default")
def sort(c: Lowering, x: Value, dim: int = -1, descending: bool = False) -> tuple[Value, ...]:
    return c.many("sort", [x], {"dim": dim % len(x.type.shape), "descending": descending})


@aten("sort.stable")
def sort_stable(
    c: Lowering, x: Value, *, stable: bool | None, dim: int = -1, descending: bool = False
) -> tuple[Value, ...]:
    return sort(c, x, dim, descending)  # type: ignore[no-any-return]


@aten("topk.default")
def topk(
    c: Lowering, x: Value, k: int, dim: int = -1, largest: bool = True, sorted: bool = True
) -> tuple[Value, ...]:
    if not largest:
        raise Unsupported("topk of the smallest")
    return c.many("topk", [x], {"dim": dim % len(x.type.shape), "k": k}, c.outs)
