"""ATen entries: contractions, attention, norms, losses, pooling."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from ..ir.module import Attr, Value
from .aten import Lowering, Number, Unsupported, aten
from .aten_shape import mean_of, moments

# -- contractions ---------------------------------------------------------------------------------

_BATCH = "abcdefgh"


def _einsum(c: Lowering, spec: str, x: Value, y: Value) -> Value:
    return c.emit("einsum", [x, y], {"spec": spec})


@aten("linear.default")
def linear(c: Lowering, x: Value, weight: Value, bias: Value | None = None) -> Value:
    if len(weight.type.shape) == 1:
        raise Unsupported("linear with a vector")
    rows = " ".join(_BATCH[: len(x.type.shape) - 1])
    y = _einsum(c, f"{rows} k, n k -> {rows} n".strip(), x, weight)
    return y if bias is None else c.emit("add", [y, bias])


@aten("mm.default")
def mm(c: Lowering, x: Value, y: Value) -> Value:
    return _einsum(c, "m k, k n -> m n", x, y)


@aten("bmm.default")
def bmm(c: Lowering, x: Value, y: Value) -> Value:
    return _einsum(c, "b m k, b k n -> b m n", x, y)


@aten("mv.default")
def mv(c: Lowering, x: Value, y: Value) -> Value:
    return _einsum(c, "m k, k -> m", x, y)


@aten("dot.default")
def dot(c: Lowering, x: Value, y: Value) -> Value:
    return c.reduce(c.emit("mul", [x, y]), [0])


@aten("matmul.default")
def matmul(c: Lowering, x: Value, y: Value) -> Value:
    left, right = x.type.shape, y.type.shape
    if len(left) == 1 and len(right) == 1:
        return dot(c, x, y)  # type: ignore[no-any-return]
    if len(left) == 1 or len(right) == 1 or len(right) == 2:
        rows = " ".join(_BATCH[: max(len(left) - 1, 0)])
        if len(left) == 1:
            batch = " ".join(_BATCH[: len(right) - 2])
            return _einsum(c, f"k, {batch} k n -> {batch} n", x, y)
        column, out = ("k", "") if len(right) == 1 else ("k n", "n")
        return _einsum(c, f"{rows} k, {column} -> {rows} {out}".strip(), x, y)
    batch_shape = c.out.shape[:-2]
    x = c.expand(x, (*batch_shape, *left[-2:])) if len(left) > 2 else x
    y = c.expand(y, (*batch_shape, *right[-2:]))
    batch = " ".join(_BATCH[: len(batch_shape)])
    own = batch if len(left) > 2 else ""
    return _einsum(c, f"{own} m k, {batch} k n -> {batch} m n".strip(), x, y)


def _plus(
    c: Lowering, bias: Value, product: Value, beta: Number, alpha: Number
) -> Value:
    if alpha != 1:
        product = c.apply("mul", product, alpha)
    if beta == 0:
        return product
    bias = c.apply("mul", bias, beta) if beta != 1 else bias
    return c.emit("add", [product, bias])


@aten("addmm.default")
def addmm(
    c: Lowering, bias: Value, x: Value, y: Value, *, beta: Number = 1, alpha: Number = 1
) -> Value:
    # GPT-2's Conv1D flattens (b, s) for this op; undo that, so that both dims may be split
    source = c.definition(x)
    if source is not None and source.name == "reshape":
        whole = source.operands[0]
        shape = whole.type.shape
        if len(shape) > 2 and shape[-1] == x.type.shape[-1]:
            rows = " ".join(_BATCH[: len(shape) - 1])
            product = _einsum(c, f"{rows} k, k n -> {rows} n", whole, y)
            if len(bias.type.shape) <= 1:
                return c.reshape(_plus(c, bias, product, beta, alpha), c.out.shape)
            return _plus(c, bias, c.reshape(product, c.out.shape), beta, alpha)
    return _plus(c, bias, mm(c, x, y), beta, alpha)


@aten("baddbmm.default")
def baddbmm(
    c: Lowering, bias: Value, x: Value, y: Value, *, beta: Number = 1, alpha: Number = 1
) -> Value:
    return _plus(c, bias, bmm(c, x, y), beta, alpha)


@aten("addmv.default")
def addmv(
    c: Lowering, bias: Value, x: Value, y: Value, *, beta: Number = 1, alpha: Number = 1
) -> Value:
    return _plus(c, bias, mv(c, x, y), beta, alpha)


@aten("einsum.default")
def einsum(c: Lowering, equation: str, operands: Sequence[Value], path: Any = None) -> Value:
    left, arrow, out = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if "." in equation or any(len(set(term)) != len(term) for term in terms):
        raise Unsupported("einsum with an ellipsis or a diagonal")
    if not arrow:
        letters = sorted(set(left) - {","})
        out = "".join(x for x in letters if left.count(x) == 1)
    value, term = operands[0], terms[0]
    for index in range(1, len(terms)):
        kept = set(out).union(*terms[index + 1 :])
        value, term = _alone(c, value, term, kept | set(terms[index]))
        other, name = _alone(c, operands[index], terms[index], kept | set(term))
        last = index == len(terms) - 1
        result = out if last else "".join(x for x in dict.fromkeys(term + name) if x in kept)
        spec = f"{' '.join(term)}, {' '.join(name)} -> {' '.join(result)}"
        value, term = _einsum(c, spec, value, other), result
    value, term = _alone(c, value, term, set(out))
    return c.permute(value, [term.index(x) for x in out])


def _alone(c: Lowering, x: Value, term: str, kept: set[str]) -> tuple[Value, str]:
    """Sum over the dims that nothing else has."""
    dims = [d for d, letter in enumerate(term) if letter not in kept]
    return c.reduce(x, dims), "".join(letter for letter in term if letter in kept)


def _sizes(values: int | Sequence[int], rank: int) -> tuple[int, ...]:
    """One number for each spatial dim."""
    listed = [values] if isinstance(values, int) else list(values)
    return tuple(listed * rank if len(listed) == 1 else listed)


def _window(stride: Any, padding: Any, dilation: Any, rank: int) -> dict[str, Attr]:
    return {"stride": _sizes(stride, rank), "padding": _sizes(padding, rank),
            "dilation": _sizes(dilation, rank)}  # fmt: skip


def _per_channel(c: Lowering, bias: Value, rank: int) -> Value:
    return c.reshape(bias, [bias.type.shape[0], *[1] * rank])


@aten("convolution.default")
def convolution(
    c: Lowering, x: Value, weight: Value, bias: Value | None, stride: Any, padding: Any,
    dilation: Any, transposed: bool, output_padding: Any, groups: int,
) -> Value:  # fmt: skip
    rank = len(weight.type.shape) - 2
    if len(x.type.shape) != rank + 2:
        raise Unsupported("convolution of one image without a batch dim")
    attrs = {**_window(stride, padding, dilation, rank), "groups": groups}
    # a transposed convolution is the gradient of one for its image
    name = "convolution_input_grad" if transposed else "convolution"
    y = c.emit(name, [x, weight], attrs, c.out)
    return y if bias is None else c.emit("add", [y, _per_channel(c, bias, rank)])


@aten("conv1d.default", "conv2d.default", "conv3d.default")
def conv(
    c: Lowering, x: Value, weight: Value, bias: Value | None = None, stride: Any = 1,
    padding: Any = 0, dilation: Any = 1, groups: int = 1,
) -> Value:  # fmt: skip
    return convolution(c, x, weight, bias, stride, padding, dilation, False, 0, groups)  # type: ignore[no-any-return]


# -- attention ------------------------------------------------------------------------------------


def _unrepeated(c: Lowering, x: Value) -> Value:
    """Heads before they were repeated for grouped queries: the op groups heads itself.

    Sees `(b g t d) -> (b g 1 t d) -> expand (b g r t d) -> (b (g r) t d)`.
    """
    merged = c.definition(x)
    if merged is None or merged.name != "reshape":
        return x
    spread = c.definition(merged.operands[0])
    if spread is None or spread.name != "expand":
        return x
    narrow, wide = spread.operands[0], spread.result.type.shape
    shape = narrow.type.shape
    if len(wide) != 5 or len(shape) != 5 or shape[2] != 1:
        return x
    if shape[:2] + shape[3:] != wide[:2] + wide[3:]:
        return x
    if x.type.shape != (wide[0], wide[1] * wide[2], *wide[3:]):
        return x
    return c.reshape(narrow, shape[:2] + shape[3:])


def _four(c: Lowering, x: Value) -> Value:
    """Batch dims folded into one, a missing head dim added."""
    shape = x.type.shape
    if len(shape) == 3:
        return c.reshape(x, (shape[0], 1, *shape[1:]))
    return c.reshape(x, (prod(shape[:-3]), *shape[-3:]))


@aten("scaled_dot_product_attention.default")
def attention(
    c: Lowering, query: Value, key: Value, value: Value, attn_mask: Value | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, *, scale: float | None = None,
    enable_gqa: bool = False,
) -> Value:  # fmt: skip
    if len(query.type.shape) < 3:
        raise Unsupported("attention without a batch dim")
    width = query.type.shape[-1]
    attrs: dict[str, Attr] = {"causal": is_causal, "scale": width**-0.5 if scale is None else scale}
    q, k, v = _four(c, query), _four(c, key), _four(c, value)
    plain_k, plain_v = _unrepeated(c, k), _unrepeated(c, v)
    if plain_k.type.shape[:2] == plain_v.type.shape[:2]:
        k, v = plain_k, plain_v
    operands = [q, k, v]
    if attn_mask is not None:
        shape = attn_mask.type.shape
        if len(shape) > 4 or len(query.type.shape) != 4:
            raise Unsupported("a mask with several batch dims")
        operands.append(c.reshape(attn_mask, (1,) * (4 - len(shape)) + shape))
        attrs["mask"] = True
    if dropout_p:
        operands.append(c.seed())
        attrs["dropout"] = dropout_p
    out, _ = c.many("attention", operands, attrs)
    return c.reshape(out, c.out.shape)


# -- rows -----------------------------------------------------------------------------------------


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
        y = c.emit("mul", [y, _per_channel(c, weight, rank)])
    return y if bias is None else c.emit("add", [y, _per_channel(c, bias, rank)])


def _normalize(
    c: Lowering, x: Value, mean: Value, var: Value, weight: Value | None, bias: Value | None,
    eps: float,
) -> tuple[Value, Value]:  # fmt: skip
    """Batch norm's result and 1 / sqrt(var + eps), from statistics by channel."""
    rank = len(x.type.shape) - 2
    rstd = c.emit("rsqrt", [c.apply("add", var, eps)])
    centred = c.emit("sub", [x, _per_channel(c, mean, rank)])
    return _affine(c, c.emit("mul", [centred, _per_channel(c, rstd, rank)]), weight, bias), rstd


@aten("_native_batch_norm_legit_functional.default")
def batch_norm(
    c: Lowering, x: Value, weight: Value | None, bias: Value | None, running_mean: Value,
    running_var: Value, training: bool, momentum: float, eps: float,
) -> tuple[Any, ...]:  # fmt: skip
    _same_dtype(x, running_mean)
    if not training:
        y, rstd = _normalize(c, x, running_mean, running_var, weight, bias, eps)
        return y, None, None, running_mean, running_var
    var, mean = _batch_moments(c, x)
    y, rstd = _normalize(c, x, mean, var, weight, bias, eps)
    count = x.type.numel // x.type.shape[1]
    unbiased = c.apply("mul", var, count / max(count - 1, 1))
    new_mean = _moved(c, running_mean, mean, momentum)
    return y, mean, rstd, new_mean, _moved(c, running_var, unbiased, momentum)


def _same_dtype(x: Value, statistics: Value) -> None:
    if x.type.dtype != statistics.type.dtype:
        raise Unsupported("batch norm with statistics of another dtype")


def _batch_moments(c: Lowering, x: Value) -> tuple[Value, Value]:
    dims = [d for d in range(len(x.type.shape)) if d != 1]
    var, mean = moments(c, x, dims, 0, True)
    channels = [x.type.shape[1]]
    return c.reshape(var, channels), c.reshape(mean, channels)


def _moved(c: Lowering, old: Value, new: Value, momentum: float) -> Value:
    return c.emit("add", [c.apply("mul", old, 1 - momentum), c.apply("mul", new, momentum)])


@aten("_native_batch_norm_legit.no_stats")
def batch_norm_no_stats(
    c: Lowering, x: Value, weight: Value | None, bias: Value | None, training: bool,
    momentum: float, eps: float,
) -> tuple[Value, ...]:  # fmt: skip
    var, mean = _batch_moments(c, x)
    y, rstd = _normalize(c, x, mean, var, weight, bias, eps)
    return y, mean, rstd


@aten("_native_batch_norm_legit_no_training.default")
def batch_norm_eval(
    c: Lowering, x: Value, weight: Value | None, bias: Value | None, running_mean: Value,
    running_var: Value, momentum: float, eps: float,
) -> tuple[Any, ...]:  # fmt: skip
    _same_dtype(x, running_mean)
    y, _ = _normalize(c, x, running_mean, running_var, weight, bias, eps)
    return y, None, None


# -- losses ---------------------------------------------------------------------------------------

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


# -- pooling --------------------------------------------------------------------------------------


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
    kernel, padding = _sizes(kernel, rank), _sizes(padding, rank)
    stride = _sizes(stride, rank) if stride not in (None, [], ()) else kernel
    dilation, out = _sizes(dilation, rank), c.out.shape[-rank:]
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
    kernel = _sizes(kernel_size, 2)
    stride = kernel if stride in ((), [], None) else _sizes(stride, 2)
    sizes = x.type.shape[-2:]
    exact = all(size % k == 0 for size, k in zip(sizes, kernel, strict=True))
    if kernel != stride or any(_sizes(padding, 2)) or divisor_override or not exact:
        raise Unsupported("average pooling with overlapping or padded windows")
    return _mean_of_tiles(c, x, [size // k for size, k in zip(sizes, kernel, strict=True)])


