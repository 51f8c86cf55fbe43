"""Building functions op by op: fresh names, result types from the op table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .module import NOWHERE, Attr, Function, Location, Namer, Op, Value
from .opdef import full_attrs
from .ops import OPS
from .types import TensorType


def infer_types(
    name: str, operands: Sequence[TensorType], attrs: Mapping[str, Attr]
) -> tuple[TensorType, ...]:
    """Result types of an op, without placements.

    Raises ValueError where the op table has no rule: reshape, expand, cast, constants, gradients of
    windows, collectives and calls take their result types from their maker.
    """
    rule = OPS[name].types
    if rule is None:
        raise ValueError(f"{name}: the result types have to be given")
    return tuple(rule(tuple(operands), full_attrs(name, attrs)))


class Builder:
    """Appends ops to a function under construction.

    b = Builder()
    x = b.param(TensorType("f32", (8, 4)), "x", role="input")
    y = b.one("neg", [x])
    f = b.function("main", [y], [{"role": "output"}])

    Args:
        namer: hands out value names; give one that knows the names already in use when a pass
            rewrites a function.
    """

    def __init__(self, namer: Namer | None = None) -> None:
        self.namer = namer or Namer()
        self.params: list[Value] = []
        self.param_attrs: list[Mapping[str, Attr]] = []
        self.ops: list[Op] = []

    def param(self, type: TensorType, hint: str = "", **attrs: Attr) -> Value:
        """Add a parameter."""
        value = Value(self.namer(hint), type)
        self.params.append(value)
        self.param_attrs.append(attrs)
        return value

    def append(self, op: Op) -> tuple[Value, ...]:
        """Add an op that exists already; its result names must be free. Returns its results."""
        self.ops.append(op)
        return op.results

    def many(
        self,
        name: str,
        operands: Sequence[Value],
        attrs: Mapping[str, Attr] | None = None,
        *,
        types: Sequence[TensorType] | None = None,
        loc: Location = NOWHERE,
        split: Mapping[str, str] | None = None,
        hint: str = "",
    ) -> tuple[Value, ...]:
        """Append an op and return its results.

        Args:
            types: result types; inferred, without placements, when absent.
            hint: what the results are called, if that is still free.

        Raises:
            KeyError: no such op.
            ValueError: the types have to be given.
        """
        attrs = dict(attrs or {})
        if types is None:
            types = infer_types(name, [value.type for value in operands], attrs)
        results = tuple(Value(self.namer(hint), type) for type in types)
        self.ops.append(Op(name, tuple(operands), results, attrs, dict(split or {}), loc))
        return results

    def one(self, name: str, operands: Sequence[Value], *args: Any, **kwargs: Any) -> Value:
        """`many` for an op with one result. Raises ValueError for others."""
        (value,) = self.many(name, operands, *args, **kwargs)
        return value

    def op(self, name: str, operands: Sequence[Value], *args: Any, **kwargs: Any) -> Any:
        """`many`, but the result itself where there is one."""
        results = self.many(name, operands, *args, **kwargs)
        return results[0] if len(results) == 1 else results

    def constant(
        self, value: bool | int | float, type: TensorType, loc: Location = NOWHERE
    ) -> Value:
        """A tensor filled with a number."""
        return self.one("constant", [], {"value": value}, types=[type], loc=loc)

    def function(
        self,
        name: str,
        results: Iterable[Value],
        result_attrs: Iterable[Mapping[str, Attr]] = (),
        attrs: Mapping[str, Attr] | None = None,
    ) -> Function:
        """The finished function."""
        return Function(
            name, tuple(self.params), tuple(self.ops), tuple(results), tuple(self.param_attrs),
            tuple(result_attrs), dict(attrs or {}),
        )  # fmt: skip
