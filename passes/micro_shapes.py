"""A program for one micro-batch: the types of the values that are parts of the batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from ..ir.module import Attr, Function, Op, Value
from ..ir.opdef import OPS, signature_of
from ..ir.types import B, Placement, TensorType


def part_type(type: TensorType, placement: Placement, rows: int, batch: int) -> TensorType:
    """The type of a part of the batch with `rows` of its rows."""
    if placement.kind != "S":
        return type
    shape = list(type.shape)
    shape[placement.dim] = shape[placement.dim] * rows // batch
    return replace(type, shape=tuple(shape))


def sized(
    function: Function,
    held: Mapping[str, Placement],
    states: Sequence[str],
    rows: int,
    batch: int,
) -> Function:
    """A function on a micro-batch of `rows` of the batch's rows, the first ones.

    Ops whose values depend on their position say which part of the whole op they are
    (`part`); see `at_row` for other micro-batches.
    """
    values: dict[str, Value] = {}

    def value(v: Value) -> Value:
        if v.name not in values:
            values[v.name] = Value(v.name, part_type(v.type, held.get(v.name, B), rows, batch))
        return values[v.name]

    def op(o: Op, state: str) -> Op:
        attrs = dict(o.attrs)
        if state and "part" in OPS[o.name].attrs and rows != batch:
            attrs["part"] = (state, 0, signature_of(o).size(state))
        return o.with_(
            operands=tuple(map(value, o.operands)), results=tuple(map(value, o.results)), attrs=attrs
        )

    return function.with_(
        params=tuple(map(value, function.params)),
        ops=tuple(op(o, s) for o, s in zip(function.ops, states, strict=True)),
        results=tuple(map(value, function.results)),
    )


def at_row(row: int, batch: int) -> Callable[[Op], Op]:
    """Makes ops of the first micro-batch those of the one that begins at a row of the batch."""

    def moved(op: Op) -> Op:
        part = op.attrs.get("part")
        if not isinstance(part, tuple) or not part:
            return op
        name, _, total = part
        first: Attr = int(total) * row // batch  # type: ignore[arg-type]
        return op.with_(attrs={**op.attrs, "part": (name, first, total)})

    return moved


__all__ = ["at_row", "part_type", "sized"]
