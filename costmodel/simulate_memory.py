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
        at_peak: what is held then.
    """

    changes: list[tuple[int, int]] = field(default_factory=list)
    peak_bytes: int = 0
    at_peak: list[Owner] = field(default_factory=list)


class _Holder:
    """Values and whose memory they are; views share what they show."""

    def __init__(
        self, function: Function, mesh: Mesh, coord: tuple[int, ...], kinds: Mapping[str, str]
    ) -> None:
        self.mesh, self.coord, self.kinds = mesh, coord, kinds
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

    def make(self, op: Op) -> None:
        """The results of an op begin to live."""
        shares = op.name in VIEWS or op.name == "wait"
        for index, value in enumerate(op.results):
            root = self.storage.get(op.operands[0].name) if shares else None
            if op.attrs.get("inplace"):
                root = self.storage.get(op.operands[OVERWRITES[op.name][index]].name)
            if root is not None and root in self.held:
                self.storage[value.name] = root
                self.users[root] += 1
            else:
                kind = self.kinds.get(value.name, TRANSIENT)
                self._take(value.name, kind, op.loc.path, value.type)

    def free(self, op: Op) -> None:
        """The operands of a `free` end."""
        for value in op.operands:
            root = self.storage.pop(value.name, value.name)
            self.users[root] -= 1
            if not self.users[root] and root in self.held:
                self.live -= self.held.pop(root)[2]


def memory_of(function: Function, mesh: Mesh, coord: tuple[int, ...]) -> Memory:
    """Replay the allocations and frees of a schedule's entry at a mesh coordinate.

    A value lives from the start of its action to its `free`; parameters and results live on.
    """
    kinds = kinds_of(function)
    holder = _Holder(function, mesh, coord, kinds)
    memory = Memory([(-1, holder.live)])
    peak = holder.live
    best = -1
    for index, op in enumerate(function.ops):
        before = holder.live
        if op.name == "free":
            holder.free(op)
        else:
            holder.make(op)
        if holder.live != before:
            memory.changes.append((index, holder.live))
            if holder.live > peak:
                peak, best = holder.live, index
    memory.peak_bytes = peak
    memory.at_peak = _held_at(function, mesh, coord, kinds, best)
    return memory


def _held_at(
    function: Function, mesh: Mesh, coord: tuple[int, ...], kinds: Mapping[str, str], last: int
) -> list[Owner]:
    """What is held behind the action at a position: a second replay, to copy the table once only."""
    holder = _Holder(function, mesh, coord, kinds)
    for op in function.ops[: last + 1]:
        if op.name == "free":
            holder.free(op)
        else:
            holder.make(op)
    return list(holder.held.values())


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
