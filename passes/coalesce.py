"""Coalesce: collectives that are small next to their start-up time are done together.

A collective costs a start-up time and a time per byte. Two of them cost the start-up twice; joined,
once. What is joined waits for the last of its members, so only as much is joined as keeps the
start-up small, and only where no member's result is read before the last member is there: for
gradients the readers are the updates at the end of a step, parameters are there from its beginning.
Data-parallel training in torch does the same with buckets of a fixed size (Li et al., PyTorch
Distributed, VLDB 2020).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from ..ir.module import Function, Module, Namer, Op
from ..ir.types import Mesh, local_bytes
from .base import Pass
from .coalesce_form import Form, Former, form_of
from .joined import STARTUPS, bucket_bytes, is_small, updates_last
from .lower import module_cost
from .reshard import StepCost

#: (collective, axis) -> bytes that a bucket takes
Limits = Mapping[tuple[str, str], float]


@dataclass(frozen=True)
class Coalesce(Pass):
    """Small collectives of the entry that nothing reads in between become one.

    before:  %g = all_reduce(%dw) {axis = "dp"} : f32[8, 4]{B}
             %h = all_reduce(%db) {axis = "dp"} : f32[4]{B}
    after:   %dw_flat = reshape(%dw) split [dp = partial(0)] : f32[32]{P(sum)}
             %bucket = concat(%dw_flat, %db) {dim = 0} split [dp = partial(0, 1)] : f32[36]{P(sum)}
             %sum = all_reduce(%bucket) {axis = "dp"} : f32[36]{B}
             %part = slice(%sum) {dim = 0, start = 0, stop = 32} : f32[32]{B}
             %g = reshape(%part) : f32[8, 4]{B}
             %h = slice(%sum) {dim = 0, start = 32, stop = 36} : f32[4]{B}

    So are reduce_scatters and all_gathers, whose members take a form with their parts in front
    (`coalesce_form`). Members have the same dtype, and are split into as many parts by the same axes.
    Uneven shards are left alone.
    """

    name: ClassVar[str] = "coalesce"
    summary: ClassVar[str] = "small collectives of gradients and parameters are joined"
    levels: ClassVar[tuple[str, ...]] = ("spmd",)

    def run(self, module: Module) -> Module:
        """The module with fewer collectives."""
        mesh = module.mesh or Mesh()
        entry = module.entry.with_(ops=updates_last(module))
        entry = coalesced(entry, mesh, limits_of(mesh, module_cost(module)))
        return module.with_(functions=(entry, *module.functions[1:]))


def limits_of(mesh: Mesh, cost: StepCost) -> Limits:
    """How much is joined, for each collective on each axis."""
    return {
        (name, axis): bucket_bytes(cost, name, size, axis)
        for axis, size in mesh.axes if size > 1 for name in STARTUPS
    }  # fmt: skip


def coalesced(function: Function, mesh: Mesh, limits: Limits) -> Function:
    """A function with buckets in the place of their members."""
    work = _Coalescing(function, mesh, limits)
    while work.round():
        pass
    return work.function


class _Member(NamedTuple):
    """A small collective: its place, bytes, form, and what it shares with what it is joined with."""

    at: int
    bytes: int
    form: Form
    key: object
    ready: int  #: index of the op that makes its operand, -1 for a parameter
    due: int  #: index of the first op that reads its result


@dataclass
class _Bucket:
    """Members to be joined: behind the last one's operand, ahead of the first one's reader."""

    members: list[_Member]

    def takes(self, member: _Member, limit: float) -> bool:
        """Is there room and time for one more? It is not ready before the others."""
        due = min(found.due for found in (*self.members, member))
        held = sum(found.bytes for found in (*self.members, member))
        return member.ready < due and held <= limit


class _Coalescing:
    """Works on one function, in rounds: what reads a small collective's result waits for the next,
    because a joined result is there later than its own would have been."""

    def __init__(self, function: Function, mesh: Mesh, limits: Limits) -> None:
        self.function, self.mesh, self.limits = function, mesh, limits
        names = [v.name for v in function.params] + [r.name for o in function.ops for r in o.results]
        self.namer = Namer(tuple(names))
        self.done: set[str] = set()  #: results of collectives that earlier rounds saw

    def round(self) -> bool:
        """Join what is not read by another small collective; False when all have been seen."""
        members = self._members()
        if not members:
            return False
        ops = self.function.ops
        self.done.update(ops[member.at].results[0].name for member in members)
        behind: dict[int, list[Op]] = {}  # new ops, behind the op at an index
        gone: set[int] = set()
        for bucket in self._buckets(members):
            if len(bucket.members) > 1:
                gone.update(member.at for member in bucket.members)
                out = behind.setdefault(bucket.members[-1].ready, [])
                found = [(ops[member.at], member.form) for member in bucket.members]
                Former(self.mesh, self.namer, out).join(found)
        joined = list(behind.get(-1, ()))
        for index, op in enumerate(ops):
            if index not in gone:
                joined.append(op)
            joined += behind.get(index, ())
        self.function = self.function.with_(ops=tuple(joined))
        return True

    def _members(self) -> list[_Member]:
        """Small collectives whose operand no other one makes, in the order of their operands."""
        ops = self.function.ops
        made = {value.name: index for index, op in enumerate(ops) for value in op.results}
        due = {value.name: len(ops) for value in self.function.results}
        for index in reversed(range(len(ops))):
            due.update((value.name, index) for value in ops[index].operands)
        small = {}
        for index, op in enumerate(ops):
            form = self._form(op)
            if form is not None and op.results[0].name not in self.done:
                small[op.results[0].name] = index, form
        out = []
        for name, (index, form) in small.items():
            op = ops[index]
            if op.operands[0].name not in small:
                out.append(_Member(
                    index, local_bytes(op.operands[0].type, self.mesh), form, self._key(op, form),
                    made.get(op.operands[0].name, -1), due.get(name, len(ops)),
                ))  # fmt: skip
        return sorted(out, key=lambda member: member.ready)

    def _form(self, op: Op) -> Form | None:
        """The form in which an op can be joined with others; None where it cannot."""
        if op.name not in STARTUPS or op.attrs.get("combine", "sum") != "sum":
            return None
        type, result = op.operands[0].type, op.results[0].type
        if any(p.combine not in ("", "sum") for p in (*(type.placement or ()), *(result.placement or ()))):
            return None
        limit = self.limits.get((op.name, str(op.attrs["axis"])), 0.0)
        return form_of(op, self.mesh) if is_small(local_bytes(type, self.mesh), limit) else None

    def _key(self, op: Op, form: Form) -> object:
        """What members of a bucket have in common."""
        ends = (value.type.placement or () for value in (op.operands[0], op.results[0]))
        return (op.name, op.attrs["axis"], op.operands[0].type.dtype, form.parts, *map(form.leading, ends))

    def _buckets(self, members: list[_Member]) -> Iterator[_Bucket]:
        open: dict[object, _Bucket] = {}
        for member in members:
            op = self.function.ops[member.at]
            bucket = open.get(member.key)
            limit = self.limits[op.name, str(op.attrs["axis"])]
            if bucket is not None and bucket.takes(member, limit):
                bucket.members.append(member)
                continue
            if bucket is not None:
                yield bucket
            open[member.key] = _Bucket([member])
        yield from open.values()


__all__ = ["Coalesce", "Limits", "coalesced", "limits_of"]
