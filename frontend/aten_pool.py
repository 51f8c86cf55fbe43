"""ATen entries: pooling; batch and channels may be split."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from ..ir.module import Attr, Value
from ..ir.types import TensorType
from .aten import Lowering, Unsupported, aten
from .aten_contract import sizes_of
from .aten_reduce import mean_of


def _max_pool(
    c: Lowering, x: Value, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil: bool,
    rank: int,
) -> tuple[Value, ...]:  # fmt: skip
    """Maxima and their indices; windows along one dim have a size of 1 along another."""
    kernel, padding = sizes_of(kernel, rank), sizes_of(padding, rank)
    stride = sizes_of(stride, rank) if stride not in (None, [], ()) else kernel
    rows = [[kernel, 1], [stride, 1], [padding, 0], [sizes_of(dilation, rank), 1]]
    extra = max(2 - rank, 0)  # one spatial dim becomes two
    names = ("kernel", "stride", "padding", "dilation")
    attrs: dict[str, Attr] = {
        name: (*[one] * extra, *sizes) for name, (sizes, one) in zip(names, rows, strict=True)
    }
    lead, spatial = x.type.shape[:-rank], x.type.shape[-rank:]
    planes = c.reshape(x, (*lead, *[1] * extra, *spatial))
    results = c.many("max_pool", [planes], {**attrs, "ceil": ceil})
    return tuple(c.reshape(value, c.out.shape) for value in results)


def _define(rank: int) -> None:
    def max_pool_with_indices(
        c: Lowering, x: Value, kernel_size: Any, stride: Any = (), padding: Any = 0,
        dilation: Any = 1, ceil_mode: bool = False,
    ) -> tuple[Value, ...]:  # fmt: skip
        return _max_pool(c, x, kernel_size, stride, padding, dilation, ceil_mode, rank)

    def max_pool(
        c: Lowering, x: Value, kernel_size: Any, stride: Any = (), padding: Any = 0,
        dilation: Any = 1, ceil_mode: bool = False,
    ) -> Value:  # fmt: skip
        return _max_pool(c, x, kernel_size, stride, padding, dilation, ceil_mode, rank)[0]

    aten(f"max_pool{rank}d.default")(max_pool)
    if rank > 1:
        aten(f"max_pool{rank}d_with_indices.default")(max_pool_with_indices)


for _rank in (1, 2, 3):
    _define(_rank)


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


def _average(
    c: Lowering, x: Value, kernel_size: Any, stride: Any, padding: Any, ceil: bool, pads: bool,
    divisor: Any, rank: int,
) -> Value:  # fmt: skip
    kernel, padding = sizes_of(kernel_size, rank), sizes_of(padding, rank)
    stride = kernel if stride in ((), [], None) else sizes_of(stride, rank)
    lead, sizes = x.type.shape[:-rank], x.type.shape[-rank:]
    exact = all(size % k == 0 for size, k in zip(sizes, kernel, strict=True))
    if kernel == stride and exact and not any(padding) and not divisor:
        return _mean_of_tiles(c, x, [size // k for size, k in zip(sizes, kernel, strict=True)])
    out = c.out.shape[-rank:]
    if ceil and out != tuple(
        (n + 2 * p - k) // s + 1 for n, p, k, s in zip(sizes, padding, kernel, stride, strict=True)
    ):
        raise Unsupported("average pooling whose last windows hang over")
    attrs: dict[str, Attr] = {"stride": stride, "padding": padding, "dilation": (1,) * rank}

    def total(image: Value) -> Value:  # the sum of each window: a convolution with ones
        ones = c.constant(1, image.type.dtype, (1, 1, *kernel))
        type = TensorType(image.type.dtype, (image.type.shape[0], 1, *out))
        return c.emit("convolution", [image, ones], attrs, type)

    sums = c.reshape(total(c.reshape(x, (prod(lead), 1, *sizes))), (*lead, *out))
    if divisor or pads or not any(padding):
        return c.apply("mul", sums, 1.0 / (divisor or prod(kernel)))
    counts = total(c.constant(1, x.type.dtype, (1, 1, *sizes)))
    return c.emit("div", [sums, c.reshape(counts, (*[1] * len(lead), *out))])


def _define_average(rank: int) -> None:
    def avg_pool(
        c: Lowering, x: Value, kernel_size: Any, stride: Any = (), padding: Any = 0,
        ceil_mode: bool = False, count_include_pad: bool = True, divisor_override: Any = None,
    ) -> Value:  # fmt: skip
        return _average(c, x, kernel_size, stride, padding, ceil_mode, count_include_pad,
                        divisor_override, rank)  # fmt: skip

    aten(f"avg_pool{rank}d.default")(avg_pool)


for _rank in (1, 2, 3):
    _define_average(_rank)
