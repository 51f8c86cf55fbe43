"""ATen entries: losses."""

from __future__ import annotations

from ..ir.module import Value
from .aten import Lowering, aten
from .aten_reduce import mean_of

_NONE, _MEAN, _SUM = 0, 1, 2  # at::Reduction


def _reduced(c: Lowering, x: Value, reduction: int) -> Value:
    dims = tuple(range(len(x.type.shape)))
    if reduction == _NONE:
        return x
    return mean_of(c, x, dims, False) if reduction == _MEAN else c.reduce(x, dims)


def _classes_last(c: Lowering, logits: Value) -> Value:
    rank = len(logits.type.shape)
    return c.permute(logits, [0, *range(2, rank), 1]) if rank > 2 else logits


@aten("cross_entropy_loss.default")
def cross_entropy(
    c: Lowering, logits: Value, target: Value, weight: Value | None = None, reduction: int = 1,
    ignore_index: int = -100, label_smoothing: float = 0.0,
) -> Value:  # fmt: skip
    logits = _classes_last(c, logits)
    if target.type.dtype not in ("i64", "u8"):
        return _soft_cross_entropy(c, logits, target, weight, reduction, label_smoothing)
    target = c.cast(target, "i64")
    dtype, classes = logits.type.dtype, logits.type.shape[-1]
    loss, _ = c.many("cross_entropy", [logits, target], {"ignore_index": ignore_index})
    valid = c.cast(c.apply("ne", target, ignore_index), dtype)
    scale = valid
    if weight is not None:
        safe = c.emit("where", [c.apply("ne", target, ignore_index), target, c.constant(0, "i64")])
        flat = c.reshape(safe, [safe.type.numel])
        picked = c.reshape(c.emit("take", [weight, flat], {"dim": 0}), target.type.shape)
        scale = c.emit("mul", [picked, valid])
        loss = c.emit("mul", [loss, scale])
    if label_smoothing:
        logs = c.emit("neg", [c.emit("log_softmax", [logits])])
        logs = logs if weight is None else c.emit("mul", [logs, weight])
        smooth = c.emit("mul", [c.reduce(logs, [len(logs.type.shape) - 1]), valid])
        loss = c.emit("add", [c.apply("mul", loss, 1 - label_smoothing),
                              c.apply("mul", smooth, label_smoothing / classes)])  # fmt: skip
    if reduction == _NONE:
        return loss
    dims = tuple(range(len(loss.type.shape)))
    total = c.reduce(loss, dims)
    return total if reduction == _SUM else c.emit("div", [total, c.reduce(scale, dims)])


def _soft_cross_entropy(
    c: Lowering, logits: Value, target: Value, weight: Value | None, reduction: int,
    label_smoothing: float,
) -> Value:  # fmt: skip
    """Cross entropy with class probabilities as the target."""
    target, classes = _classes_last(c, target), logits.type.shape[-1]
    if label_smoothing:
        target = c.apply("add", c.apply("mul", target, 1 - label_smoothing),
                         label_smoothing / classes)  # fmt: skip
    logs = c.emit("neg", [c.emit("log_softmax", [logits])])
    logs = logs if weight is None else c.emit("mul", [logs, weight])
    loss = c.reduce(c.emit("mul", [logs, target]), [len(logs.type.shape) - 1])
    if reduction != _MEAN:
        return _reduced(c, loss, reduction)
    rows = max(loss.type.numel, 1)  # the mean is over rows, also with weights
    return c.apply("mul", c.reduce(loss, range(len(loss.type.shape))), 1.0 / rows)


@aten("nll_loss_nd.default")
def nll_loss(
    c: Lowering, x: Value, target: Value, weight: Value | None = None, reduction: int = 1,
    ignore_index: int = -100,
) -> Value:  # fmt: skip
    x = _classes_last(c, x)
    valid = c.apply("ne", target, ignore_index)
    safe = c.emit("where", [valid, target, c.constant(0, "i64")])
    picked = c.emit("gather", [x, c.reshape(safe, (*safe.type.shape, 1))],
                    {"dim": len(x.type.shape) - 1})  # fmt: skip
    scale = c.cast(valid, x.type.dtype)
    if weight is not None:
        flat = c.reshape(safe, [safe.type.numel])
        chosen = c.reshape(c.emit("take", [weight, flat], {"dim": 0}), safe.type.shape)
        scale = c.emit("mul", [scale, chosen])
    loss = c.emit("neg", [c.emit("mul", [c.reshape(picked, safe.type.shape), scale])])
    if reduction == _NONE:
        return loss
    dims = tuple(range(len(loss.type.shape)))
    total = c.reduce(loss, dims)
    return total if reduction == _SUM else c.emit("div", [total, c.reduce(scale, dims)])


@aten("mse_loss.default")
def mse_loss(c: Lowering, x: Value, target: Value, reduction: int = 1) -> Value:
    distance = c.apply("sub", x, target, dtype=c.out.dtype)
    return _reduced(c, c.emit("mul", [distance, distance]), reduction)


@aten("l1_loss.default")
def l1_loss(c: Lowering, x: Value, target: Value, reduction: int = 1) -> Value:
    return _reduced(c, c.emit("abs", [c.apply("sub", x, target, dtype=c.out.dtype)]), reduction)


@aten("binary_cross_entropy_with_logits.default")
def bce_with_logits(
    c: Lowering, x: Value, target: Value, weight: Value | None = None,
    pos_weight: Value | None = None, reduction: int = 1,
) -> Value:  # fmt: skip
    # log(1 + exp(-x)) (1 + (w - 1) t) + (1 - t) x, as torch computes it
    log_term = c.emit("softplus", [c.emit("neg", [x])])
    if pos_weight is not None:
        factor = c.apply("add", c.emit("mul", [c.apply("sub", pos_weight, 1), target]), 1)
        log_term = c.emit("mul", [log_term, factor])
    loss = c.emit("add", [c.emit("mul", [c.apply("sub", 1, target), x]), log_term])
    loss = loss if weight is None else c.emit("mul", [loss, weight])
    return _reduced(c, loss, reduction)
