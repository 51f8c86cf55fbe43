"""Memory of a rank over a step: live bytes after each action, and who owns them at the peak."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from ..ir.module import Function, Op
from ..ir.ops.optimizer import OVERWRITES
from ..ir.types import Mesh, TensorType
from .estimate import VIEWS
from .simulate_cost import local_bytes_at

#: what owns memory: (kind, owner, bytes)
Owner = tuple[str, str, int]
#: kinds of values that a step makes
GRADIENT, SAVED, TRANSIENT = "gradients", "saved activations", "transients"
MADE = frozenset({GRADIENT, SAVED, TRANSIENT})


@dataclass
class Memory:
    """Live bytes of a rank.

    Attributes:
        changes: (position of the action, bytes from its start on), the first one with position -1.
        peak_bytes: the largest of them.
        peak_at: the position where they are reached first.
    """

    changes: list[tuple[int, int]] = field(default_factory=list)
    peak_bytes: int = 0
    peak_at: int = -1


class _Holder:
    """Values and whose memory they are; views share what they show."""

    def __init__(
        self, function: Function, mesh: Mesh, coord: tuple[int, ...], kinds: Mapping[str, str]
    ) -> None:
        self.mesh, self.coord, self.kinds = mesh, coord, kinds
        self.reused = _reusing(function)
        self.sizes: dict[int, int] = {}  # id of a type -> bytes of a shard
        self.storage: dict[str, str] = {}  # value -> the value whose memory it is
        self.users: Counter[str] = Counter()  # memory -> values that are not freed yet
        self.held: dict[str, Owner] = {}
        self.live = 0
        for value, attrs in zip(function.params, function.param_attrs, strict=True):
            role, name = str(attrs.get("role", "")), str(attrs.get("name", value.name))
            self._take(value.name, role or "other", name, value.type)

    def _take(self, name: str, kind: str, owner: str, type: TensorType) -> None:
        size = self.sizes.get(id(type))
        if size is None:
            size = self.sizes[id(type)] = local_bytes_at(type, self.mesh, self.coord)
        self.storage[name] = name
        self.users[name] += 1
        self.held[name] = (kind, owner, size)
        self.live += size

    def step(self, index: int, op: Op) -> None:
        """The action at a position: its results begin to live, or what it frees ends."""
        if op.name == "free":
            self._free(op)
            return
        shares = op.name in VIEWS or op.name in ("wait", "send") or index in self.reused
        for number, value in enumerate(op.results):
            root = self.storage.get(op.operands[0].name) if shares else None
            if op.attrs.get("inplace"):
                root = self.storage.get(op.operands[OVERWRITES[op.name][number]].name)
            if root is not None and root in self.held:
                self.storage[value.name] = root
                self.users[root] += 1
            else:
                kind = self.kinds.get(value.name, TRANSIENT)
                self._take(value.name, kind, op.loc.path, value.type)

    def _free(self, op: Op) -> None:
        for value in op.operands:
            root = self.storage.pop(value.name, value.name)
            self.users[root] -= 1
            if not self.users[root] and root in self.held:
                self.live -= self.held.pop(root)[2]


def memory_of(function: Function, mesh: Mesh, coord: tuple[int, ...]) -> Memory:
    """Replay the allocations and frees of a schedule's entry at a mesh coordinate.

    A value lives from the start of its action to its `free`; parameters and results live on. An
    all_reduce that is the last to read its operand takes its memory, as the executor does.
    """
    holder = _Holder(function, mesh, coord, {})
    memory = Memory([(-1, holder.live)], holder.live)
    for index, op in enumerate(function.ops):
        before = holder.live
        holder.step(index, op)
        if holder.live != before:
            memory.changes.append((index, holder.live))
            if holder.live > memory.peak_bytes:
                memory.peak_bytes, memory.peak_at = holder.live, index
    return memory


def held_at(function: Function, mesh: Mesh, coord: tuple[int, ...], index: int) -> list[Owner]:
    """What is held behind the action at a position."""
    holder = _Holder(function, mesh, coord, kinds_of(function))
    for position, op in enumerate(function.ops[: index + 1]):
        holder.step(position, op)
    return list(holder.held.values())


def _reusing(function: Function) -> frozenset[int]:
    """Positions of the all_reduces whose result takes the memory of their operand: a value of its
    own, no view of it was ever made, and nothing reads it later."""
    if not any(op.name == "all_reduce" for op in function.ops):
        return frozenset()
    ends = {op.operands[0].name: i for i, op in enumerate(function.ops) if op.name == "wait"}
    unfit = {value.name for value in (*function.params, *function.results)}
    reads: dict[str, list[tuple[int, int]]] = {}  # value -> (reader, when it has done reading)
    for index, op in enumerate(function.ops):
        if op.name == "free":
            continue
        end = ends.get(op.results[0].name, index) if op.attrs.get("async") else index
        for value in op.operands:
            reads.setdefault(value.name, []).append((index, end))
        if op.name in VIEWS or op.name == "wait":  # neither it nor its operand is alone in memory
            unfit.update((op.operands[0].name, op.results[0].name))
        if op.attrs.get("inplace"):
            unfit.update(value.name for value in op.results)
    found = set()
    for index, op in enumerate(function.ops):
        if op.name != "all_reduce" or op.operands[0].name in unfit:
            continue
        if all(reader == index or end < index for reader, end in reads[op.operands[0].name]):
            found.add(index)
    return frozenset(found)


def kinds_of(function: Function) -> dict[str, str]:
    """What the values that a step makes are for.

    A gradient is what an optimizer update reads beside its state, or a result with that role, on
    its way there through casts, views and collectives. What the loss or an output depends on is the
    forward half; a value of it that other actions read is a saved activation.
    """
    kinds: dict[str, str] = {}
    defined = function.defs()
    todo = [
        value.name
        for value, attrs in zip(function.results, function.result_attrs, strict=True)
        if attrs.get("role") == "grad"
    ]
    for op in function.ops:
        if op.name in OVERWRITES and len(op.operands) > 1:
            todo.append(op.operands[1].name)
    while todo:
        name = todo.pop()
        made = defined.get(name)
        if made is None or name in kinds:
            continue
        kinds[name] = GRADIENT
        if len(made.operands) == 1:
            todo.append(made.operands[0].name)
    outputs = [
        value.name
        for value, attrs in zip(function.results, function.result_attrs, strict=True)
        if attrs.get("role") in ("loss", "output")
    ]
    forward: set[str] = set()
    stack = outputs
    while stack:
        name = stack.pop()
        made = defined.get(name)
        if made is not None and name not in forward:
            forward.add(name)
            stack += [value.name for value in made.operands]
    for op in function.ops:
        if op.name != "free" and op.results and op.results[0].name not in forward:
            for value in op.operands:
                if value.name in forward:
                    kinds.setdefault(value.name, SAVED)
    return kinds
