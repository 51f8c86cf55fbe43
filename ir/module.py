"""The program: modules of functions of ops in SSA form.

All four levels use these structures; `Module.level` says which rules hold (`verify.py`).
Everything is immutable: a pass builds a new module. A value is identified by its name inside its
function, and carries its type.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from .types import Mesh, TensorType

LEVELS = ("logical", "placed", "spmd", "schedule")

#: An attribute value. Tuples nest (they print as lists); dicts are not attributes.
Attr = bool | int | float | str | tuple["Attr", ...]


@dataclass(frozen=True, slots=True)
class Location:
    """Where an op comes from: the user's frame and the module path (`model.layers.3.mlp`)."""

    path: str = ""
    file: str = ""
    line: int = 0

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.file else ""
        return f"{self.path} ({place})" if self.path and place else self.path or place


NOWHERE = Location()


@dataclass(frozen=True, slots=True)
class Value:
    """An SSA value: its name (without `%`) and type."""

    name: str
    type: TensorType

    def __str__(self) -> str:
        return f"%{self.name}"


@dataclass(frozen=True, slots=True)
class Op:
    """One operation.

    `split` (placed level and below) maps a mesh axis to what that axis splits: an iteration dim of
    the op's signature, or `partial(i, ...)` for "operands i, ... are partial and stay so"; an axis
    that is absent is not used by the op, all of its ranks compute the same.
    """

    name: str
    operands: tuple[Value, ...]
    results: tuple[Value, ...]
    attrs: Mapping[str, Attr] = field(default_factory=dict)
    split: Mapping[str, str] = field(default_factory=dict)
    loc: Location = NOWHERE

    @property
    def result(self) -> Value:
        """The only result; raises ValueError when there are several."""
        (value,) = self.results
        return value

    def with_(self, **changes: object) -> Op:
        """A copy with some fields replaced."""
        return replace(self, **changes)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Function:
    """A function: parameters, ops in order, and returned values.

    `param_attrs[i]` describes parameter i. In the entry function: `role` is `param`, `buffer`,
    `state` (optimizer state), `input`, `lr`, `seed`, or `tangent` (the gradient of output `of`);
    `name` is the user's name for it. `result_attrs[i]` describes result i: `role` is `loss`,
    `output`, `update`, or `grad` (of the entry parameter called `name`); an update also has
    `updates`, the name of the entry parameter whose storage it replaces.
    """

    name: str
    params: tuple[Value, ...]
    ops: tuple[Op, ...]
    results: tuple[Value, ...]
    param_attrs: tuple[Mapping[str, Attr], ...] = ()
    result_attrs: tuple[Mapping[str, Attr], ...] = ()
    attrs: Mapping[str, Attr] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.param_attrs:
            object.__setattr__(self, "param_attrs", tuple({} for _ in self.params))
        if not self.result_attrs:
            object.__setattr__(self, "result_attrs", tuple({} for _ in self.results))

    def with_(self, **changes: object) -> Function:
        """A copy with some fields replaced."""
        return replace(self, **changes)  # type: ignore[arg-type]

    def defs(self) -> dict[str, Op]:
        """Map each value's name to the op that defines it (parameters are absent)."""
        return {result.name: op for op in self.ops for result in op.results}

    def last_uses(self) -> list[tuple[str, ...]]:
        """For each op, the values that nothing after it reads, its own unread results included."""
        kept = {value.name for value in self.results}
        out: list[tuple[str, ...]] = []
        for op in reversed(self.ops):
            names = dict.fromkeys(value.name for value in (*op.operands, *op.results))
            out.append(tuple(name for name in names if name not in kept))
            kept.update(names)
        return out[::-1]

    def uses(self) -> dict[str, list[Op]]:
        """Map each value's name to the ops that read it, in order, once per op."""
        table: dict[str, list[Op]] = {}
        for op in self.ops:
            for name in dict.fromkeys(value.name for value in op.operands):
                table.setdefault(name, []).append(op)
        return table


@dataclass(frozen=True, slots=True)
class Module:
    """A program at one level. The first function is the entry; callees may come in any order."""

    level: str
    functions: tuple[Function, ...]
    mesh: Mesh | None = None
    attrs: Mapping[str, Attr] = field(default_factory=dict)

    @property
    def entry(self) -> Function:
        """The function that a step runs."""
        return self.functions[0]

    def function(self, name: str) -> Function:
        """The function called `name`; raises KeyError."""
        for function in self.functions:
            if function.name == name:
                return function
        raise KeyError(f"no function @{name}")

    def with_(self, **changes: object) -> Module:
        """A copy with some fields replaced."""
        return replace(self, **changes)  # type: ignore[arg-type]

    def walk(self) -> Iterator[tuple[Function, Op]]:
        """All ops of all functions, each once."""
        for function in self.functions:
            for op in function.ops:
                yield function, op


class Namer:
    """Hands out value names that are unique in a function."""

    def __init__(self, taken: Iterator[str] | tuple[str, ...] = ()) -> None:
        self._taken = set(taken)
        self._next: dict[str, int] = {}

    def __call__(self, hint: str = "") -> str:
        """A fresh name, `hint` itself if it is still free."""
        stem = hint or "v"
        if hint and hint not in self._taken:
            self._taken.add(hint)
            return hint
        number = self._next.get(stem, 0)
        while (name := f"{stem}_{number}" if hint else f"{number}") in self._taken:
            number += 1
        self._next[stem] = number + 1
        self._taken.add(name)
        return name
