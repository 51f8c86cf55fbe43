"""Reverse-mode derivatives of IR ops: one rule each, written in IR ops.

A rule gets the cotangents of an op's results and gives those of its operands (the
vector-Jacobian product). Backward ops therefore carry their forward op's location, and a gradient
that has an op of its own (`attention_backward`, ...) is one op. An op without a rule is
differentiated by tracing torch's autograd over its reference semantics (`vjp_traced.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import pi

from ..ir.module import Attr, Op, Value
from ..ir.opdef import full_attrs
from ..ir.types import FLOATS, TensorType
from .aten import Lowering
from .vjp_traced import traced_vjp

Cotangents = Sequence[Value | None]
#: (emitter, op, cotangents of the results, wanted operands) -> cotangents of the operands
Rule = Callable[[Lowering, Op, Cotangents, Sequence[bool]], Cotangents | None]

RULES: dict[str, Rule] = {}

#: ops whose results do not change with small changes of the operands, or must not seem to
CONSTANT_OPS = frozenset({
    "sign", "floor", "ceil", "round", "floor_divide", "argmax", "stop_gradient", "constant",
    "literal", "iota", "uniform", "normal", "fold_seed", "eq", "ne", "lt", "le", "gt", "ge",
    "logical_and", "logical_or", "logical_not", "isfinite", "bitwise_xor",
})  # fmt: skip


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register the rule of ops."""

    def register(function: Rule) -> Rule:
        for name in names:
            if name in RULES:
                raise ValueError(f"{name} has two rules")
            RULES[name] = function
        return function

    return register


def pull_back(c: Lowering, op: Op, cts: Cotangents, wants: Sequence[bool]) -> Cotangents:
    """Cotangents of an op's operands; None for those not wanted, and for zero ones."""
    found = RULES.get(op.name)
    grads = None if found is None else found(c, op, cts, wants)
    if grads is None:
        grads = traced_vjp(c, op, cts, wants)
    out: list[Value | None] = []
    for grad, operand, wanted in zip(grads, op.operands, wants, strict=True):
        keep = wanted and grad is not None
        out.append(fit(c, grad, operand.type) if keep else None)  # type: ignore[arg-type]
    return out


def fit(c: Lowering, grad: Value, type: TensorType) -> Value:
    """Sum a cotangent over the dims that broadcasting added."""
    extra = len(grad.type.shape) - len(type.shape)
    wide = [d for d, size in enumerate(type.shape, start=extra)
            if size == 1 and grad.type.shape[d] != 1]  # fmt: skip
    grad = c.reduce(grad, [*range(extra), *wide])
    return c.cast(c.reshape(grad, type.shape), type.dtype)


# -- pointwise ------------------------------------------------------------------------------------

#: gradient of y = op(x) from (emitter, dy, x, y)
_Unary = Callable[[Lowering, Value, Value, Value], Value]

_UNARY: dict[str, _Unary] = {
    "neg": lambda c, d, x, y: c.emit("neg", [d]),
    "abs": lambda c, d, x, y: c.emit("mul", [d, c.emit("sign", [x])]),
    "exp": lambda c, d, x, y: c.emit("mul", [d, y]),
    "log": lambda c, d, x, y: c.emit("div", [d, x]),
    "log1p": lambda c, d, x, y: c.emit("div", [d, c.apply("add", x, 1)]),
    "expm1": lambda c, d, x, y: c.emit("mul", [d, c.apply("add", y, 1)]),
    "sqrt": lambda c, d, x, y: c.emit("div", [d, c.apply("mul", y, 2)]),
    "rsqrt": lambda c, d, x, y: c.emit(
        "mul", [c.apply("mul", d, -0.5), c.emit("mul", [y, c.emit("mul", [y, y])])]),
    "reciprocal": lambda c, d, x, y: c.emit(
        "mul", [c.emit("neg", [d]), c.emit("mul", [y, y])]),
    "sin": lambda c, d, x, y: c.emit("mul", [d, c.emit("cos", [x])]),
    "cos": lambda c, d, x, y: c.emit("mul", [c.emit("neg", [d]), c.emit("sin", [x])]),
    "tanh": lambda c, d, x, y: c.emit("tanh_backward", [d, y]),
    "sigmoid": lambda c, d, x, y: c.emit("sigmoid_backward", [d, y]),
    "relu": lambda c, d, x, y: c.emit("relu_backward", [d, y]),
    "silu": lambda c, d, x, y: c.emit("silu_backward", [d, x]),
    "softplus": lambda c, d, x, y: c.emit("mul", [d, c.emit("sigmoid", [x])]),
    "erf": lambda c, d, x, y: c.emit("mul", [d, c.apply(
        "mul", c.emit("exp", [c.emit("neg", [c.emit("mul", [x, x])])]), 2 / pi**0.5)]),
    "cast": lambda c, d, x, y: c.cast(d, x.type.dtype),
}  # fmt: skip


def _unary(name: str, gradient: _Unary) -> None:
    @rule(name)
    def apply(c: Lowering, op: Op, cts: Cotangents, wants: Sequence[bool]) -> Cotangents:
        return [gradient(c, _only(cts), op.operands[0], op.result)]


for _name, _gradient in _UNARY.items():
    _unary(_name, _gradient)


def _only(cts: Cotangents) -> Value:
    """The cotangent of the first result, which a rule is not called without."""
    ct = cts[0]
    assert ct is not None
    return ct


@rule("gelu")
def _gelu(c: Lowering, op: Op, cts: Cotangents, wants: Sequence[bool]) -> Cotangents:
    return [c.emit("gelu_backward", [_only(cts), op.operands[0]], op.attrs)]


@rule("add")
def _add(c: Lowering, op: Op, cts: Cotangents, wants: Sequence[bool]) -> Cotangents:
    return [cts[0], cts[0]]


@rule("sub")
def _sub(c: Lowering, op: Op, cts: Cotangents, wants: Sequence[bool]) -> Cotangents:
    return [cts[0], c.emit("neg", [_only(cts)]) if wants[1] else None]


@rule("mul")
def _mul(c: Lowering, op: Op, cts: Cotangents, wants: Sequence[bool]) -> Cotangents:
    x, y = op.operands
    d = _only(cts)
    return [c.emit("mul", [d, y]) if wants[0] else None, c.emit("mul", [d, x]) if wants[1] else None]


@rule("div")
def _div(c: Lowering, op: Op, cts: Cotangents, wants: Sequence[bool]) -> Cotangents:
    y, d = op.operands[1], _only(cts)
    over = c.emit("div", [d, y])
    return [over, c.emit("neg", [c.emit("mul", [over, op.result])]) if wants[1] else None]


@rule("pow")
def _pow(c: Lowering, op: Op, cts: Cotangents, wants: Sequence[bool]) -> Cotangents:
    (x, y), d = op.operands, _only(cts)
    zero = c.constant(0, op.result.type.dtype)
    grads: list[Value | None] = [None, None]
    if wants[0]:  # at y = 0 the factor y hides what x ** -1 would give
        slope = c.emit("mul", [y, c.emit("pow", [x, c.apply("sub", y, 1)])])
        slope = c.emit("where", [c.apply("eq", y, 0), zero, slope])
        grads[0] = c.emit("mul", [d, slope])
    if wants[1]:  # 0 ** y is flat for y >= 0, where log(0) is not finite
        flat = c.emit("logical_and", [c.apply("eq", x, 0), c.apply("ge", y, 0)])
        slope = c.emit("mul", [op.result, c.emit("log", [x])])
        grads[1] = c.emit("mul", [d, c.emit("where", [flat, zero, slope])])
    return grads


@rule("remainder")
def _remainder(c: Lowering, op: Op, cts: Cotangents, wants: Sequence[bool]) -> Cotangents:
    d = _only(cts)
    if not wants[1]:
        return [d, None]
    return [d, c.emit("neg", [c.emit("mul", [d, c.emit("floor_divide", op.operands)])])]


@rule("maximum", "minimum")
def _extreme(c: Lowering, op: Op, cts: Cotangents, wants: Sequence[bool]) -> Cotangents:
    # equal elements share the gradient, as torch has it
    (x, y), d = op.operands, _only(cts)
    zero, half = c.constant(0, d.type.dtype), c.apply("mul", d, 0.5)
    tie = c.emit("where", [c.emit("eq", [x, y]), half, zero])
    wins = ("gt", "lt") if op.name == "maximum" else ("lt", "gt")
    return [c.emit("where", [c.emit(how, [x, y]), d, tie]) if wanted else None
            for how, wanted in zip(wins, wants, strict=True)]  # fmt: skip


@rule("where")
def _where(c: Lowering, op: Op, cts: Cotangents, wants: Sequence[bool]) -> Cotangents:
    condition, d = op.operands[0], _only(cts)
    zero = c.constant(0, d.type.dtype)
    left = c.emit("where", [condition, d, zero]) if wants[1] else None
    return [None, left, c.emit("where", [condition, zero, d]) if wants[2] else None]


@rule("dropout")
def _dropout(c: Lowering, op: Op, cts: Cotangents, wants: Sequence[bool]) -> Cotangents:
    return [c.emit("dropout", [_only(cts), op.operands[1]], op.attrs), None]


# -- contractions ---------------------------------------------------------------------------------


@rule("einsum")
def _einsum(c: Lowering, op: Op, cts: Cotangents, wants: Sequence[bool]) -> Cotangents:
    left, _, out = str(op.attrs["spec"]).partition("->")
    x, y = (term.strip() for term in left.split(","))
    out, d = out.strip(), _only(cts)
    grads: list[Value | None] = [None, None]
    if wants[0]:
        grads[0] = c.emit("einsum", [d, op.operands[1]], {"spec": f"{out}, {y} -> {x}"})
    if wants[1]:
        grads[1] = c.emit("einsum", [d, op.operands[0]], {"spec": f"{out}, {x} -> {y}"})
    return grads


@rule("grouped_product")
def _grouped_product(c: Lowering, op: Op, cts: Cotangents, wants: Sequence[bool]) -> Cotangents:
    (x, w, group), d = op.operands, _only(cts)
    transposed = c.permute(w, (0, 2, 1)) if wants[0] else w
    return [
        c.emit("grouped_product", [d, transposed, group]) if wants[0] else None,
        c.emit("grouped_weight_grad", [d, x, group], None, w.type) if wants[1] else None,
        None,
    ]


@rule("grouped_weight_grad")
def _grouped_weight_grad(c: Lowering, op: Op, cts: Cotangents, wants: Sequence[bool]) -> Cotangents:
    (d, x, group), ct = op.operands, _only(cts)
    transposed = c.permute(ct, (0, 2, 1)) if wants[1] else ct
    return [
        c.emit("grouped_product", [x, ct, group]) if wants[0] else None,
        c.emit("grouped_product", [d, transposed, group]) if wants[1] else None,
        None,
    ]


@rule("convolution")
def _convolution(c: Lowering, op: Op, cts: Cotangents, wants: Sequence[bool]) -> Cotangents:
    (x, w), d = op.operands, _only(cts)
    return [
        c.emit("convolution_input_grad", [d, w], op.attrs, x.type) if wants[0] else None,
        c.emit("convolution_weight_grad", [d, x], op.attrs, w.type) if wants[1] else None,
    ]


@rule("convolution_input_grad")
def _transposed(c: Lowering, op: Op, cts: Cotangents, wants: Sequence[bool]) -> Cotangents:
    (y, w), d = op.operands, _only(cts)
    return [
        c.emit("convolution", [d, w], op.attrs, y.type) if wants[0] else None,
        c.emit("convolution_weight_grad", [y, d], op.attrs, w.type) if wants[1] else None,
    ]


@rule("attention")
def _attention(c: Lowering, op: Op, cts: Cotangents, wants: Sequence[bool]) -> Cotangents | None:
    if cts[0] is None or cts[1] is not None or any(wants[3:]):
        return None  # a gradient of the mask or through lse
    grads = c.many("attention_backward", [cts[0], *op.operands[:3], *op.results, *op.operands[3:]],
                   op.attrs)  # fmt: skip
    return [*grads, *[None] * (len(op.operands) - 3)]


# -- rows -----------------------------------------------------------------------------------------


@rule("softmax", "log_softmax")
def _softmax(c: Lowering, op: Op, cts: Cotangents, wants: Sequence[bool]) -> Cotangents:
    return [c.emit(f"{op.name}_backward", [_only(cts), op.result])]


@rule("logsumexp")
def _logsumexp(c: Lowering, op: Op, cts: Cotangents, wants: Sequence[bool]) -> Cotangents:
    x, y, d = op.operands[0], op.result, _only(cts)
    column = (*y.type.shape, 1)
    weights = c.emit("exp", [c.emit("sub", [x, c.reshape(y, column)])])
    return [c.emit("mul", [weights, c.reshape(d, column)])]


@rule("layer_norm")
def _layer_norm(c: Lowering, op: Op, cts: Cotangents, wants: Sequence[bool]) -> Cotangents | None:
    if cts[0] is None or any(ct is not None for ct in cts[1:]):
        return None
    x, weight, bias = op.operands
    operands = [cts[0], x, weight, *op.results[1:]]
    return c.many("layer_norm_backward", operands, None, [x.type, weight.type, bias.type])


@rule("batch_norm")
def _batch_norm(c: Lowering, op: Op, cts: Cotangents, wants: Sequence[bool]) -> Cotangents | None:
    x, mean, var, weight, bias = op.operands
    attrs = full_attrs(op.name, op.attrs)
    batch, eps, dy = attrs["batch"], attrs["eps"], _only(cts)
    if any(wants[1:3]) and not batch:
        return None  # a gradient of statistics that are not those of x
    assert isinstance(eps, float)
    rstd = c.emit("rsqrt", [c.apply("add", var, eps)])
    total, products = c.many("batch_norm_sums", [dy, x, mean])
    dx: Value | None = None
    if wants[0] and batch:
        operands = [dy, x, mean, var, weight, total, products]
        dx = c.emit("batch_norm_backward", operands, {"eps": eps})
    elif wants[0]:
        scale = c.emit("mul", [c.cast(weight, rstd.type.dtype), rstd])
        column = c.reshape(scale, [*scale.type.shape, *[1] * (len(x.type.shape) - 2)])
        dx = c.emit("mul", [dy, c.cast(column, dy.type.dtype)])
    return [dx, None, None, c.emit("mul", [products, rstd]), total]


@rule("max_pool")
def _max_pool(c: Lowering, op: Op, cts: Cotangents, wants: Sequence[bool]) -> Cotangents:
    return [c.emit("max_pool_backward", [_only(cts), op.operands[0], op.results[1]], op.attrs)]


@rule("rms_norm")
def _rms_norm(c: Lowering, op: Op, cts: Cotangents, wants: Sequence[bool]) -> Cotangents | None:
    if cts[0] is None or cts[1] is not None:
        return None
    x, weight = op.operands
    operands = [cts[0], x, weight, op.results[1]]
    return c.many("rms_norm_backward", operands, None, [x.type, weight.type])


@rule("cross_entropy")
def _cross_entropy(c: Lowering, op: Op, cts: Cotangents, wants: Sequence[bool]) -> Cotangents | None:
    if cts[0] is None or cts[1] is not None:
        return None
    logits, labels = op.operands
    return [c.emit("cross_entropy_backward", [cts[0], logits, labels, op.results[1]], op.attrs),
            None]  # fmt: skip


# -- reductions -----------------------------------------------------------------------------------


def _kept(op: Op) -> tuple[int, ...]:
    """The shape of a reduction's result with reduced dims of size 1."""
    dims = op.attrs["dims"]
    assert isinstance(dims, tuple)
    return tuple(1 if d in dims else n for d, n in enumerate(op.operands[0].type.shape))


@rule("reduce_sum")
def _reduce_sum(c: Lowering, op: Op, cts: Cotangents, wants: Sequence[bool]) -> Cotangents:
    return [c.expand(c.reshape(_only(cts), _kept(op)), op.operands[0].type.shape)]


@rule("reduce_max", "reduce_min")
def _reduce_extreme(c: Lowering, op: Op, cts: Cotangents, wants: Sequence[bool]) -> Cotangents:
    # equal extremes share the gradient, as torch's amax has it
    x, shape = op.operands[0], _kept(op)
    dims = op.attrs["dims"]
    assert isinstance(dims, tuple)
    mask = c.cast(c.emit("eq", [x, c.reshape(op.result, shape)]), x.type.dtype)
    count = c.reduce(mask, dims, True)  # type: ignore[arg-type]
    share = c.emit("div", [c.reshape(_only(cts), shape), count])
    return [c.emit("mul", [mask, share])]


@rule("cumsum")
def _cumsum(c: Lowering, op: Op, cts: Cotangents, wants: Sequence[bool]) -> Cotangents:
    flipped = c.emit("flip", [_only(cts)], op.attrs)
    return [c.emit("flip", [c.emit("cumsum", [flipped], op.attrs)], op.attrs)]


@rule("sort", "topk")
def _sort(c: Lowering, op: Op, cts: Cotangents, wants: Sequence[bool]) -> Cotangents:
    x = op.operands[0].type
    zeros = c.constant(0, x.dtype, x.shape)
    return [c.emit("scatter_add", [zeros, op.results[1], _only(cts)], {"dim": op.attrs["dim"]})]


# -- movement -------------------------------------------------------------------------------------


@rule("reshape")
def _reshape(c: Lowering, op: Op, cts: Cotangents, wants: Sequence[bool]) -> Cotangents:
    return [c.reshape(_only(cts), op.operands[0].type.shape)]


@rule("permute")
def _permute(c: Lowering, op: Op, cts: Cotangents, wants: Sequence[bool]) -> Cotangents:
    dims = op.attrs["dims"]
    assert isinstance(dims, tuple)
    return [c.permute(_only(cts), [dims.index(d) for d in range(len(dims))])]


@rule("expand")
def _expand(c: Lowering, op: Op, cts: Cotangents, wants: Sequence[bool]) -> Cotangents:
    return [cts[0]]  # `fit` sums it


@rule("slice")
def _slice(c: Lowering, op: Op, cts: Cotangents, wants: Sequence[bool]) -> Cotangents:
    x, d = op.operands[0].type, _only(cts)
    dim, start, step = int(op.attrs["dim"]), op.attrs.get("start", 0), op.attrs.get("step", 1)  # type: ignore[arg-type]
    count = d.type.shape[dim]
    if step != 1:
        where: dict[str, Attr] = {"dim": 0, "start": start, "step": step}
        index = c.emit("iota", [], where, TensorType("i64", (count,)))
        return [c.emit("take_backward", [d, index], {"dim": dim}, x)]
    low, high = [0] * len(x.shape), [0] * len(x.shape)
    low[dim] = int(start)  # type: ignore[arg-type]
    high[dim] = x.shape[dim] - count - low[dim]
    return [c.emit("pad", [d], {"low": tuple(low), "high": tuple(high), "value": 0.0})]


@rule("pad")
def _pad(c: Lowering, op: Op, cts: Cotangents, wants: Sequence[bool]) -> Cotangents:
    low, high = op.attrs["low"], op.attrs["high"]
    assert isinstance(low, tuple) and isinstance(high, tuple)
    attrs: dict[str, Attr] = {
        "low": tuple(-n for n in low),  # type: ignore[operator]
        "high": tuple(-n for n in high),  # type: ignore[operator]
        "value": 0.0,
    }
    return [c.emit("pad", [_only(cts)], attrs)]


@rule("concat")
def _concat(c: Lowering, op: Op, cts: Cotangents, wants: Sequence[bool]) -> Cotangents:
    dim, start = int(op.attrs["dim"]), 0  # type: ignore[arg-type]
    grads: list[Value | None] = []
    for operand, wanted in zip(op.operands, wants, strict=True):
        stop = start + operand.type.shape[dim]
        grads.append(c.slice(_only(cts), dim, start, stop) if wanted else None)
        start = stop
    return grads


@rule("flip")
def _flip(c: Lowering, op: Op, cts: Cotangents, wants: Sequence[bool]) -> Cotangents:
    return [c.emit("flip", [_only(cts)], op.attrs)]


# -- indexing -------------------------------------------------------------------------------------


@rule("embedding")
def _embedding(c: Lowering, op: Op, cts: Cotangents, wants: Sequence[bool]) -> Cotangents:
    ids, table = op.operands
    return [None, c.emit("embedding_backward", [_only(cts), ids], op.attrs, table.type)]


@rule("gather")
def _gather(c: Lowering, op: Op, cts: Cotangents, wants: Sequence[bool]) -> Cotangents:
    x, index = op.operands
    zeros = c.constant(0, x.type.dtype, x.type.shape)
    return [c.emit("scatter_add", [zeros, index, _only(cts)], op.attrs), None]


@rule("scatter")
def _scatter(c: Lowering, op: Op, cts: Cotangents, wants: Sequence[bool]) -> Cotangents:
    index, d = op.operands[1], _only(cts)
    zeros = c.constant(0, d.type.dtype, index.type.shape)
    return [
        c.emit("scatter", [d, index, zeros], op.attrs) if wants[0] else None,
        None,
        c.emit("gather", [d, index], op.attrs) if wants[2] else None,
    ]


@rule("scatter_add")
def _scatter_add(c: Lowering, op: Op, cts: Cotangents, wants: Sequence[bool]) -> Cotangents:
    index, d = op.operands[1], _only(cts)
    return [d, None, c.emit("gather", [d, index], op.attrs) if wants[2] else None]


@rule("take")
def _take(c: Lowering, op: Op, cts: Cotangents, wants: Sequence[bool]) -> Cotangents:
    x, index = op.operands
    return [c.emit("take_backward", [_only(cts), index], op.attrs, x.type), None]


@rule("take_backward")
def _take_backward(c: Lowering, op: Op, cts: Cotangents, wants: Sequence[bool]) -> Cotangents:
    return [c.emit("take", [_only(cts), op.operands[1]], op.attrs), None]


def differentiable(op: Op) -> bool:
    """May a gradient flow through an op?"""
    return op.name not in CONSTANT_OPS and any(v.type.dtype in FLOATS for v in op.results)


__all__ = ["RULES", "differentiable", "fit", "pull_back"]
