"""ATen entries: pointwise ops, with dtype promotion made explicit by casts."""

from __future__ import annotations

from typing import Any

import torch

from ..ir.module import Value
from ..ir.types import FLOATS
from ..runtime.context import TORCH_DTYPES, WEFT_DTYPES
from .aten import Lowering, Number, Operand, Unsupported, aten

_UNARY = (
    "neg", "abs", "sign", "exp", "log", "log1p", "expm1", "sqrt", "rsqrt", "reciprocal", "sin",
    "cos", "tanh", "erf", "sigmoid", "relu", "silu", "floor", "ceil",
)  # fmt: skip


def _unary(name: str) -> None:
    @aten(f"{name}.default")
    def entry(c: Lowering, x: Value) -> Value:
        return c.emit(name, [c.cast(x, c.out.dtype)])


for _name in _UNARY:
    _unary(_name)


@aten("round.default")
def round_(c: Lowering, x: Value) -> Value:
    return c.emit("round", [x])


@aten("gelu.default")
def gelu(c: Lowering, x: Value, approximate: str = "none") -> Value:
    return c.emit("gelu", [x], {"approximate": approximate})


@aten("softplus.default")
def softplus(c: Lowering, x: Value, beta: Number = 1, threshold: Number = 20) -> Value:
    if beta != 1 or threshold != 20:
        raise Unsupported("softplus with its own beta or threshold")
    return c.emit("softplus", [x])


@aten("logical_not.default", "bitwise_not.default")
def logical_not(c: Lowering, x: Value) -> Value:
    if c.out.dtype != "bool":
        raise Unsupported("bitwise complement of integers")
    return c.emit("logical_not", [x])


@aten("isfinite.default")
def isfinite(c: Lowering, x: Value) -> Value:
    return c.emit("isfinite", [x])


@aten("isnan.default")
def isnan(c: Lowering, x: Value) -> Value:
    return c.emit("ne", [x, x])


@aten("isinf.default")
def isinf(c: Lowering, x: Value) -> Value:
    return c.apply("eq", c.emit("abs", [x]), float("inf"))


@aten("_to_copy.default")
def to_copy(c: Lowering, x: Value, **_: Any) -> Value:
    return c.cast(x, c.out.dtype)


@aten("clone.default", "alias.default", "lift_fresh_copy.default", "contiguous.default",
      "lift_fresh.default")  # fmt: skip
def same(c: Lowering, x: Value, **_: Any) -> Value:
    return x


@aten("detach.default")
def detach(c: Lowering, x: Value) -> Value:
    return c.emit("stop_gradient", [x])




_BOOLEAN = {"add": "logical_or", "mul": "logical_and"}


def _arithmetic(c: Lowering, name: str, x: Operand, y: Operand) -> Value:
    dtype = c.out.dtype
    if dtype == "bool":
        if name not in _BOOLEAN:
            raise Unsupported(f"{name} of booleans")
        name = _BOOLEAN[name]
    return c.apply(name, x, y, dtype=dtype)


def _with_alpha(c: Lowering, y: Operand, alpha: Number) -> Operand:
    if alpha == 1:
        return y
    if isinstance(y, Value):
        return c.apply("mul", c.cast(y, c.out.dtype), alpha)
    return y * alpha


@aten("add.Tensor", "add.Scalar")
def add(c: Lowering, x: Operand, y: Operand, alpha: Number = 1) -> Value:
    if isinstance(x, Value) and not isinstance(y, Value) and y == 0 and x.type == c.out:
        return x
    return _arithmetic(c, "add", x, _with_alpha(c, y, alpha))


@aten("sub.Tensor", "sub.Scalar")
def sub(c: Lowering, x: Operand, y: Operand, alpha: Number = 1) -> Value:
    return _arithmetic(c, "sub", x, _with_alpha(c, y, alpha))


@aten("rsub.Tensor", "rsub.Scalar")
def rsub(c: Lowering, x: Operand, y: Operand, alpha: Number = 1) -> Value:
    return _arithmetic(c, "sub", y, _with_alpha(c, x, alpha))


@aten("mul.Tensor", "mul.Scalar")
def mul(c: Lowering, x: Operand, y: Operand) -> Value:
    if isinstance(x, Value) and not isinstance(y, Value) and y == 1 and x.type == c.out:
        return x
    return _arithmetic(c, "mul", x, y)


@aten("div.Tensor", "div.Scalar", "true_divide.Tensor")
def div(c: Lowering, x: Operand, y: Operand) -> Value:
    return _arithmetic(c, "div", x, y)


@aten("div.Tensor_mode", "div.Scalar_mode")
def div_mode(c: Lowering, x: Operand, y: Operand, rounding_mode: str | None = None) -> Value:
    if rounding_mode == "trunc":
        raise Unsupported("division that rounds to zero")
    return _arithmetic(c, "floor_divide" if rounding_mode == "floor" else "div", x, y)


@aten("floor_divide.default", "floor_divide.Scalar")
def floor_divide(c: Lowering, x: Operand, y: Operand) -> Value:
    return _arithmetic(c, "floor_divide", x, y)


@aten("remainder.Tensor", "remainder.Scalar")
def remainder(c: Lowering, x: Operand, y: Operand) -> Value:
    return _arithmetic(c, "remainder", x, y)


@aten("maximum.default")
def maximum(c: Lowering, x: Value, y: Value) -> Value:
    return _arithmetic(c, "maximum", x, y)


@aten("minimum.default")
def minimum(c: Lowering, x: Value, y: Value) -> Value:
    return _arithmetic(c, "minimum", x, y)


@aten("pow.Tensor_Scalar")
def pow_scalar(c: Lowering, x: Value, exponent: Number) -> Value:
    x = c.cast(x, c.out.dtype)
    if exponent in (2, 3, 4):
        square = c.emit("mul", [x, x])
        return square if exponent == 2 else c.emit("mul", [square, x if exponent == 3 else square])
    if exponent == 1:
        return x
    if c.out.dtype in FLOATS and exponent in (0.5, -0.5, -1):
        return c.emit({0.5: "sqrt", -0.5: "rsqrt", -1: "reciprocal"}[exponent], [x])
    return c.apply("pow", x, exponent)


@aten("pow.Tensor_Tensor", "pow.Scalar")
def pow_tensor(c: Lowering, x: Operand, exponent: Value) -> Value:
    return _arithmetic(c, "pow", x, exponent)


@aten("square.default")
def square(c: Lowering, x: Value) -> Value:
    return c.emit("mul", [x, x])


def promoted(*xs: Operand) -> str:
    """The dtype in which torch compares or combines tensors and numbers."""
    samples: list[Any] = [
        torch.empty(x.type.shape, dtype=TORCH_DTYPES[x.type.dtype], device="meta")
        if isinstance(x, Value) else x
        for x in xs
    ]  # fmt: skip
    return WEFT_DTYPES[torch.result_type(*samples)]


def _comparison(name: str) -> None:
    @aten(f"{name}.Tensor", f"{name}.Scalar")
    def entry(c: Lowering, x: Value, y: Operand) -> Value:
        return c.apply(name, x, y, dtype=promoted(x, y))


for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    _comparison(_name)


def _truth(c: Lowering, x: Operand) -> Value:
    if not isinstance(x, Value):
        return c.constant(bool(x), "bool")
    return x if x.type.dtype == "bool" else c.apply("ne", x, 0)


@aten("logical_and.default")
def logical_and(c: Lowering, x: Value, y: Value) -> Value:
    return c.emit("logical_and", [_truth(c, x), _truth(c, y)])


@aten("logical_or.default")
def logical_or(c: Lowering, x: Value, y: Value) -> Value:
    return c.emit("logical_or", [_truth(c, x), _truth(c, y)])


@aten("logical_xor.default")
def logical_xor(c: Lowering, x: Value, y: Value) -> Value:
    return c.emit("ne", [_truth(c, x), _truth(c, y)])


def _bitwise(name: str, boolean: str, old: str) -> None:
    @aten(f"bitwise_{name}.Tensor", f"bitwise_{name}.Scalar", f"{old}.Tensor", f"{old}.Scalar")
    def entry(c: Lowering, x: Value, y: Operand) -> Value:
        if c.out.dtype != "bool":
            raise Unsupported("bitwise operation on integers")
        return c.emit(boolean, [_truth(c, x), _truth(c, y)])


_bitwise("and", "logical_and", "__and__")
_bitwise("or", "logical_or", "__or__")
_bitwise("xor", "ne", "__xor__")


@aten("where.self", "where.ScalarOther", "where.ScalarSelf", "where.Scalar")
def where(c: Lowering, condition: Value, x: Operand, y: Operand) -> Value:
    dtype = c.out.dtype
    return c.emit("where", [_truth(c, condition), c.operand(x, dtype), c.operand(y, dtype)])


@aten("masked_fill.Scalar", "masked_fill.Tensor")
def masked_fill(c: Lowering, x: Value, mask: Value, value: Operand) -> Value:
    return c.emit("where", [mask, c.operand(value, c.out.dtype), c.cast(x, c.out.dtype)])


@aten("clamp.default", "clamp.Tensor")
def clamp(c: Lowering, x: Value, min: Operand | None = None, max: Operand | None = None) -> Value:
    # the gradient at a bound is whole, that of maximum is half: so select by comparison
    x = c.cast(x, c.out.dtype)
    for bound, outside in ((min, "lt"), (max, "gt")):
        if bound is not None:
            limit = c.operand(bound, c.out.dtype)
            x = c.emit("where", [c.emit(outside, [x, limit]), limit, x])
    return x


@aten("clamp_min.default", "clamp_min.Tensor")
def clamp_min(c: Lowering, x: Value, min: Operand) -> Value:
    return clamp(c, x, min, None)  # type: ignore[no-any-return]


@aten("clamp_max.default", "clamp_max.Tensor")
def clamp_max(c: Lowering, x: Value, max: Operand) -> Value:
    return clamp(c, x, None, max)  # type: ignore[no-any-return]


@aten("leaky_relu.default")
def leaky_relu(c: Lowering, x: Value, negative_slope: Number = 0.01) -> Value:
    return c.emit("where", [c.apply("gt", x, 0), x, c.apply("mul", x, negative_slope)])


@aten("elu.default")
def elu(
    c: Lowering, x: Value, alpha: Number = 1, scale: Number = 1, input_scale: Number = 1
) -> Value:
    if scale != 1 or input_scale != 1:
        raise Unsupported("elu with scales")
    # expm1 overflows for large x, and 0 * inf in the unused branch's gradient would be NaN
    low = c.emit("where", [c.apply("gt", x, 0), c.constant(0, x.type.dtype), x])
    below = c.apply("mul", c.emit("expm1", [low]), alpha)
    return c.emit("where", [c.apply("gt", x, 0), x, below])


@aten("hardtanh.default")
def hardtanh(c: Lowering, x: Value, min_val: Number = -1, max_val: Number = 1) -> Value:
    # unlike clamp, its gradient at a bound is 0, which selection of the bound gives
    low, high = c.constant(min_val, x.type.dtype), c.constant(max_val, x.type.dtype)
    x = c.emit("where", [c.emit("le", [x, low]), low, x])
    return c.emit("where", [c.emit("ge", [x, high]), high, x])


@aten("lerp.Scalar", "lerp.Tensor")
def lerp(c: Lowering, x: Value, end: Value, weight: Operand) -> Value:
    return c.emit("add", [x, c.apply("mul", c.emit("sub", [end, x]), weight)])


@aten("addcmul.default")
def addcmul(c: Lowering, x: Value, y: Value, z: Value, value: Number = 1) -> Value:
    product = _with_alpha(c, c.apply("mul", y, z, dtype=c.out.dtype), value)
    return c.apply("add", x, product, dtype=c.out.dtype)


@aten("addcdiv.default")
def addcdiv(c: Lowering, x: Value, y: Value, z: Value, value: Number = 1) -> Value:
    quotient = _with_alpha(c, c.apply("div", y, z, dtype=c.out.dtype), value)
    return c.apply("add", x, quotient, dtype=c.out.dtype)
