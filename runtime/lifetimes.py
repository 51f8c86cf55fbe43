"""Lifetimes of the values of one schedule: part of the static check (`schedule_check.py`)."""

from __future__ import annotations

from collections.abc import Sequence

from ..ir.errors import RunError
from ..ir.module import Function, Op
from ..ir.ops import OPS
from ..ir.ops.optimizer import OVERWRITES

#: roles of entry parameters that outlive a step
PERSISTENT = frozenset({"param", "buffer", "state"})
#: ops besides the movement family whose result may be the memory of an operand
_MAY_ALIAS = frozenset({"stop_gradient", "aten", "wait"})
_NONE: frozenset[str] = frozenset()


def overwritten_operands(op: Op) -> tuple[int, ...]:
    """Operands whose storage an in-place optimizer update takes for its results, in their order."""
    return OVERWRITES.get(op.name, ())


def may_alias(op: Op) -> bool:
    """Can a result be the memory of an operand? Collectives and kernels return new tensors."""
    if op.name == "cast":  # to the same dtype there is nothing to do
        return op.operands[0].type.dtype == op.result.type.dtype
    family = OPS[op.name].family if op.name in OPS else ""
    if family == "reduction":  # nor is there over no dims
        return op.attrs.get("dims") == ()
    return family == "movement" or op.name in _MAY_ALIAS


def alias_roots(function: Function) -> dict[str, frozenset[str]]:
    """For each value, the values whose memory it may be: itself, or what it is a view of."""
    roots = {value.name: frozenset({value.name}) for value in function.params}
    for op in function.ops:
        shared = _NONE
        if may_alias(op):
            shared = shared.union(*(roots[value.name] for value in op.operands))
        roots.update((value.name, shared or frozenset({value.name})) for value in op.results)
    return roots


def last_readers(function: Function) -> frozenset[int]:
    """Positions of the actions whose first operand's memory nothing reads afterwards.

    The memory must be a value of this step alone: no parameter, no result, no view of another.
    """
    roots = alias_roots(function)
    kept = _NONE.union(*(roots[value.name] for value in (*function.params, *function.results)))
    ends = {op.operands[0].name: i for i, op in enumerate(function.ops) if op.name == "wait"}
    reads: dict[str, list[tuple[int, int]]] = {}  # memory -> (reader, when it has done reading)
    for index, op in enumerate(function.ops):
        if op.name != "free":
            end = ends.get(op.results[0].name, index) if op.attrs.get("async") else index
            for value in op.operands:
                for root in roots[value.name]:
                    reads.setdefault(root, []).append((index, end))
    return frozenset(
        index
        for index, op in enumerate(function.ops)
        if op.name != "free" and op.operands
        for name in [op.operands[0].name]
        if roots[name] == {name} and name not in kept
        if all(reader == index or end < index for reader, end in reads[name])
    )


def show_ranks(ranks: Sequence[int]) -> str:
    """`rank 3`, `ranks 0, 1`, `ranks 0 to 9999`, or the first few and how many."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if list(ranks) == list(range(ranks[0], ranks[0] + len(ranks))) and len(ranks) > 2:
        return f"ranks {ranks[0]} to {ranks[-1]}"
    head = ", ".join(map(str, ranks[:6]))
    return f"ranks {head}" + (f" and {len(ranks) - 6} more" if len(ranks) > 6 else "")


def describe(function: Function, index: int) -> str:
    """One line about an action: its position, text, and where the user wrote it."""
    if index >= len(function.ops):
        return f"the return of @{function.name}"
    op = function.ops[index]
    left = ", ".join(map(str, op.results))
    attrs = ", ".join(f"{key}={value}" for key, value in op.attrs.items())
    text = (f"{left} = " if left else "") + f"{op.name}({', '.join(map(str, op.operands))})"
    if attrs:
        text += " {" + attrs + "}"
    if op.results:
        text += f" : {op.results[0].type}"
    place = str(op.loc)
    return f"action {index}: {text}" + (f", from {place}" if place else "")


def check_lifetimes(function: Function, ranks: str = "") -> None:
    """Check one schedule on its own. Raises RunError W0802 naming `ranks` and the action."""
    _Walk(function, ranks).run()


class _Walk:
    """One pass over the actions."""

    def __init__(self, function: Function, ranks: str) -> None:
        self.function, self.ranks, self.index = function, ranks, 0
        self.roots: dict[str, frozenset[str]] = {}
        self.freed: dict[str, int] = {}
        self.open: dict[str, int] = {}  # handle -> where it was started
        self.closed: dict[str, int] = {}  # handle -> where it was waited for
        self.in_flight: dict[str, tuple[set[str], set[str]]] = {}  # handle -> operands, memory
        self.overwritten: dict[str, int] = {}
        self.roles: dict[str, str] = {}
        for value, attrs in zip(function.params, function.param_attrs, strict=True):
            self.roots[value.name] = frozenset({value.name})
            self.roles[value.name] = str(attrs.get("role", "input"))
        self.returned = {value.name for value in function.results}
        self.updates = {
            (value.name, attrs.get("updates"))
            for value, attrs in zip(function.results, function.result_attrs, strict=True)
        }

    def fail(self, what: str, also: int | None = None, hint: str = "") -> RunError:
        """The diagnostic for the current action."""
        reason = describe(self.function, self.index)
        if also is not None:
            reason += f"\n       after {describe(self.function, also)}"
        message = f"{self.ranks}: {what}" if self.ranks else what
        return RunError("W0802", message, reason=reason, hint=hint)

    def run(self) -> None:
        for self.index, op in enumerate(self.function.ops):
            if op.name == "free":
                self.free(op)
                continue
            if op.name == "wait":
                self.wait(op)
            else:
                for value in op.operands:
                    self.read(value.name)
            if op.attrs.get("inplace"):
                self.overwrite(op)
            else:
                self.define(op)
            if op.attrs.get("async"):
                self.start(op)
        self.index = len(self.function.ops)
        for value in self.function.results:
            self.read(value.name)
        if self.open:
            name, self.index = next(iter(self.open.items()))
            raise self.fail(f"%{name} is started and never waited for")

    def known(self, name: str) -> None:
        if name not in self.roots:
            raise self.fail(f"%{name} is used and nothing before defines it")

    def read(self, name: str) -> None:
        """An action other than `free` and `wait` reads a value."""
        self.known(name)
        if name in self.freed:
            raise self.fail(f"%{name} is used after it was freed", self.freed[name])
        if name in self.open or name in self.closed:
            at = self.open.get(name, self.closed.get(name))
            raise self.fail(f"%{name} is a transfer: read the result of its wait instead", at)
        for root in self.roots[name]:
            if root in self.overwritten:
                raise self.fail(
                    f"%{name} is used after its memory was overwritten", self.overwritten[root]
                )

    def define(self, op: Op) -> None:
        roots = _NONE
        if may_alias(op):
            roots = _NONE.union(*(self.roots[value.name] for value in op.operands))
        for value in op.results:
            if value.name in self.roots:
                raise self.fail(f"%{value.name} is defined twice")
            self.roots[value.name] = roots or frozenset({value.name})

    def overwrite(self, op: Op) -> None:
        """An in-place update: its states end here, its results take their memory."""
        if op.name not in OVERWRITES:
            raise self.fail(f"{op.name} cannot overwrite its operands")
        gradients = [v.name for i, v in enumerate(op.operands) if i not in overwritten_operands(op)]
        read = _NONE.union(*(self.roots[name] for name in gradients))
        for position, result in zip(overwritten_operands(op), op.results, strict=True):
            name = op.operands[position].name
            if self.roots[name] & read:
                raise self.fail(f"the update overwrites %{name}, which it also reads elsewhere")
            for root in self.roots[name]:
                role = self.roles.get(root)
                if role is not None and role not in PERSISTENT:
                    raise self.fail(f"the update overwrites %{root}, which is an {role}")
                if role is not None and (result.name, root) not in self.updates:
                    raise self.fail(
                        f"the update overwrites %{root}, but %{result.name} is not returned as its "
                        "new value"
                    )
                for handle, at in self.open.items():
                    if root in self.in_flight[handle][1]:
                        raise self.fail(f"%{name} is overwritten while a transfer reads it", at)
                self.overwritten[root] = self.index
        for value in op.results:
            if value.name in self.roots:
                raise self.fail(f"%{value.name} is defined twice")
            self.roots[value.name] = frozenset({value.name})

    def start(self, op: Op) -> None:
        if len(op.results) != 1:
            raise self.fail("an asynchronous action has one result, to wait for")
        name = op.results[0].name
        self.open[name] = self.index
        operands = {value.name for value in op.operands}
        self.in_flight[name] = operands, set(_NONE.union(*(self.roots[o] for o in operands)))

    def wait(self, op: Op) -> None:
        if len(op.operands) != 1:
            raise self.fail("a wait has one operand")
        name = op.operands[0].name
        self.known(name)
        if name in self.freed:
            raise self.fail(f"%{name} is waited for after it was freed", self.freed[name])
        if name in self.closed:
            raise self.fail(f"%{name} is waited for twice", self.closed[name])
        if name not in self.open:
            raise self.fail(f"%{name} is waited for and was not started")
        self.closed[name] = self.open.pop(name)

    def free(self, op: Op) -> None:
        for value in op.operands:
            name = value.name
            self.known(name)
            if name in self.freed:
                raise self.fail(f"%{name} is freed twice", self.freed[name])
            if name in self.open:
                raise self.fail(f"%{name} is freed before its wait", self.open[name])
            for handle, at in self.open.items():
                if name in self.in_flight[handle][0]:
                    raise self.fail(f"%{name} is freed while a transfer uses it", at)
            if self.roles.get(name) in PERSISTENT:
                raise self.fail(f"%{name} is freed, but it outlives the step")
            if name in self.returned:
                raise self.fail(f"%{name} is freed, but it is a result of the step")
            self.freed[name] = self.index
