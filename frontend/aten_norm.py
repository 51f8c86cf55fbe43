"""ATen entries: row-wise ops and norms."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from ..ir.module import Value
from .aten import Lowering, Unsupported, aten
from .aten_contract import per_channel
from .aten_reduce import mean_of, moments


def _on_last(c: Lowering, name: str, x: Value, dim: int) -> Value:
    """A row op along any dim."""
    rank = len(x.type.shape)
    dim = dim % max(rank, 1)
    if rank == 0:
        raise Unsupported(f"{name} of a scalar")
    order = [d for d in range(rank) if d != dim] + [dim]
    back = [order.index(d) for d in range(rank)]
    return c.permute(c.emit(name, [c.permute(x, order)]), back)


@aten("softmax.int", "_softmax.default")
def softmax(c: Lowering, x: Value, dim: int, dtype: Any = None) -> Value:
    return _on_last(c, "softmax", c.cast(x, c.out.dtype), dim)


@aten("log_softmax.int", "_log_softmax.default")
def log_softmax(c: Lowering, x: Value, dim: int, dtype: Any = None) -> Value:
    return _on_last(c, "log_softmax", c.cast(x, c.out.dtype), dim)


@aten("logsumexp.default")
def logsumexp(c: Lowering, x: Value, dim: Any, keepdim: bool = False) -> Value:
    dims = [dim] if isinstance(dim, int) else list(dim)
    rank = len(x.type.shape)
    if len(dims) != 1 or rank == 0:
        raise Unsupported("logsumexp over several dims")
    order = [d for d in range(rank) if d != dims[0] % rank] + [dims[0] % rank]
    return c.reshape(c.emit("logsumexp", [c.permute(x, order)]), c.out.shape)


def _flat_rows(c: Lowering, x: Value, shape: Sequence[int]) -> Value:
    """The normalized dims as one."""
    lead = x.type.shape[: len(x.type.shape) - len(shape)]
    return c.reshape(x, (*lead, prod(shape)))


def _vector(c: Lowering, x: Value | None, size: int, fill: int, dtype: str) -> Value:
    return c.constant(fill, dtype, [size]) if x is None else c.reshape(c.cast(x, dtype), [size])


def _layer_norm(
    c: Lowering, x: Value, shape: Sequence[int], weight: Value | None, bias: Value | None,
    eps: float,
) -> tuple[Value, ...]:  # fmt: skip
    size, dtype = prod(shape), x.type.dtype
    operands = [_flat_rows(c, x, shape), _vector(c, weight, size, 1, dtype),
                _vector(c, bias, size, 0, dtype)]  # fmt: skip
    return c.many("layer_norm", operands, {"eps": eps})


@aten("layer_norm.default")
def layer_norm(
    c: Lowering, x: Value, normalized_shape: Sequence[int], weight: Value | None = None,
    bias: Value | None = None, eps: float = 1e-5, cudnn_enable: bool = True,
) -> Value:  # fmt: skip
    return c.reshape(_layer_norm(c, x, normalized_shape, weight, bias, eps)[0], c.out.shape)


@aten("native_layer_norm.default")
def native_layer_norm(
    c: Lowering, x: Value, normalized_shape: Sequence[int], weight: Value | None,
    bias: Value | None, eps: float,
) -> tuple[Value, ...]:  # fmt: skip
    results = _layer_norm(c, x, normalized_shape, weight, bias, eps)
    return tuple(c.reshape(r, type.shape) for r, type in zip(results, c.outs, strict=True))


@aten("rms_norm.default")
def rms_norm(
    c: Lowering, x: Value, normalized_shape: Sequence[int], weight: Value | None = None,
    eps: float | None = None,
) -> Value:  # fmt: skip
    if eps is None:  # torch takes the machine epsilon of the computation's dtype
        eps = {"f64": 2.0**-52, "f32": 2.0**-23, "f16": 2.0**-10, "bf16": 2.0**-7}[x.type.dtype]
    size = prod(normalized_shape)
    operands = [_flat_rows(c, x, normalized_shape), _vector(c, weight, size, 1, x.type.dtype)]
    return c.reshape(c.many("rms_norm", operands, {"eps": eps})[0], c.out.shape)


@aten("group_norm.default")
def group_norm(
    c: Lowering, x: Value, num_groups: int, weight: Value | None = None,
    bias: Value | None = None, eps: float = 1e-5, cudnn_enabled: bool = True,
) -> Value:  # fmt: skip
    shape = x.type.shape
    grouped = c.reshape(x, (shape[0], num_groups, shape[1] // num_groups, *shape[2:]))
    dims = range(2, len(grouped.type.shape))
    variance, average = moments(c, grouped, dims, 0, True)
    scale = c.emit("rsqrt", [c.apply("add", variance, eps)])
    y = c.reshape(c.emit("mul", [c.emit("sub", [grouped, average]), scale]), shape)
    return _affine(c, y, weight, bias)


def _affine(c: Lowering, y: Value, weight: Value | None, bias: Value | None) -> Value:
    """Scale and shift by channel (dim 1)."""
    rank = len(y.type.shape) - 2
    if weight is not None:
        y = c.emit("mul", [y, per_channel(c, weight, rank)])
    return y if bias is None else c.emit("add", [y, per_channel(c, bias, rank)])


def _wide(x: Value) -> str:
    """The dtype of batch norm's statistics: half precision takes them in float32, as torch does."""
    return "f32" if x.type.dtype in ("f16", "bf16") else x.type.dtype


def _statistics(c: Lowering, x: Value) -> tuple[Value, Value]:
    """Mean and (biased) variance of each channel of a batch, in the dtype of the statistics."""
    others = [dim for dim in range(len(x.type.shape)) if dim != 1]
    mean = mean_of(c, c.cast(x, _wide(x)), others, False)
    squares = c.emit("channel_squares", [x, mean])
    count = x.type.numel // max(x.type.shape[1], 1)
    return mean, c.apply("mul", squares, 1.0 / count if count else float("nan"))


def _normalize(
    c: Lowering, x: Value, mean: Value, var: Value, weight: Value | None, bias: Value | None,
    eps: float, batch: bool = False,
) -> Value:  # fmt: skip
    """Batch norm's result from statistics by channel; `batch`: from those of x."""
    wide, size = _wide(x), x.type.shape[1]
    operands = [x, c.cast(mean, wide), c.cast(var, wide), _vector(c, weight, size, 1, wide),
                _vector(c, bias, size, 0, wide)]  # fmt: skip
    return c.emit("batch_norm", operands, {"eps": eps, "batch": batch})


@aten("_native_batch_norm_legit_functional.default")
def batch_norm(
    c: Lowering, x: Value, weight: Value | None, bias: Value | None, running_mean: Value,
    running_var: Value, training: bool, momentum: float, eps: float,
) -> tuple[Any, ...]:  # fmt: skip
    if not training:
        y = _normalize(c, x, running_mean, running_var, weight, bias, eps)
        return y, None, None, running_mean, running_var
    mean, var = _statistics(c, x)
    y = _normalize(c, x, mean, var, weight, bias, eps, batch=True)
    count = x.type.numel // x.type.shape[1]
    unbiased = c.apply("mul", var, count / max(count - 1, 1))
    results = (y, mean, _rstd(c, var, eps), _moved(c, running_mean, mean, momentum),
               _moved(c, running_var, unbiased, momentum))  # fmt: skip
    return tuple(c.cast(value, type.dtype) for value, type in zip(results, c.outs, strict=True))


def _rstd(c: Lowering, var: Value, eps: float) -> Value:
    return c.emit("rsqrt", [c.apply("add", var, eps)])


def _moved(c: Lowering, old: Value, new: Value, momentum: float) -> Value:
    """The running statistic after a batch."""
    wide = c.cast(old, new.type.dtype)
    return c.emit("add", [c.apply("mul", wide, 1 - momentum), c.apply("mul", new, momentum)])


@aten("_native_batch_norm_legit.no_stats")
def batch_norm_no_stats(
    c: Lowering, x: Value, weight: Value | None, bias: Value | None, training: bool,
    momentum: float, eps: float,
) -> tuple[Value, ...]:  # fmt: skip
    mean, var = _statistics(c, x)
    y = _normalize(c, x, mean, var, weight, bias, eps, batch=True)
    return y, c.cast(mean, c.outs[1].dtype), c.cast(_rstd(c, var, eps), c.outs[2].dtype)


@aten("_native_batch_norm_legit_no_training.default")
def batch_norm_eval(
    c: Lowering, x: Value, weight: Value | None, bias: Value | None, running_mean: Value,
    running_var: Value, momentum: float, eps: float,
) -> tuple[Any, ...]:  # fmt: skip
    return _normalize(c, x, running_mean, running_var, weight, bias, eps), None, None
