"""The generated functions of a schedule: what each holds, and their text."""

from __future__ import annotations

import linecache
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..ir.errors import RunError
from ..ir.module import Function, Op
from .lifetimes import PERSISTENT
from .segments import Piece

Run = Callable[..., tuple[list[Tensor], list[Tensor]]]


@dataclass
class Section:
    """One generated function: the actions up to the outputs, or those after the tangents came.

    Attributes:
        actions: positions and actions.
        takes: entry parameters that it reads, in order.
        results: positions of the entry results that it computes.
        returned: those that it returns, all but the updates.
        received, handed: values that the section before leaves to it, and that it leaves.
        run: `run(state, inputs, received, clock) -> (results, handed)`; it empties `inputs`.
        traced: the same, calling `clock(index, pending or None)` after each action; made when it
            is asked for.
        source: the Python text of `run`.
        pieces: the actions with the compiled segments among them; empty without a compiler.
    """

    actions: list[tuple[int, Op]]
    takes: list[str]
    results: list[int] = field(default_factory=list)
    returned: list[int] = field(default_factory=list)
    received: list[str] = field(default_factory=list)
    handed: list[str] = field(default_factory=list)
    run: Run | None = None
    traced: Run | None = None
    source: str = ""
    pieces: list[Piece] = field(default_factory=list)


def cut(function: Function, constants: Collection[str]) -> list[Section]:
    """The whole schedule, or for one with tangents its two halves.

    Args:
        constants: values that are there before the first step; they need no action.
    """
    actions = [
        (index, op)
        for index, op in enumerate(function.ops)
        if not op.results or any(value.name not in constants for value in op.results)
    ]
    roles = {
        value.name: attrs.get("role", "input")
        for value, attrs in zip(function.params, function.param_attrs, strict=True)
    }
    tangents = {name for name, role in roles.items() if role == "tangent"}
    if not tangents:
        return [Section(actions, list(roles), list(range(len(function.results))))]
    late = after_tangents(function, tangents)
    first = Section(
        [(i, op) for i, op in actions if i not in late],
        [name for name in roles if name not in tangents],
    )
    second = Section(
        [(i, op) for i, op in actions if i in late],
        [name for name, role in roles.items() if name in tangents or role in PERSISTENT],
    )
    here = {value.name for _, op in first.actions for value in op.results}
    here.update(first.takes, constants)
    for position, value in enumerate(function.results):
        (first if value.name in here else second).results.append(position)
    replaced = {function.result_attrs[position].get("updates") for position in first.results}
    second.takes = [name for name in second.takes if name not in replaced]  # the old one is handed
    needed = {v.name for _, op in second.actions if op.name != "free" for v in op.operands}
    needed |= {function.results[position].name for position in second.results}
    known = {value.name for _, op in second.actions for value in op.results}
    known.update(second.takes, constants)
    first.handed = second.received = sorted(needed - known)
    return [first, second]


def after_tangents(function: Function, tangents: set[str]) -> set[int]:
    """Positions of the actions that run after the outputs were handed out.

    They are those behind the last output in program order, but for what updates of buffers need
    that the tangents have no part in, and any before it that depend on the tangents. A `free` is
    among them when one of its values is used by them. Raises RunError W0804 where an output
    depends on a tangent.
    """
    outputs = {
        value.name
        for value, attrs in zip(function.results, function.result_attrs, strict=True)
        if attrs.get("role", "output") in ("output", "loss")
    }
    made = {value.name: i for i, op in enumerate(function.ops) for value in op.results}
    last = max((made[name] for name in outputs if name in made), default=-1)
    tainted = set(tangents)
    late = set(range(last + 1, len(function.ops)))
    for index, op in enumerate(function.ops):
        if op.name != "free" and any(value.name in tainted for value in op.operands):
            late.add(index)
            tainted.update(value.name for value in op.results)
    if outputs & tainted:
        raise RunError(
            "W0804", "an output of the plan depends on the gradients of the outputs",
            reason=", ".join(f"%{name}" for name in sorted(outputs & tainted)),
        )  # fmt: skip
    late -= _needed_for_updates(function, tainted)
    used = {v.name for i in late for v in (*function.ops[i].operands, *function.ops[i].results)}
    for index, op in enumerate(function.ops):
        if op.name == "free" and any(value.name in used | tainted for value in op.operands):
            late.add(index)
    return late


def _needed_for_updates(function: Function, tainted: set[str]) -> set[int]:
    """Positions of the actions that updates need which do not depend on `tainted` values.

    A buffer is new once the forward is done, whether or not a backward follows.
    """
    needed = {
        value.name
        for value, attrs in zip(function.results, function.result_attrs, strict=True)
        if attrs.get("role") == "update" and value.name not in tainted
    }
    found = set()
    for index in reversed(range(len(function.ops))):
        op = function.ops[index]
        if op.name != "free" and any(value.name in needed for value in op.results):
            needed.update(value.name for value in op.operands)
            found.add(index)
    return found


class Text:
    """The lines of one generated function, and the actions that they stand for."""

    def __init__(self, file: str, actions: dict[tuple[str, int], Op]) -> None:
        self.file, self.actions, self.rows = file, actions, list[str]()

    def add(self, line: str, op: Op | None = None) -> None:
        """Append a line that runs `op`."""
        if op is not None:
            place = str(op.loc)
            line += f"  # {op.name}" + (f", {place}" if place else "")
        self.rows.append(line)
        if op is not None:
            self.actions[self.file, len(self.rows)] = op

    def text(self) -> str:
        """The whole source."""
        return "\n".join(self.rows) + "\n"

    def function(self, space: dict[str, Any], name: str) -> Callable[..., Any]:
        """The function called `name`, with `space` as its globals."""
        source = self.text()
        code = compile(source, self.file, "exec")
        linecache.cache[self.file] = (len(source), None, self.rows, self.file)
        scope = dict(space)
        exec(code, scope)
        found: Callable[..., Any] = scope[name]
        return found
