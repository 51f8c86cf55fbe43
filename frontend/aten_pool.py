"""ATen entries: pooling, from strided slices and means, so that batch and channels may be split."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..ir.module import Value
from .aten import Lowering, Unsupported, aten
from .aten_contract import sizes_of
from .aten_reduce import mean_of


def _max_along(c: Lowering, x: Value, dim: int, size: int, stride: int, count: int,
               dilation: int) -> Value:  # fmt: skip
    """Maximum of windows along one dim; the first of equal elements wins, NaN wins over all."""
    best: Value | None = None
    for tap in range(size):
        start = tap * dilation
        part = c.slice(x, dim, start, start + (count - 1) * stride + 1, stride)
        if best is None:
            best = part
            continue
        keeps = c.emit("logical_or", [c.emit("ge", [best, part]), c.emit("ne", [best, best])])
        best = c.emit("where", [keeps, best, part])
    assert best is not None
    return best


def _max_pool(
    c: Lowering, x: Value, kernel: Any, stride: Any, padding: Any, dilation: Any, rank: int
) -> Value:
    """Max pooling, one dim after the other, last dim first (so ties go to the first element)."""
    kernel, padding = sizes_of(kernel, rank), sizes_of(padding, rank)
    stride = sizes_of(stride, rank) if stride not in (None, [], ()) else kernel
    dilation, out = sizes_of(dilation, rank), c.out.shape[-rank:]
    lead = len(x.type.shape) - rank
    need = [(n - 1) * s + (k - 1) * d + 1
            for n, s, k, d in zip(out, stride, kernel, dilation, strict=True)]  # fmt: skip
    low = [0] * lead + list(padding)
    high = [0] * lead + [n - size - p for n, size, p in
                         zip(need, x.type.shape[lead:], padding, strict=True)]  # fmt: skip
    high = [max(h, 0) for h in high]
    if any(low) or any(high):
        x = c.emit("pad", [x], {"low": tuple(low), "high": tuple(high), "value": float("-inf")})
    for i in reversed(range(rank)):
        x = _max_along(c, x, lead + i, kernel[i], stride[i], out[i], dilation[i])
    return x


@aten("max_pool2d.default")
def max_pool2d(
    c: Lowering, x: Value, kernel_size: Any, stride: Any = (), padding: Any = 0,
    dilation: Any = 1, ceil_mode: bool = False,
) -> Value:  # fmt: skip
    return _max_pool(c, x, kernel_size, stride, padding, dilation, 2)


@aten("max_pool1d.default")
def max_pool1d(
    c: Lowering, x: Value, kernel_size: Any, stride: Any = (), padding: Any = 0,
    dilation: Any = 1, ceil_mode: bool = False,
) -> Value:  # fmt: skip
    return _max_pool(c, x, kernel_size, stride, padding, dilation, 1)


@aten("max_pool2d_with_indices.default")
def max_pool2d_with_indices(
    c: Lowering, x: Value, kernel_size: Any, stride: Any = (), padding: Any = 0,
    dilation: Any = 1, ceil_mode: bool = False,
) -> tuple[Any, ...]:  # fmt: skip
    if 1 in c.users:
        raise Unsupported("the indices of max pooling")
    return _max_pool(c, x, kernel_size, stride, padding, dilation, 2), None


def _mean_of_tiles(c: Lowering, x: Value, out: Sequence[int]) -> Value:
    """The mean over equal tiles of the trailing dims."""
    rank = len(out)
    lead, sizes = x.type.shape[:-rank], x.type.shape[-rank:]
    if all(n == 1 for n in out):
        dims = range(len(lead), len(lead) + rank)
        return mean_of(c, x, dims, True)
    shape, dims_list = list(lead), []
    for size, n in zip(sizes, out, strict=True):
        dims_list.append(len(shape) + 1)
        shape += [n, size // n]
    return mean_of(c, c.reshape(x, shape), dims_list, False)


@aten("adaptive_avg_pool2d.default", "_adaptive_avg_pool2d.default", "adaptive_avg_pool1d.default")
def adaptive_avg_pool(c: Lowering, x: Value, output_size: Sequence[int]) -> Value:
    out = c.out.shape[-len(output_size) :]
    if any(size % n for size, n in zip(x.type.shape[-len(out) :], out, strict=True)):
        raise Unsupported("adaptive pooling with windows of different sizes")
    return _mean_of_tiles(c, x, out)


@aten("avg_pool2d.default")
def avg_pool2d(
    c: Lowering, x: Value, kernel_size: Any, stride: Any = (), padding: Any = 0,
    ceil_mode: bool = False, count_include_pad: bool = True, divisor_override: Any = None,
) -> Value:  # fmt: skip
    kernel = sizes_of(kernel_size, 2)
    stride = kernel if stride in ((), [], None) else sizes_of(stride, 2)
    sizes = x.type.shape[-2:]
    exact = all(size % k == 0 for size, k in zip(sizes, kernel, strict=True))
    if kernel != stride or any(sizes_of(padding, 2)) or divisor_override or not exact:
        raise Unsupported("average pooling with overlapping or padded windows")
    return _mean_of_tiles(c, x, [size // k for size, k in zip(sizes, kernel, strict=True)])
