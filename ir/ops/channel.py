"""Batch norm, from ops that each see one element or sum over all elements of a channel.

Statistics are sums, so any dim may be split: a split of the batch leaves partial sums of one number
per channel. Channels are dim 1, and `s...` are the spatial dims, if any.

In training the statistics depend on x. `batch_norm` with `batch = true` says so: its derivative for
x is then the total one, with the paths through mean and var, as `batch_norm_backward` computes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from ..module import Attr, Op
from ..opdef import AttrSpec, define
from ..types import TensorType


def _wide(type: TensorType) -> str:
    """The dtype of statistics: narrow floats are summed in f32."""
    return "f64" if type.dtype == "f64" else "f32"


def _per_channel(x: Any, vector: Any) -> Any:
    """A vector by channel, to be broadcast against x."""
    return vector.reshape(-1, *[1] * (x.dim() - 2))


def _widened(c: Any, *tensors: Any) -> list[Any]:
    """The tensors in the dtype of statistics."""
    wide = c.torch.promote_types(tensors[0].dtype, c.torch.float32)
    return [tensor.to(wide) for tensor in tensors]


def _others(x: Any) -> list[int]:
    return [dim for dim in range(x.dim()) if dim != 1]


def _squares(c: Any, x: Any, mean: Any) -> Any:
    centred = x.to(c.dtype()) - _per_channel(x, mean.to(c.dtype()))
    return centred.square_().sum(_others(x)) if c.fused else centred.square().sum(_others(x))


def _affine(c: Any, x: Any, mean: Any, scale: Any, shift: Any) -> Any:
    """(x - mean) * scale + shift, in one pass over memory."""
    one = c.torch.ones_like(mean)
    out, _, _ = c.torch.ops.aten.native_batch_norm(x, scale, shift, mean, one, False, 0.0, 0.0)
    return out


def _batch_norm(c: Any, x: Any, mean: Any, var: Any, weight: Any, bias: Any) -> Any:
    dtype = x.dtype
    x, mean, var, weight, bias = _widened(c, x, mean, var, weight, bias)
    if c.fused:
        out, _, _ = c.torch.ops.aten.native_batch_norm(
            x, weight, bias, mean, var, False, 0.0, c.attrs["eps"]
        )
        return out.to(dtype)
    scale = (var + c.attrs["eps"]).rsqrt() * weight
    mean, scale, bias = (_per_channel(x, vector) for vector in (mean, scale, bias))
    return ((x - mean) * scale + bias).to(dtype)


def _batch_norm_sums(c: Any, dy: Any, x: Any, mean: Any) -> Any:
    dy, x, mean = _widened(c, dy, x, mean)
    if not c.fused:
        return dy.sum(_others(x)), (dy * (x - _per_channel(x, mean))).sum(_others(x))
    one = c.torch.ones_like(mean)
    _, products, total = c.torch.ops.aten.native_batch_norm_backward(
        dy.contiguous(), x.contiguous(), one, None, None, mean, one, True, 0.0, [False, True, True]
    )
    return total, products


def _batch_norm_backward(
    c: Any, dy: Any, x: Any, mean: Any, var: Any, weight: Any, total: Any, products: Any
) -> Any:
    dtype = x.dtype
    tensors = _widened(c, dy, x, mean, var, weight, total, products)
    dy, x, mean, var, weight, total, products = tensors
    rstd = (var + c.attrs["eps"]).rsqrt()
    scale = weight * rstd
    count = c.size("n") * prod(c.size(f"s{dim}") for dim in range(x.dim() - 2))
    slope, shift = -scale * rstd * rstd * products / count, -scale * total / count
    if c.fused:
        out = _affine(c, x, mean, slope, shift)
        return out.addcmul_(dy, _per_channel(x, scale)).to(dtype)
    mean, scale, slope, shift = (_per_channel(x, v) for v in (mean, scale, slope, shift))
    return (dy * scale + (x - mean) * slope + shift).to(dtype)


def _same_type(op: Op) -> str:
    dy, x = (value.type for value in op.operands[:2])
    if dy.shape != x.shape:
        return f"dy has shape {list(dy.shape)}, x has {list(x.shape)}"
    return "" if dy.dtype == x.dtype else f"dy is {dy.dtype}, x is {x.dtype}"


def _sums_types(ins: Sequence[TensorType], attrs: Mapping[str, Attr]) -> list[TensorType]:
    return [TensorType(_wide(ins[1]), ins[1].shape[1:2])] * 2


_EPS = AttrSpec("float", 1e-5, doc="added to the variance to avoid a division by 0")
_BATCH = AttrSpec("bool", False, doc="mean and var are those of x, and vary with it")
define(name="channel_squares", family="reduction", dtypes="f", flops_per_point=3,
       doc="sum of (x - mean)^2 of each channel: (x, mean) -> squares, in at least f32",
       signature="n c s..., c -> c ; n=sum, s=sum",
       types=lambda ins, attrs: [TensorType(_wide(ins[0]), ins[0].shape[1:2])],
       ref=_squares)  # fmt: skip
define(name="batch_norm", family="row", dtypes="f", flops_per_point=2,
       attrs={"eps": _EPS, "batch": _BATCH},
       doc="(x - mean) / sqrt(var + eps) * weight + bias by channel: (x, mean, var, weight, bias)",
       signature="n c s..., c, c, c, c -> n c s...", types=lambda ins, attrs: [ins[0]],
       ref=_batch_norm)  # fmt: skip
define(name="batch_norm_sums", family="reduction", dtypes="f", flops_per_point=4,
       linear=((0,),), verify=_same_type,
       doc="sums by channel that the gradients of batch_norm need: (dy, x, mean) -> sum of dy, sum "
           "of dy * (x - mean)",
       signature="n c s..., n c s..., c -> c, c ; n=sum, s=sum", types=_sums_types,
       ref=_batch_norm_sums)  # fmt: skip
define(name="batch_norm_backward", family="row", dtypes="f", flops_per_point=5,
       linear=((0, 5, 6),), attrs={"eps": _EPS}, verify=_same_type,
       doc="gradient of batch_norm with the statistics of the batch: (dy, x, mean, var, weight, "
           "*batch_norm_sums) -> dx",
       signature="n c s..., n c s..., c, c, c, c, c -> n c s...",
       types=lambda ins, attrs: [ins[1]], ref=_batch_norm_backward)  # fmt: skip
