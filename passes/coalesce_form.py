"""Tensors of any shape side by side: the form in which `coalesce` joins them.

What one collective moves of several tensors must lie together on each rank. A tensor that is split
along the dims d, e, ... before or after the collective takes the form [p_d, p_e, ..., rest], where
p_d is the number of parts of dim d: each part is a slice of the leading dims, whatever the tensor's
own shape, so tensors whose leading dims are equal can be joined along `rest`.

    f32[8, 4]{S(0)}, two ranks          -> f32[2, 16]{S(0)}
    f32[3, 6]{S(1)}, two ranks          -> [3, 2, 3] -> [2, 3, 3] -> f32[2, 9]{S(0)}
    f32[8, 4]{P(sum)}, summed for all   -> f32[32]{P(sum)}
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from ..ir.module import Attr, Namer, Op, Value
from ..ir.opdef import signature_of
from ..ir.types import B, Mesh, Placement, S, TensorType
from .reshard import Placements


class Stage(NamedTuple):
    """A shape on the way to a form: where the split dims are in it, and the order of the last
    shape's dims that leads to it, () for a reshape."""

    shape: tuple[int, ...]
    places: tuple[int, ...]
    order: tuple[int, ...] = ()


@dataclass(frozen=True)
class Form:
    """How tensors are joined.

    Attributes:
        dims: the dims that are split before or after the collective, in order.
        parts: of each the number of its parts.
    """

    dims: tuple[int, ...]
    parts: tuple[int, ...]

    def stages(self, shape: Sequence[int]) -> list[Stage]:
        """The shapes from a tensor's own to that of its form."""
        cut: list[int] = []
        front: list[int] = []
        for dim, size in enumerate(shape):
            if dim in self.dims:
                front.append(len(cut))
                parts = self.parts[self.dims.index(dim)]
                cut += [parts, size // parts]
            else:
                cut.append(size)
        order = (*front, *(place for place in range(len(cut)) if place not in front))
        first = tuple(range(len(self.dims)))
        out = [Stage(tuple(shape), self.dims)]
        if order != tuple(range(len(cut))):
            out.append(Stage(tuple(cut), tuple(front)))
            out.append(Stage(tuple(cut[place] for place in order), first, order))
        final = (*self.parts, prod(shape) // prod(self.parts))
        if final != out[-1].shape:
            out.append(Stage(final, first))
        return out

    def placed(self, placement: Sequence[Placement], places: Sequence[int]) -> Placements:
        """The tensor's placement at a stage."""
        return tuple(
            S(places[self.dims.index(entry.dim)]) if entry.kind == "S" else entry
            for entry in placement
        )

    def leading(self, placement: Sequence[Placement]) -> Placements:
        """The tensor's placement in its form."""
        return self.placed(placement, range(len(self.dims)))


def form_of(op: Op, mesh: Mesh) -> Form | None:
    """The form for a collective of one operand; None where its shards are uneven."""
    axes: dict[int, set[int]] = {}
    for type in (op.operands[0].type, op.results[0].type):
        for axis, entry in enumerate(type.placement or ()):
            if entry.kind == "S":
                axes.setdefault(entry.dim, set()).add(axis)
    dims = tuple(sorted(axes))
    parts = tuple(prod(mesh.sizes[axis] for axis in axes[dim]) for dim in dims)
    shape = op.operands[0].type.shape
    even = all(shape[dim] % count == 0 for dim, count in zip(dims, parts, strict=True))
    return Form(dims, parts) if even else None


class Former:
    """Writes the ops that join tensors and part them again behind `out`."""

    def __init__(self, mesh: Mesh, namer: Namer, out: list[Op]) -> None:
        self.mesh, self.namer, self.out = mesh, namer, out

    def join(self, members: Sequence[tuple[Op, Form]]) -> None:
        """One collective in the place of several, whose forms differ in their last dim only."""
        first, form = members[0]
        parts = [self._into(op, own) for op, own in members]
        total = sum(value.type.shape[-1] for value in parts)
        ends = [
            TensorType(value.type.dtype, (*form.parts, total), form.leading(value.type.placement or ()))
            for value in (first.operands[0], first.results[0])
        ]  # fmt: skip
        last: dict[str, Attr] = {"dim": len(form.parts)}
        bucket = self._emit("concat", parts, ends[0], "bucket", last, first)
        attrs = dict(first.attrs)
        if "dim" in attrs:
            attrs["dim"] = form.dims.index(int(attrs["dim"]))  # type: ignore[arg-type]
        whole = Value(self.namer("bucket_r"), ends[1])
        self.out.append(first.with_(operands=(bucket,), results=(whole,), attrs=attrs))
        start = 0
        for (op, own), value in zip(members, parts, strict=True):
            stop = start + value.type.shape[-1]
            self._back(whole, {**last, "start": start, "stop": stop}, op, own)
            start = stop

    def _into(self, op: Op, form: Form) -> Value:
        """The operand of an op in its form."""
        value = held = op.operands[0]
        for stage in form.stages(held.type.shape)[1:]:
            placement = form.placed(held.type.placement or (), stage.places)
            value = self._emit(
                "permute" if stage.order else "reshape", [value],
                TensorType(held.type.dtype, stage.shape, placement), f"{held.name}_flat",
                {"dims": stage.order} if stage.order else {}, op,
            )  # fmt: skip
        return value

    def _back(self, whole: Value, cut: dict[str, Attr], op: Op, form: Form) -> None:
        """The result of an op, cut out of that of all."""
        result = op.results[0]
        stages = form.stages(result.type.shape)
        value = whole
        for index in reversed(range(len(stages))):
            stage, last = stages[index], index == len(stages) - 1
            type = TensorType(result.type.dtype, stage.shape,
                              form.placed(result.type.placement or (), stage.places))  # fmt: skip
            order = () if last else stages[index + 1].order
            attrs: dict[str, Attr] = cut if last else {}
            if order:
                attrs = {"dims": tuple(order.index(place) for place in range(len(order)))}
            name = "slice" if last else "permute" if order else "reshape"
            hint = "part" if index else ""
            value = self._emit(name, [value], type, hint, attrs, op, None if index else result)

    def _emit(
        self, name: str, operands: Sequence[Value], type: TensorType, hint: str,
        attrs: dict[str, Attr], like: Op, result: Value | None = None,
    ) -> Value:  # fmt: skip
        """An op whose split follows from the placements of its operands and its result."""
        result = result or Value(self.namer(hint), type)
        op = Op(name, tuple(operands), (result,), attrs, {}, like.loc)
        self.out.append(op.with_(split=self._split(op)))
        return result

    def _split(self, op: Op) -> dict[str, str]:
        signature, result = signature_of(op), op.results[0].type
        held, made = op.operands[0].type.placement or (), result.placement or ()
        out = {}
        for axis, before, after in zip(self.mesh.names, held, made, strict=True):
            if before.kind == "P":
                out[axis] = f"partial({', '.join(str(i) for i in range(len(op.operands)))})"
            elif before != B:
                out[axis] = next(
                    name for name in signature.states
                    if not name.startswith("partial(")
                    and signature.position(signature.operands[0], name) == before.dim
                    and signature.position(signature.results[0], name) == after.dim
                )  # fmt: skip
        return out


__all__ = ["Form", "Former", "Stage", "form_of"]
