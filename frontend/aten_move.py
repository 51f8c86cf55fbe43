"""ATen entries: movement of elements."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from ..ir.module import Attr, Value
from ..ir.types import TensorType
from .aten import Lowering, Number, Unsupported, aten, dims_of


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
        return _edged(c, x, pad, mode)
    return constant_pad(c, x, pad, value or 0)  # type: ignore[no-any-return]


def _edged(c: Lowering, x: Value, pad: Sequence[int], mode: str) -> Value:
    """Padding with elements of the tensor itself, dim by dim from the last."""
    for number in range(len(pad) // 2):
        dim, (low, high) = len(x.type.shape) - 1 - number, pad[2 * number : 2 * number + 2]
        size = x.type.shape[dim]
        left, right = _edges(mode, size, max(low, 0), max(high, 0))
        inner = c.slice(x, dim, max(-low, 0), size - max(-high, 0))
        parts = [*_runs(c, x, dim, left), inner, *_runs(c, x, dim, right)]
        x = parts[0] if len(parts) == 1 else c.emit("concat", parts, {"dim": dim})
    return x


def _edges(mode: str, size: int, low: int, high: int) -> tuple[list[int], list[int]]:
    """The positions that stand before and behind a dim."""
    before, behind = range(-low, 0), range(size, size + high)
    if mode == "circular":
        return [i % size for i in before], [i % size for i in behind]
    if mode == "replicate":
        return [0] * low, [size - 1] * high
    if mode == "reflect":
        return [-i for i in before], [2 * (size - 1) - i for i in behind]
    raise Unsupported(f"padding mode {mode}")


def _runs(c: Lowering, x: Value, dim: int, positions: Sequence[int]) -> list[Value]:
    """The elements at positions that rise, fall or stay the same, as at most one value."""
    if not positions:
        return []
    first, last = positions[0], positions[-1]
    part = c.slice(x, dim, min(first, last), max(first, last) + 1)
    if first > last:
        part = c.emit("flip", [part], {"dim": dim})
    shape = x.type.shape
    return [c.expand(part, (*shape[:dim], len(positions), *shape[dim + 1 :]))]


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
        where: dict[str, Attr] = {"dim": 0, "start": begin, "step": step}
        count = source.type.shape[dim]
        index = c.emit("iota", [], where, TensorType("i64", (count,)))
        wide = [count if d == dim else 1 for d in range(len(x.type.shape))]
        index = c.expand(c.reshape(index, wide), source.type.shape)
        return c.emit("scatter", [x, index, source], {"dim": dim})
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
