"""Coalesce: gradients that are small next to a collective's start-up time are reduced together.

A collective costs a start-up time and a time per byte. Two of them cost the start-up twice; joined,
once. What is joined waits for the last of its members, so only as much is joined as keeps the
start-up small, and only where no member's result is read before the last member is there: for
gradients the readers are the updates at the end of a step. Data-parallel training in torch does the
same with buckets of a fixed size (Li et al., PyTorch Distributed, VLDB 2020).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import ClassVar

from ..ir.module import Function, Module, Namer, Op, Value
from ..ir.types import DTYPES, B, Mesh, Placement, TensorType
from .base import Pass
from .lower import module_cost
from .reshard import StepCost

#: A bucket takes so many bytes that its transfer lasts so many start-ups: from there on more saves
#: less than 1 / 8 of the time, and less of it could overlap with the backward.
STARTUPS = 8
#: sizes from which the line through a collective's times is taken, in bytes
_EMPTY, _FULL = 4, 1 << 24


@dataclass(frozen=True)
class Coalesce(Pass):
    """Small all_reduces of the entry that nothing reads in between become one.

    before:  %g = all_reduce(%dw) {axis = "dp"} : f32[8, 4]{B}
             %h = all_reduce(%db) {axis = "dp"} : f32[4]{B}
    after:   %dw_flat = reshape(%dw) split [dp = partial(0)] : f32[32]{P(sum)}
             %bucket = concat(%dw_flat, %db) {dim = 0} split [dp = partial(0, 1)] : f32[36]{P(sum)}
             %sum = all_reduce(%bucket) {axis = "dp"} : f32[36]{B}
             %part = slice(%sum) {dim = 0, start = 0, stop = 32} : f32[32]{B}
             %g = reshape(%part) : f32[8, 4]{B}
             %h = slice(%sum) {dim = 0, start = 32, stop = 36} : f32[4]{B}

    Members have the same dtype and placements and are whole on the other axes: shards of a dim do
    not lie behind each other in a flat tensor.
    """

    name: ClassVar[str] = "coalesce"
    summary: ClassVar[str] = "small reductions of gradients are joined"
    levels: ClassVar[tuple[str, ...]] = ("spmd",)

    def run(self, module: Module) -> Module:
        """The module with fewer collectives."""
        mesh = module.mesh or Mesh()
        cost = module_cost(module)
        limits = {name: bucket_bytes(cost, size, name) for name, size in mesh.axes if size > 1}
        entry = _Coalescing(module.entry, mesh, limits).run()
        return module.with_(functions=(entry, *module.functions[1:]))


def bucket_bytes(cost: StepCost, ranks: int, axis: str) -> float:
    """How much is joined: `STARTUPS` times what moves in the time of a start-up."""
    startup = cost("all_reduce", _EMPTY, ranks, axis)
    per_byte = (cost("all_reduce", _FULL, ranks, axis) - startup) / _FULL
    return STARTUPS * startup / per_byte if per_byte > 0 else 0.0


@dataclass
class _Bucket:
    """All_reduces to be joined, by index of their ops."""

    members: list[int]
    bytes: int
    ready: int  #: index of the op that makes the last operand
    due: int  #: index of the first op that reads a result


class _Coalescing:
    """Works on one function."""

    def __init__(self, function: Function, mesh: Mesh, limits: dict[str, float]) -> None:
        self.function, self.mesh, self.limits = function, mesh, limits
        names = [v.name for v in function.params] + [r.name for o in function.ops for r in o.results]
        self.namer = Namer(tuple(names))

    def run(self) -> Function:
        """The function with buckets in the place of their members."""
        behind: dict[int, list[Op]] = {}  # new ops, behind the op at an index
        gone: set[int] = set()
        for bucket in self._buckets():
            if len(bucket.members) > 1:
                gone.update(bucket.members)
                behind.setdefault(bucket.ready, []).extend(self._joined(bucket))
        if not gone:
            return self.function
        ops = list(behind.get(-1, ()))
        for index, op in enumerate(self.function.ops):
            if index not in gone:
                ops.append(op)
            ops += behind.get(index, ())
        return self.function.with_(ops=tuple(ops))

    def _buckets(self) -> Iterator[_Bucket]:
        ops = self.function.ops
        made = {value.name: index for index, op in enumerate(ops) for value in op.results}
        due = {value.name: len(ops) for value in self.function.results}
        for index in reversed(range(len(ops))):
            due.update((value.name, index) for value in ops[index].operands)
        found = [index for index, op in enumerate(ops) if self._small(op)]
        found.sort(key=lambda index: made.get(ops[index].operands[0].name, -1))
        open: dict[object, _Bucket] = {}
        for index in found:
            op, type = ops[index], ops[index].operands[0].type
            size = prod(type.shape) * DTYPES[type.dtype]
            ready = made.get(op.operands[0].name, -1)
            first = due.get(op.results[0].name, len(ops))
            key = (op.attrs["axis"], type.dtype, type.placement)
            bucket = open.get(key)
            limit = self.limits[str(op.attrs["axis"])]
            if bucket and ready < min(bucket.due, first) and bucket.bytes + size <= limit:
                bucket.members.append(index)
                bucket.bytes, bucket.ready = bucket.bytes + size, ready
                bucket.due = min(bucket.due, first)
            else:
                if bucket:
                    yield bucket
                open[key] = _Bucket([index], size, ready, first)
        yield from open.values()

    def _small(self, op: Op) -> bool:
        """May an op be joined with others?"""
        if op.name != "all_reduce" or op.attrs.get("combine", "sum") != "sum":
            return False
        type, axis = op.operands[0].type, str(op.attrs["axis"])
        split = any(placement.kind == "S" for placement in type.placement or ())
        bytes = prod(type.shape) * DTYPES[type.dtype]
        return not split and 0 < bytes <= self.limits.get(axis, 0.0) / 2

    def _joined(self, bucket: _Bucket) -> list[Op]:
        members = [self.function.ops[index] for index in bucket.members]
        first, out = members[0], []  # type: Op, list[Op]
        flat = [self._flat(op.operands[0], op, out) for op in members]
        total = sum(value.type.shape[0] for value in flat)
        held = _one_dim(first.operands[0].type, total)
        summed = _one_dim(first.results[0].type, total)
        joined, whole = Value(self.namer("bucket"), held), Value(self.namer("bucket_r"), summed)
        split = self._partial(held, range(len(flat)))
        out.append(Op("concat", tuple(flat), (joined,), {"dim": 0}, split, first.loc))
        out.append(first.with_(operands=(joined,), results=(whole,)))
        start = 0
        for op, value in zip(members, flat, strict=True):
            stop = start + value.type.shape[0]
            self._part(whole, start, stop, op, out)
            start = stop
        return out

    def _flat(self, value: Value, op: Op, out: list[Op]) -> Value:
        """A value in one dim."""
        type = value.type
        if len(type.shape) == 1:
            return value
        flat = Value(self.namer(f"{value.name}_flat"), _one_dim(type, prod(type.shape)))
        out.append(Op("reshape", (value,), (flat,), {}, self._partial(type, (0,)), op.loc))
        return flat

    def _part(self, whole: Value, start: int, stop: int, op: Op, out: list[Op]) -> None:
        """A member's result, cut out of the sum of all."""
        (result,), type = op.results, op.results[0].type
        flat = len(type.shape) == 1
        cut = result if flat else Value(self.namer("part"), _one_dim(type, stop - start))
        attrs, split = {"dim": 0, "start": start, "stop": stop}, self._partial(type, (0,))
        out.append(Op("slice", (whole,), (cut,), attrs, split, op.loc))
        if not flat:
            out.append(Op("reshape", (cut,), (result,), {}, split, op.loc))

    def _partial(self, type: TensorType, operands: Sequence[int]) -> dict[str, str]:
        """The split of an op that passes partial sums through."""
        state = f"partial({', '.join(map(str, operands))})"
        placements: tuple[Placement, ...] = type.placement or (B,) * len(self.mesh.axes)
        pairs = zip(self.mesh.names, placements, strict=True)
        return {axis: state for axis, placement in pairs if placement.kind == "P"}


def _one_dim(type: TensorType, size: int) -> TensorType:
    return replace(type, shape=(size,))
