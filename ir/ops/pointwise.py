"""Pointwise ops: every dim may be split."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..module import Attr
from ..opdef import AttrSpec, define
from ..types import TensorType


def broadcast(shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The broadcast of shapes, aligned to the right."""
    rank = max(map(len, shapes), default=0)
    out = [1] * rank
    for shape in shapes:
        for position, size in enumerate(reversed(shape), start=1):
            if size != 1:
                out[rank - position] = size
    return tuple(out)


def _like(dtype: str = "", source: int = 0) -> Callable[..., Sequence[TensorType]]:
    def rule(ins: Sequence[TensorType], attrs: Mapping[str, Attr]) -> Sequence[TensorType]:
        return [TensorType(dtype or ins[source].dtype, broadcast([t.shape for t in ins]))]

    return rule


def unary(
    name: str, doc: str, ref: Callable[..., Any], *, flops: float = 1.0, **more: Any
) -> None:
    """An op of one tensor."""
    more.setdefault("types", _like())
    define(name=name, family="pointwise", doc=doc, signature="a... -> a...", ref=ref,
           flops_per_point=flops, **more)  # fmt: skip


def binary(name: str, doc: str, ref: Callable[..., Any], **more: Any) -> None:
    """An op of two tensors, with broadcasting."""
    more.setdefault("types", _like())
    define(name=name, family="pointwise", doc=doc, signature="a..., a... -> a...", ref=ref, **more)


unary("neg", "-x", lambda c, x: -x, linear=((0,),))
unary("abs", "|x|", lambda c, x: x.abs())
unary("sign", "sign of x", lambda c, x: x.sign())
unary("exp", "e to the x", lambda c, x: x.exp(), flops=8, dtypes="F")
unary("log", "natural logarithm", lambda c, x: x.log(), flops=8, dtypes="F")
unary("log1p", "log(1 + x)", lambda c, x: x.log1p(), flops=8, dtypes="F")
unary("expm1", "exp(x) - 1", lambda c, x: x.expm1(), flops=8, dtypes="F")
unary("sqrt", "square root", lambda c, x: x.sqrt(), flops=4, dtypes="F")
unary("rsqrt", "1 / sqrt(x)", lambda c, x: x.rsqrt(), flops=4, dtypes="F")
unary("reciprocal", "1 / x", lambda c, x: x.reciprocal(), flops=4, dtypes="F")
unary("sin", "sine", lambda c, x: x.sin(), flops=8, dtypes="F")
unary("cos", "cosine", lambda c, x: x.cos(), flops=8, dtypes="F")
unary("tanh", "hyperbolic tangent", lambda c, x: x.tanh(), flops=8, dtypes="F")
unary("erf", "error function", lambda c, x: x.erf(), flops=8, dtypes="F")
unary("sigmoid", "1 / (1 + exp(-x))", lambda c, x: x.sigmoid(), flops=8, dtypes="F")
unary("relu", "max(x, 0)", lambda c, x: x.relu())
unary("silu", "x * sigmoid(x)", lambda c, x: c.torch.nn.functional.silu(x), flops=9, dtypes="F")
unary("softplus", "log(1 + exp(x))", lambda c, x: c.torch.nn.functional.softplus(x), flops=9, dtypes="F")
unary("gelu", "x * Phi(x); `approximate` is none or tanh",
      lambda c, x: c.torch.nn.functional.gelu(x, approximate=c.attrs["approximate"]),
      flops=12, dtypes="F", attrs={"approximate": AttrSpec("str", "none", doc="none or tanh")})  # fmt: skip
unary("floor", "round down", lambda c, x: x.floor())
unary("ceil", "round up", lambda c, x: x.ceil())
unary("round", "round half to even", lambda c, x: x.round())
unary("logical_not", "not x", lambda c, x: x.logical_not(), types=_like("bool"))
unary("isfinite", "neither infinite nor NaN", lambda c, x: x.isfinite(), types=_like("bool"))
unary("stop_gradient", "x, a constant for differentiation; the frontend removes it afterwards",
      lambda c, x: x, flops=0.0, linear=((0,),))  # fmt: skip
unary("cast", "convert to the result's dtype", lambda c, x: x.to(c.dtype()), linear=((0,),),
      types=None, verify=lambda op: "" if op.operands[0].type.shape == op.result.type.shape
      else "cast keeps the shape")  # fmt: skip

binary("add", "x + y", lambda c, x, y: x + y, linear=((0, 1),))
binary("sub", "x - y", lambda c, x, y: x - y, linear=((0, 1),))
binary("mul", "x * y", lambda c, x, y: x * y, linear=((0,), (1,)))
binary("div", "x / y (true division)", lambda c, x, y: x / y, linear=((0,),), dtypes="F")
binary("floor_divide", "floor(x / y)", lambda c, x, y: x // y)
binary("remainder", "x - y * floor(x / y)", lambda c, x, y: x % y)
binary("pow", "x to the y", lambda c, x, y: x**y, flops_per_point=16)
binary("maximum", "the larger", lambda c, x, y: c.torch.maximum(x, y))
binary("minimum", "the smaller", lambda c, x, y: c.torch.minimum(x, y))
for _name, _doc in (
    ("eq", "x == y"), ("ne", "x != y"), ("lt", "x < y"), ("le", "x <= y"), ("gt", "x > y"),
    ("ge", "x >= y"),
):  # fmt: skip
    binary(_name, _doc, lambda c, x, y, _f=_name: getattr(c.torch, _f)(x, y), types=_like("bool"))
binary("logical_and", "x and y", lambda c, x, y: c.torch.logical_and(x, y), types=_like("bool"))
binary("logical_or", "x or y", lambda c, x, y: c.torch.logical_or(x, y), types=_like("bool"))
binary("bitwise_xor", "x xor y", lambda c, x, y: x ^ y)

define(name="where", family="pointwise", doc="x where the condition holds, else y",
       signature="a..., a..., a... -> a...", ref=lambda c, p, x, y: c.torch.where(p, x, y),
       linear=((1, 2),), types=_like(source=1), dtypes="bT")  # fmt: skip

# Gradients of the ops above that would otherwise take several passes over memory.
binary("gelu_backward", "gradient of gelu: (dy, x) -> dx",
       lambda c, dy, x: c.torch.ops.aten.gelu_backward(dy, x, approximate=c.attrs["approximate"]),
       linear=((0,),), flops_per_point=16,
       attrs={"approximate": AttrSpec("str", "none", doc="none or tanh")})  # fmt: skip
binary("silu_backward", "gradient of silu: (dy, x) -> dx",
       lambda c, dy, x: c.torch.ops.aten.silu_backward(dy, x), linear=((0,),),
       flops_per_point=12)  # fmt: skip
binary("tanh_backward", "gradient of tanh from its result: (dy, y) -> dy * (1 - y * y)",
       lambda c, dy, y: c.torch.ops.aten.tanh_backward(dy, y), linear=((0,),),
       flops_per_point=3)  # fmt: skip
binary("sigmoid_backward", "gradient of sigmoid from its result: (dy, y) -> dy * y * (1 - y)",
       lambda c, dy, y: c.torch.ops.aten.sigmoid_backward(dy, y), linear=((0,),),
       flops_per_point=3)  # fmt: skip
binary("relu_backward", "gradient of relu from its result or operand: 0 where y <= 0, else dy",
       lambda c, dy, y: c.torch.ops.aten.threshold_backward(dy, y, 0), linear=((0,),))  # fmt: skip
