"""ATen entries: creation, random numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..ir.module import Value
from ..ir.types import FLOATS, TensorType
from .aten import Lowering, Number, Operand, aten


def _iota(c: Lowering, type: TensorType, dim: int, start: Number, step: Number) -> Value:
    return c.emit("iota", [], {"dim": dim, "start": start, "step": step}, type)


@aten("arange.start_step", "arange.start")
def arange(c: Lowering, start: Number, end: Number, step: Number = 1, **_: Any) -> Value:
    return _iota(c, c.out, 0, start, step)


@aten("arange.default")
def arange_end(c: Lowering, end: Number, **_: Any) -> Value:
    return _iota(c, c.out, 0, 0, 1)


@aten("full.default", "full_like.default", "new_full.default")
def full(c: Lowering, like: Any, value: Any, *rest: Any, **_: Any) -> Value:
    value = rest[0] if rest else value  # new_full(x, size, value)
    if isinstance(value, Value):
        return c.expand(c.cast(value, c.out.dtype), c.out.shape)
    return c.constant(value, c.out.dtype, c.out.shape)


@aten("zeros.default", "zeros_like.default", "new_zeros.default", "empty.memory_format",
      "empty_like.default", "new_empty.default", "empty_strided.default",
      "new_empty_strided.default", "empty_permuted.default")  # fmt: skip
def zeros(c: Lowering, *_: Any, **__: Any) -> Value:
    return c.constant(0, c.out.dtype, c.out.shape)


@aten("ones.default", "ones_like.default", "new_ones.default")
def ones(c: Lowering, *_: Any, **__: Any) -> Value:
    return c.constant(1, c.out.dtype, c.out.shape)


@aten("scalar_tensor.default")
def scalar_tensor(c: Lowering, value: Number, **_: Any) -> Value:
    return c.constant(value, c.out.dtype)


@aten("fill.Scalar", "fill.Tensor")
def fill(c: Lowering, x: Value, value: Operand) -> Value:
    return full(c, x, value)  # type: ignore[no-any-return]


def _triangle(c: Lowering, x: Value, keep: str, diagonal: int) -> Value:
    shape = x.type.shape
    rows = _iota(c, TensorType("i64", (shape[-2], 1)), 0, diagonal, 1)
    columns = _iota(c, TensorType("i64", (1, shape[-1])), 1, 0, 1)
    return c.emit("where", [c.emit(keep, [columns, rows]), x, c.constant(0, x.type.dtype)])


@aten("tril.default")
def tril(c: Lowering, x: Value, diagonal: int = 0) -> Value:
    return _triangle(c, x, "le", diagonal)


@aten("triu.default")
def triu(c: Lowering, x: Value, diagonal: int = 0) -> Value:
    return _triangle(c, x, "ge", diagonal)


@aten("eye.default", "eye.m")
def eye(c: Lowering, *_: Any, **__: Any) -> Value:
    rows, columns = c.out.shape
    left = _iota(c, TensorType("i64", (rows, 1)), 0, 0, 1)
    right = _iota(c, TensorType("i64", (1, columns)), 1, 0, 1)
    return c.cast(c.emit("eq", [left, right]), c.out.dtype)


@aten("native_dropout.default")
def native_dropout(c: Lowering, x: Value, p: float, train: bool | None) -> tuple[Any, Any]:
    if not train or p == 0:
        return x, c.constant(True, "bool", x.type.shape)
    if 1 not in c.users:
        return c.emit("dropout", [x, c.seed()], {"p": p}), None
    kept = c.emit("dropout", [c.constant(1, "f32", x.type.shape), c.seed()], {"p": p})
    return c.emit("mul", [x, c.cast(kept, x.type.dtype)]), c.apply("ne", kept, 0)


@aten("dropout.default")
def dropout(c: Lowering, x: Value, p: float, train: bool) -> Value:
    return c.emit("dropout", [x, c.seed()], {"p": p}) if train and p else x


def _uniform(c: Lowering, dtype: str, shape: Sequence[int]) -> Value:
    return c.emit("uniform", [c.seed()], type=TensorType(dtype, tuple(shape)))


@aten("rand.default", "rand_like.default")
def rand(c: Lowering, *_: Any, **__: Any) -> Value:
    return _uniform(c, c.out.dtype, c.out.shape)


@aten("randn.default", "randn_like.default")
def randn(c: Lowering, *_: Any, **__: Any) -> Value:
    return c.emit("normal", [c.seed()], type=c.out)


@aten("uniform.default")
def uniform(c: Lowering, x: Value, low: float = 0.0, high: float = 1.0, **_: Any) -> Value:
    sample = _uniform(c, c.out.dtype, c.out.shape)
    return c.apply("add", c.apply("mul", sample, high - low), low)


@aten("normal_functional.default")
def normal(c: Lowering, x: Value, mean: float = 0.0, std: float = 1.0, **_: Any) -> Value:
    sample = c.emit("normal", [c.seed()], type=c.out)
    return c.apply("add", c.apply("mul", sample, std), mean)


@aten("bernoulli.p")
def bernoulli_p(c: Lowering, x: Value, p: float = 0.5, **_: Any) -> Value:
    return c.cast(c.apply("lt", _uniform(c, "f32", c.out.shape), p), c.out.dtype)


@aten("bernoulli.default")
def bernoulli(c: Lowering, p: Value, **_: Any) -> Value:
    sample = _uniform(c, p.type.dtype if p.type.dtype in FLOATS else "f32", p.type.shape)
    return c.cast(c.emit("lt", [sample, p]), c.out.dtype)


@aten("randint.low", "randint.default")
def randint(c: Lowering, *args: Any, **_: Any) -> Value:
    low, high = (args[0], args[1]) if not isinstance(args[1], (list, tuple)) else (0, args[0])
    sample = c.apply("mul", _uniform(c, "f64", c.out.shape), high - low)
    return c.apply("add", c.cast(c.emit("floor", [sample]), c.out.dtype), low)
