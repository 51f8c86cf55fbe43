"""ATen entries: movement, creation, reductions, indexing, random numbers."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from ..ir.module import Value
from ..ir.types import FLOATS, TensorType
from .aten import Lowering, Number, Operand, Unsupported, aten, dims_of

# -- movement -------------------------------------------------------------------------------------


@aten("view.default", "_unsafe_view.default", "reshape.default", "unsqueeze.default",
      "squeeze.default", "squeeze.dim", "squeeze.dims", "flatten.using_ints", "view_copy.default",
      "unflatten.int")  # fmt: skip
def reshape(c: Lowering, x: Value, *_: Any, **__: Any) -> Value:
    return c.reshape(x, c.out.shape)


@aten("permute.default")
def permute(c: Lowering, x: Value, dims: Sequence[int]) -> Value:
    return c.permute(x, [dim % len(dims) for dim in dims])


@aten("transpose.int")
def transpose(c: Lowering, x: Value, dim0: int, dim1: int) -> Value:
    rank = len(x.type.shape)
    order = list(range(rank))
    if rank:
        order[dim0], order[dim1] = order[dim1], order[dim0]
    return c.permute(x, order)


@aten("t.default", "numpy_T.default")
def t(c: Lowering, x: Value) -> Value:
    return c.permute(x, list(range(len(x.type.shape)))[::-1])


@aten("expand.default")
def expand(c: Lowering, x: Value, size: Sequence[int], implicit: bool = False) -> Value:
    return c.expand(x, c.out.shape)


@aten("slice.Tensor")
def slice_(
    c: Lowering, x: Value, dim: int = 0, start: int | None = None, end: int | None = None,
    step: int = 1,
) -> Value:  # fmt: skip
    dim = dim % len(x.type.shape)
    begin, stop, step = slice(start, end, step).indices(x.type.shape[dim])
    return c.slice(x, dim, begin, max(stop, begin), step)


@aten("select.int")
def select(c: Lowering, x: Value, dim: int, index: int) -> Value:
    dim = dim % len(x.type.shape)
    index = index % x.type.shape[dim]
    return c.reshape(c.slice(x, dim, index, index + 1), c.out.shape)


def _pieces(c: Lowering, x: Value, dim: int) -> tuple[Value, ...]:
    """Consecutive parts of a dim, sized as torch says."""
    out, start = [], 0
    for type in c.outs:
        out.append(c.slice(x, dim, start, start + type.shape[dim]))
        start += type.shape[dim]
    return tuple(out)


@aten("split.Tensor", "split.sizes", "split_with_sizes.default", "chunk.default")
def split(c: Lowering, x: Value, sizes: Any, dim: int = 0) -> tuple[Value, ...]:
    return _pieces(c, x, dim % len(x.type.shape))


@aten("unbind.int")
def unbind(c: Lowering, x: Value, dim: int = 0) -> tuple[Value, ...]:
    dim = dim % len(x.type.shape)
    parts = [c.slice(x, dim, i, i + 1) for i in range(x.type.shape[dim])]
    return tuple(c.reshape(part, c.out.shape) for part in parts)


@aten("cat.default")
def cat(c: Lowering, tensors: Sequence[Value], dim: int = 0) -> Value:
    rank = len(c.out.shape)
    # torch lets empty one-dimensional tensors stand for nothing
    parts = [c.cast(x, c.out.dtype) for x in tensors if len(x.type.shape) == rank]
    return parts[0] if len(parts) == 1 else c.emit("concat", parts, {"dim": dim % rank})


@aten("stack.default")
def stack(c: Lowering, tensors: Sequence[Value], dim: int = 0) -> Value:
    dim = dim % len(c.out.shape)
    shape = (*c.out.shape[:dim], 1, *c.out.shape[dim + 1 :])
    return cat(c, [c.reshape(x, shape) for x in tensors], dim)  # type: ignore[no-any-return]


@aten("flip.default")
def flip(c: Lowering, x: Value, dims: Sequence[int]) -> Value:
    for dim in dims_of(dims, len(x.type.shape)):
        x = c.emit("flip", [x], {"dim": dim})
    return x


@aten("roll.default")
def roll(c: Lowering, x: Value, shifts: Sequence[int], dims: Sequence[int] = ()) -> Value:
    shape = x.type.shape
    if not dims:
        x = c.reshape(x, [prod(shape)])
    for shift, dim in zip(shifts, dims_of(dims, len(shape)) if dims else (0,), strict=False):
        size = x.type.shape[dim]
        cut = -shift % size if size else 0
        if cut:
            parts = [c.slice(x, dim, cut, size), c.slice(x, dim, 0, cut)]
            x = c.emit("concat", parts, {"dim": dim})
    return c.reshape(x, shape)


@aten("constant_pad_nd.default")
def constant_pad(c: Lowering, x: Value, pad: Sequence[int], value: Number = 0) -> Value:
    rank = len(x.type.shape)
    low, high = [0] * rank, [0] * rank
    for i in range(len(pad) // 2):
        low[rank - 1 - i], high[rank - 1 - i] = pad[2 * i], pad[2 * i + 1]
    if not any(low) and not any(high):
        return x
    return c.emit("pad", [x], {"low": tuple(low), "high": tuple(high), "value": float(value)})


@aten("pad.default")
def pad(
    c: Lowering, x: Value, pad: Sequence[int], mode: str = "constant", value: Number | None = None
) -> Value:
    if mode != "constant":
        raise Unsupported(f"padding mode {mode}")
    return constant_pad(c, x, pad, value or 0)  # type: ignore[no-any-return]


@aten("repeat.default")
def repeat(c: Lowering, x: Value, repeats: Sequence[int]) -> Value:
    shape = (1,) * (len(repeats) - len(x.type.shape)) + x.type.shape
    spread = [n for pair in zip(repeats, shape, strict=True) for n in pair]
    single = [n for size in shape for n in (1, size)]
    return c.reshape(c.expand(c.reshape(x, single), spread), c.out.shape)


@aten("copy.default")
def copy(c: Lowering, x: Value, source: Value, non_blocking: bool = False) -> Value:
    return c.expand(c.cast(source, c.out.dtype), c.out.shape)


@aten("slice_scatter.default")
def slice_scatter(
    c: Lowering, x: Value, source: Value, dim: int = 0, start: int | None = None,
    end: int | None = None, step: int = 1,
) -> Value:  # fmt: skip
    dim, size = dim % len(x.type.shape), x.type.shape[dim]
    begin, stop, step = slice(start, end, step).indices(size)
    if step != 1:
        raise Unsupported("slice_scatter with a step")
    stop = max(begin, stop)
    parts = [c.slice(x, dim, 0, begin), source, c.slice(x, dim, stop, size)]
    parts = [part for part in parts if part.type.shape[dim]]
    return parts[0] if len(parts) == 1 else c.emit("concat", parts, {"dim": dim})


@aten("select_scatter.default")
def select_scatter(c: Lowering, x: Value, source: Value, dim: int, index: int) -> Value:
    dim = dim % len(x.type.shape)
    index = index % x.type.shape[dim]
    shape = (*x.type.shape[:dim], 1, *x.type.shape[dim + 1 :])
    return slice_scatter(c, x, c.reshape(source, shape), dim, index, index + 1)  # type: ignore[no-any-return]


# -- creation -------------------------------------------------------------------------------------


def _iota(c: Lowering, type: TensorType, dim: int, start: Number, step: Number) -> Value:
    return c.emit("iota", [], {"dim": dim, "start": start, "step": step}, type)


@aten("arange.start_step", "arange.start")
def arange(c: Lowering, start: Number, end: Number, step: Number = 1, **_: Any) -> Value:
    return _iota(c, c.out, 0, start, step)


@aten("arange.default")
def arange_end(c: Lowering, end: Number, **_: Any) -> Value:
    return _iota(c, c.out, 0, 0, 1)


@aten("full.default", "full_like.default", "new_full.default")
def full(c: Lowering, like: Any, value: Any, *rest: Any, **_: Any) -> Value:
    value = rest[0] if rest else value  # new_full(x, size, value)
    if isinstance(value, Value):
        return c.expand(c.cast(value, c.out.dtype), c.out.shape)
    return c.constant(value, c.out.dtype, c.out.shape)


@aten("zeros.default", "zeros_like.default", "new_zeros.default", "empty.memory_format",
      "empty_like.default", "new_empty.default", "empty_strided.default",
      "new_empty_strided.default", "empty_permuted.default")  # fmt: skip
def zeros(c: Lowering, *_: Any, **__: Any) -> Value:
    return c.constant(0, c.out.dtype, c.out.shape)


@aten("ones.default", "ones_like.default", "new_ones.default")
def ones(c: Lowering, *_: Any, **__: Any) -> Value:
    return c.constant(1, c.out.dtype, c.out.shape)


@aten("scalar_tensor.default")
def scalar_tensor(c: Lowering, value: Number, **_: Any) -> Value:
    return c.constant(value, c.out.dtype)


@aten("fill.Scalar", "fill.Tensor")
def fill(c: Lowering, x: Value, value: Operand) -> Value:
    return full(c, x, value)  # type: ignore[no-any-return]


def _triangle(c: Lowering, x: Value, keep: str, diagonal: int) -> Value:
    shape = x.type.shape
    rows = _iota(c, TensorType("i64", (shape[-2], 1)), 0, diagonal, 1)
    columns = _iota(c, TensorType("i64", (1, shape[-1])), 1, 0, 1)
    return c.emit("where", [c.emit(keep, [columns, rows]), x, c.constant(0, x.type.dtype)])


@aten("tril.default")
def tril(c: Lowering, x: Value, diagonal: int = 0) -> Value:
    return _triangle(c, x, "le", diagonal)


@aten("triu.default")
def triu(c: Lowering, x: Value, diagonal: int = 0) -> Value:
    return _triangle(c, x, "ge", diagonal)


@aten("eye.default", "eye.m")
def eye(c: Lowering, *_: Any, **__: Any) -> Value:
    rows, columns = c.out.shape
    left = _iota(c, TensorType("i64", (rows, 1)), 0, 0, 1)
    right = _iota(c, TensorType("i64", (1, columns)), 1, 0, 1)
    return c.cast(c.emit("eq", [left, right]), c.out.dtype)


# -- reductions -----------------------------------------------------------------------------------


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
    return c.reshape(c.emit("argmax", [x], {"dims": dims, "keepdim": keepdim}), c.out.shape)


@aten("max.dim")
def max_dim(c: Lowering, x: Value, dim: int, keepdim: bool = False) -> tuple[Value, Value]:
    # through the index, so that the gradient goes to one element, as torch's does
    dim = dim % len(x.type.shape)
    index = c.emit("argmax", [x], {"dims": (dim,), "keepdim": True})
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


# -- indexing -------------------------------------------------------------------------------------


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


# -- random numbers -------------------------------------------------------------------------------


@aten("native_dropout.default")
def native_dropout(c: Lowering, x: Value, p: float, train: bool | None) -> tuple[Any, Any]:
    if not train or p == 0:
        return x, c.constant(True, "bool", x.type.shape)
    if 1 not in c.users:
        return c.emit("dropout", [x, c.seed()], {"p": p}), None
    kept = c.emit("dropout", [c.constant(1, "f32", x.type.shape), c.seed()], {"p": p})
    return c.emit("mul", [x, c.cast(kept, x.type.dtype)]), c.apply("ne", kept, 0)


@aten("dropout.default")
def dropout(c: Lowering, x: Value, p: float, train: bool) -> Value:
    return c.emit("dropout", [x, c.seed()], {"p": p}) if train and p else x


def _uniform(c: Lowering, dtype: str, shape: Sequence[int]) -> Value:
    return c.emit("uniform", [c.seed()], type=TensorType(dtype, tuple(shape)))


@aten("rand.default", "rand_like.default")
def rand(c: Lowering, *_: Any, **__: Any) -> Value:
    return _uniform(c, c.out.dtype, c.out.shape)


@aten("randn.default", "randn_like.default")
def randn(c: Lowering, *_: Any, **__: Any) -> Value:
    return c.emit("normal", [c.seed()], type=c.out)


@aten("uniform.default")
def uniform(c: Lowering, x: Value, low: float = 0.0, high: float = 1.0, **_: Any) -> Value:
    sample = _uniform(c, c.out.dtype, c.out.shape)
    return c.apply("add", c.apply("mul", sample, high - low), low)


@aten("normal_functional.default")
def normal(c: Lowering, x: Value, mean: float = 0.0, std: float = 1.0, **_: Any) -> Value:
    sample = c.emit("normal", [c.seed()], type=c.out)
    return c.apply("add", c.apply("mul", sample, std), mean)


@aten("bernoulli.p")
def bernoulli_p(c: Lowering, x: Value, p: float = 0.5, **_: Any) -> Value:
    return c.cast(c.apply("lt", _uniform(c, "f32", c.out.shape), p), c.out.dtype)


@aten("bernoulli.default")
def bernoulli(c: Lowering, p: Value, **_: Any) -> Value:
    sample = _uniform(c, p.type.dtype if p.type.dtype in FLOATS else "f32", p.type.shape)
    return c.cast(c.emit("lt", [sample, p]), c.out.dtype)


@aten("randint.low", "randint.default")
def randint(c: Lowering, *args: Any, **_: Any) -> Value:
    low, high = (args[0], args[1]) if not isinstance(args[1], (list, tuple)) else (0, args[0])
    sample = c.apply("mul", _uniform(c, "f64", c.out.shape), high - low)
    return c.apply("add", c.cast(c.emit("floor", [sample]), c.out.dtype), low)
