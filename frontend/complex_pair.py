"""Complex numbers as pairs of real values: the IR has none, rotary embeddings often do.

An operator that treats both parts alike (a view, a sum) runs its real entry on each; one that is
linear in two operands (a product) runs it on the four combinations of parts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..ir.module import Value
from ..ir.types import TensorType
from ..runtime.context import WEFT_DTYPES

#: complex dtype -> dtype of its parts
PARTS = {torch.complex64: torch.float32, torch.complex128: torch.float64}
#: an ATen operator on real values: its arguments -> its result
Real = Callable[..., Any]

_ALIKE = frozenset(f"aten.{name}" for name in (
    "view.default", "_unsafe_view.default", "reshape.default", "unsqueeze.default",
    "squeeze.default", "squeeze.dim", "squeeze.dims", "flatten.using_ints", "permute.default",
    "transpose.int", "t.default", "expand.default", "slice.Tensor", "select.int", "clone.default",
    "alias.default", "cat.default", "index.Tensor", "index_select.default", "sum.default",
    "sum.dim_IntList", "mean.default", "mean.dim", "neg.default", "add.Tensor", "sub.Tensor",
    "repeat.default", "contiguous.default", "split.Tensor", "split_with_sizes.default",
)) | {"weft.stop_gradient.default"}  # fmt: skip
_BILINEAR = frozenset(
    ("aten.mul.Tensor", "aten.mm.default", "aten.bmm.default", "aten.matmul.default")
)


@dataclass(frozen=True)
class Pair:
    """A complex value: its real and imaginary parts, of equal types."""

    re: Value
    im: Value


def is_complex(value: Any) -> bool:
    """Is a traced tensor, or one of several, complex?"""
    items = value if isinstance(value, (tuple, list)) else (value,)
    return any(isinstance(item, torch.Tensor) and item.dtype in PARTS for item in items)


def part_types(value: Any) -> tuple[TensorType, ...]:
    """The types of the parts of a traced tensor, or of each of several."""
    items = value if isinstance(value, (tuple, list)) else (value,)
    return tuple(
        TensorType(WEFT_DTYPES[PARTS.get(item.dtype, item.dtype)], tuple(item.shape))
        for item in items
    )


def lower_complex(
    c: Any, real: Real, target: str, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    """The result of an operator that reads or gives complex values; None where it has no rule.

    Args:
        c: the `Lowering`.
        real: calls the operator's real entry.
    """
    if target in _CALLS:
        return _CALLS[target](c, *args)
    if target in _ALIKE:
        re, im = (real(*_parts(c, args, part), **kwargs) for part in ("re", "im"))
        if isinstance(re, (list, tuple)):
            return tuple(map(Pair, re, im))
        return Pair(re, im)
    if target in _BILINEAR:
        return _product(c, real, *args)
    return None


def _parts(c: Any, item: Any, part: str) -> Any:
    """An argument with each complex value replaced by one of its parts."""
    if isinstance(item, Pair):
        return getattr(item, part)
    if isinstance(item, (list, tuple)):
        return [_parts(c, entry, part) for entry in item]
    if part == "im" and isinstance(item, Value) and item.type.dtype in ("f32", "f64"):
        return c.constant(0, item.type.dtype, item.type.shape)  # a real number among complex ones
    return item


def _product(c: Any, real: Real, x: Any, y: Any) -> Pair:
    if not isinstance(x, Pair):
        return Pair(real(x, y.re), real(x, y.im))
    if not isinstance(y, Pair):
        return Pair(real(x.re, y), real(x.im, y))
    re = c.emit("sub", [real(x.re, y.re), real(x.im, y.im)])
    return Pair(re, c.emit("add", [real(x.re, y.im), real(x.im, y.re)]))


def split(c: Any, x: Value) -> Pair:
    """The pair whose parts lie in the last dim of a value."""
    last, shape = len(x.type.shape) - 1, x.type.shape[:-1]
    re, im = (c.reshape(c.slice(x, last, i, i + 1), shape) for i in (0, 1))
    return Pair(re, im)


def _join(c: Any, x: Pair) -> Any:
    column = (*x.re.type.shape, 1)
    parts = [c.reshape(x.re, column), c.reshape(x.im, column)]
    return c.emit("concat", parts, {"dim": len(column) - 1})


def _polar(c: Any, size: Value, angle: Value) -> Pair:
    re, im = (c.emit("mul", [size, c.emit(how, [angle])]) for how in ("cos", "sin"))
    return Pair(re, im)


def _exp(c: Any, x: Pair) -> Pair:
    return _polar(c, c.emit("exp", [x.re]), x.im)


def _abs(c: Any, x: Pair) -> Any:
    squares = [c.emit("mul", [part, part]) for part in (x.re, x.im)]
    return c.emit("sqrt", [c.emit("add", squares)])


def _conjugate(c: Any, x: Pair) -> Pair:
    return Pair(x.re, c.emit("neg", [x.im]))


_CALLS: dict[str, Callable[..., Any]] = {
    "aten.view_as_complex.default": split,
    "aten.view_as_real.default": _join,
    "aten.polar.default": _polar,
    "aten.complex.default": lambda c, re, im: Pair(re, im),
    "aten.real.default": lambda c, x: x.re,
    "aten.imag.default": lambda c, x: x.im,
    "aten.exp.default": _exp,
    "aten.abs.default": _abs,
    "aten._conj.default": _conjugate,
    "aten.conj_physical.default": _conjugate,
}
