"""What each pointwise op and optimizer update is, in terms of the nodes that kernels can compute.

Functions that no core Triton op has (tanh, expm1, log1p, round) are written so that they hold to a
few units of rounding also near zero, without a device library: the same source then runs on any
backend and in the interpreter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import log, pi, sqrt

from ..ir.module import Attr
from .expr import Graph, Node

Attrs = Mapping[str, Attr]
Rule = Callable[[Graph, tuple[Node, ...], Attrs], tuple[Node, ...]]


def _exp(g: Graph, x: Node) -> Node:
    return g.unary("exp", x)


def _abs(g: Graph, x: Node) -> Node:
    return g.unary("abs", x)


def _polynomial(x: Node, coefficients: tuple[float, ...]) -> Node:
    """Horner's rule; the highest power comes first."""
    result: Node | float = coefficients[0]
    for coefficient in coefficients[1:]:
        result = result * x + coefficient
    assert isinstance(result, Node)
    return result


def sigmoid(g: Graph, x: Node) -> Node:
    """1 / (1 + exp(-x))."""
    return 1.0 / (_exp(g, -x) + 1.0)


def tanh(g: Graph, x: Node) -> Node:
    """Taylor series up to x^9 near zero, else from exp(-2|x|).

    The rest of the series is 0.009 x^10 of x: 9e-9 at 1/4 for f32, 1e-19 at 0.02 for f64.
    """
    square = x * x
    series = x * _polynomial(square, (62 / 2835, -17 / 315, 2 / 15, -1 / 3, 1.0))
    small = _exp(g, _abs(g, x) * -2.0)
    far = (1.0 - small) / (small + 1.0)
    far = g.where(x < 0.0, -far, far)
    near = 0.02 if x.dtype == "f64" else 0.25
    return g.where(_abs(g, x) < near, series, far)


def expm1(g: Graph, x: Node) -> Node:
    """Taylor series up to x^8 near zero, else exp(x) - 1.

    The rest of the series is x^8 / 362880 of x: 2e-9 at 0.4 for f32, 1e-19 at 0.02 for f64.
    """
    powers = (1 / 40320, 1 / 5040, 1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0)
    near = 0.02 if x.dtype == "f64" else 0.4
    return g.where(_abs(g, x) < near, x * _polynomial(x, powers), _exp(g, x) - 1.0)


def log1p(g: Graph, x: Node) -> Node:
    """log(u) * x / (u - 1) with u = 1 + x, in which the rounding of u cancels (Kahan)."""
    u = x + 1.0
    exact = u.equals(1.0)
    infinite = u.equals(float("inf"))
    ratio = x / g.where(exact, 1.0, u - 1.0)
    return g.where(exact, x, g.unary("log", u) * g.where(infinite, 1.0, ratio))


def rounded(g: Graph, x: Node) -> Node:
    """To the nearest integer, halves to the even one."""
    low = g.unary("floor", x)
    rest = x - low
    odd = (low - g.unary("floor", low * 0.5) * 2.0).differs(0.0)
    half = g.where(odd, low + 1.0, low)
    return g.where(rest < 0.5, low, g.where(rest > 0.5, low + 1.0, half))


def _phi(g: Graph, x: Node) -> Node:
    """The normal distribution function."""
    return (g.unary("erf", x * sqrt(0.5)) + 1.0) * 0.5


def _tanh_argument(x: Node) -> Node:
    """2 * sqrt(2 / pi) * (x + 0.044715 x^3): gelu's tanh form is x * sigmoid of this."""
    return x * (x * x * 0.044715 + 1.0) * (2.0 * sqrt(2.0 / pi))


def gelu(g: Graph, x: Node, approximate: Attr) -> Node:
    """x * Phi(x), or its tanh form."""
    return x * (sigmoid(g, _tanh_argument(x)) if approximate == "tanh" else _phi(g, x))


def gelu_backward(g: Graph, dy: Node, x: Node, approximate: Attr) -> Node:
    """dy times the derivative of gelu at x."""
    if approximate == "tanh":
        s = sigmoid(g, _tanh_argument(x))
        slope = (x * x * (3.0 * 0.044715) + 1.0) * (2.0 * sqrt(2.0 / pi))
        return dy * (s + x * s * (1.0 - s) * slope)
    density = _exp(g, x * x * -0.5) * (1.0 / sqrt(2.0 * pi))
    return dy * (_phi(g, x) + x * density)


def silu_backward(g: Graph, dy: Node, x: Node) -> Node:
    """dy times the derivative of x * sigmoid(x)."""
    s = sigmoid(g, x)
    return dy * s * (x * (1.0 - s) + 1.0)


def softplus(g: Graph, x: Node) -> Node:
    """log(1 + exp(x)), which is x itself above 20 as in torch."""
    far = x > 20.0
    return g.where(far, x, log1p(g, _exp(g, g.where(far, 0.0, x))))


def power(g: Graph, x: Node, exponent: Node) -> Node:
    """x to one of the powers of `passes.regions.EXPONENTS`."""
    value = float(exponent.data[0])
    size = abs(value)
    whole = int(size)
    result: Node | None = None
    for _ in range(whole):
        result = x if result is None else result * x
    if size != whole:
        root = g.unary("sqrt", x)
        result = root if result is None else result * root
    assert result is not None
    return 1.0 / result if value < 0 else result


def floor_divide(g: Graph, x: Node, y: Node) -> Node:
    """Integer quotient, rounded down; the device's own division rounds towards zero."""
    quotient = g.binary("div_trunc", x, y)
    rest = x - quotient * y
    inexact = g.both(rest.differs(0), g.make("xor", (rest < 0, y < 0), "bool"))
    return g.where(inexact, quotient - 1, quotient)


def _sign(g: Graph, x: Node) -> Node:
    return (x > 0).to(x.dtype) - (x < 0).to(x.dtype)


def _isfinite(g: Graph, x: Node) -> Node:
    return _abs(g, x) < float("inf")


def _logical_not(g: Graph, x: Node) -> Node:
    return g.make("not", (g.truth(x),), "bool")


def _logical_or(g: Graph, x: Node, y: Node) -> Node:
    return g.make("or", (g.truth(x), g.truth(y)), "bool")


def _one(function: Callable[..., Node]) -> Rule:
    return lambda g, xs, attrs: (function(g, *xs),)


def _same(name: str) -> Rule:
    return lambda g, xs, attrs: (g.make(name, xs, xs[0].dtype),)


def _binary(name: str) -> Rule:
    return lambda g, xs, attrs: (g.binary(name, xs[0], xs[1]),)


POINTWISE: dict[str, Rule] = {
    **{n: _same(n) for n in ("neg", "abs", "exp", "log", "sqrt", "rsqrt", "sin", "cos", "erf",
                             "floor", "ceil")},
    **{n: _binary(n) for n in ("add", "sub", "mul", "div", "maximum", "minimum", "eq", "ne", "lt",
                               "le", "gt", "ge")},
    "bitwise_xor": _binary("xor"),
    "sign": _one(_sign),
    "log1p": _one(log1p),
    "expm1": _one(expm1),
    "reciprocal": _one(lambda g, x: 1.0 / x),
    "tanh": _one(tanh),
    "sigmoid": _one(sigmoid),
    "relu": _one(lambda g, x: g.where(x < 0, 0, x)),  # keeps NaN
    "silu": _one(lambda g, x: x * sigmoid(g, x)),
    "softplus": _one(softplus),
    "gelu": lambda g, xs, attrs: (gelu(g, xs[0], attrs["approximate"]),),
    "round": _one(rounded),
    "logical_not": _one(_logical_not),
    "isfinite": _one(_isfinite),
    "floor_divide": _one(floor_divide),
    "remainder": _one(lambda g, x, y: x - floor_divide(g, x, y) * y),
    "pow": _one(power),
    "logical_and": _one(lambda g, x, y: g.both(x, y)),
    "logical_or": _one(_logical_or),
    "where": _one(lambda g, p, x, y: g.where(p, x, y)),
    "gelu_backward": lambda g, xs, attrs: (
        gelu_backward(g, xs[0], xs[1], attrs["approximate"]),),
    "silu_backward": _one(silu_backward),
    "tanh_backward": _one(lambda g, dy, y: dy * (1.0 - y * y)),
    "sigmoid_backward": _one(lambda g, dy, y: dy * y * (1.0 - y)),
    "relu_backward": _one(lambda g, dy, y: g.where(y <= 0, 0.0, dy)),  # as ATen where y is NaN
}  # fmt: skip


def _number(attrs: Attrs, key: str) -> float:
    value = attrs[key]
    assert isinstance(value, (int, float))
    return float(value)


def _adam(decoupled: bool) -> Rule:
    def rule(g: Graph, xs: tuple[Node, ...], attrs: Attrs) -> tuple[Node, ...]:
        p, grad, m, v, step, lr = xs
        beta1, beta2 = _number(attrs, "beta1"), _number(attrs, "beta2")
        decay = _number(attrs, "weight_decay")
        grad = -grad if attrs["maximize"] else grad
        if decay and decoupled:
            p = p * (1.0 - lr * decay).to(p.dtype)
        elif decay:
            grad = grad + p * decay
        m = m + (grad - m) * (1.0 - beta1)
        v = v * beta2 + grad * grad * (1.0 - beta2)
        # the bias corrections are scalars in f64, as in the reference
        first = 1.0 - _power_of(g, beta1, step)
        second = g.unary("sqrt", 1.0 - _power_of(g, beta2, step)).to(v.dtype)
        denominator = g.unary("sqrt", v) / second + _number(attrs, "eps")
        return p - (lr / first).to(p.dtype) * (m / denominator), m, v

    return rule


def _power_of(g: Graph, base: float, exponent: Node) -> Node:
    """A number >= 0 to a power >= 1."""
    return _exp(g, exponent * log(base)) if base else g.const(0.0, exponent.dtype)


def _sgd(g: Graph, xs: tuple[Node, ...], attrs: Attrs) -> tuple[Node, ...]:
    p, grad, *state, step, lr = xs
    decay = _number(attrs, "weight_decay")
    grad = -grad if attrs["maximize"] else grad
    if decay:
        grad = grad + p * decay
    if not state:
        return (p - lr.to(p.dtype) * grad,)
    damp = g.where(step <= 1.0, 1.0, g.const(1.0 - _number(attrs, "dampening"), "f64"))
    buffer = state[0] * _number(attrs, "momentum") + damp.to(p.dtype) * grad
    grad = grad + buffer * _number(attrs, "momentum") if attrs["nesterov"] else buffer
    return p - lr.to(p.dtype) * grad, buffer


OPTIMIZER: dict[str, Rule] = {
    "adam_update": _adam(False),
    "adamw_update": _adam(True),
    "sgd_update": _sgd,
    "momentum_update": _sgd,
}
