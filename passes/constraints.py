"""Constraints on a placement: what an op, a parameter or a value may be on an axis of the mesh.

Text form, statements between `;` or line ends, `#` starts a comment:

    op    WHERE : AXIS = CHOICES, ...     states of ops: an iteration dim, `partial(i)`, `-` for none
    value WHERE : AXIS = CHOICES, ...     placements of the results of ops
    param WHERE : AXIS = CHOICES, ...     placements of the entry's parameters; `buffer`, `state`
                                          (optimizer states), `input` likewise
    forbid AXIS                           nothing uses the axis
    forbid AXIS : WHERE                   no op and no parameter there does
    memory BYTES                          peak of a rank, for example 40e9 or 40 GB

WHERE is a glob of module paths (`model.layers.*.mlp`, everything below it included), of the user's
names of parameters, or, for ops and values, of the op's own name (`einsum`). AXIS is a mesh axis or
`*`. CHOICES are globs between `|`, such as `S(*)|B`; `S(-1)` is the last dim. A rule about an axis
that a mesh does not have says nothing there: an axis of one rank is no axis.

    >>> print(Constraints.parse("param *.weight : dp = S(0)|S(1); memory 40 GB"))
    param *.weight : dp = S(0)|S(1)
    memory 40000000000
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import lru_cache

from ..ir.errors import CompileError
from ..ir.types import Mesh, Placement

#: what a rule may be about; all but the first two are roles of the entry's parameters
KINDS = ("op", "value", "param", "buffer", "state", "input")
_NONE = "-"  #: the state of an op that does not use an axis
_UNITS = {"": 1.0, "b": 1.0, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12}
_MEMORY = re.compile(r"memory\s+([0-9.]+(?:e[+-]?[0-9]+)?)\s*([a-z]*)", re.IGNORECASE)
_FORBID = re.compile(r"forbid\s+([\w*]+)(?:\s*:\s*(\S+))?")
_RULE = re.compile(r"(\w+)\s+(\S+)\s*:\s*(.+)", re.DOTALL)
_PART = re.compile(r"\s*([\w*]+)\s*=\s*([^=]+?)\s*(?:,(?=[^()]*(?:\([^()]*\)[^()]*)*$)|$)")


@dataclass(frozen=True)
class Rule:
    """What is allowed on one axis.

    Attributes:
        kind: one of `KINDS`.
        where: glob of module paths, parameter names or op names.
        axis: mesh axis, `*` for each.
        allowed: globs of states (`op`) or placement entries (all others); `-` is no state.
    """

    kind: str
    where: str
    axis: str
    allowed: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.kind} {self.where} : {self.axis} = {'|'.join(self.allowed)}"

    def selects(self, path: str, name: str = "") -> bool:
        """Is the rule about this module path or name?"""
        return _selects(self.where, path) or bool(name) and fnmatchcase(name, self.where)

    def admits_states(self, states: Sequence[str], axes: Sequence[str]) -> bool:
        """Do the states of an op, one per axis, obey?"""
        return all(
            any(fnmatchcase(state or _NONE, pattern) for pattern in self.allowed)
            for state, axis in zip(states, axes, strict=True)
            if self.axis in (axis, "*")
        )

    def admits(self, placement: Sequence[Placement], axes: Sequence[str], rank: int) -> bool:
        """Does a placement, one entry per axis, of a tensor with `rank` dims obey?

        A scalar has no dims to split: rules say nothing about it.
        """
        return rank == 0 or all(
            any(_entry_matches(entry, pattern, rank) for pattern in self.allowed)
            for entry, axis in zip(placement, axes, strict=True)
            if self.axis in (axis, "*")
        )


@lru_cache(maxsize=1 << 16)
def _selects(where: str, path: str) -> bool:
    return fnmatchcase(path, where) or fnmatchcase(path, where + ".*")


def _entry_matches(entry: Placement, pattern: str, rank: int) -> bool:
    if fnmatchcase(str(entry), pattern):
        return True
    return entry.kind == "S" and f"S({entry.dim - rank})" == pattern


@dataclass(frozen=True)
class Constraints:
    """Rules that every plan must obey, and the most memory that a rank may use.

    Attributes:
        rules: all of them hold.
        memory_bytes: peak of a rank; None for what the device has.
    """

    rules: tuple[Rule, ...] = ()
    memory_bytes: float | None = None

    def __str__(self) -> str:
        lines = [str(rule) for rule in self.rules]
        if self.memory_bytes is not None:
            lines.append(f"memory {self.memory_bytes:.17g}")
        return "\n".join(lines)

    def __add__(self, other: Constraints) -> Constraints:
        """Both hold."""
        caps = [m for m in (self.memory_bytes, other.memory_bytes) if m is not None]
        rules = tuple(dict.fromkeys((*self.rules, *other.rules)))
        return Constraints(rules, min(caps, default=None))

    def on(self, mesh: Mesh) -> Constraints:
        """Those that say something on a mesh."""
        rules = tuple(r for r in self.rules if r.axis == "*" or r.axis in mesh.names)
        return Constraints(rules, self.memory_bytes)

    @staticmethod
    def parse(text: str) -> Constraints:
        """Read the text form. Raises CompileError W0601."""
        rules: list[Rule] = []
        memory: float | None = None
        for line in re.split(r"[;\n]", text):
            statement = line.partition("#")[0].strip()
            if not statement:
                continue
            if match := _MEMORY.fullmatch(statement):
                unit = _UNITS.get(match[2].lower())
                if unit is None:
                    raise _unreadable(statement, f"units are {', '.join(filter(None, _UNITS))}")
                memory = min(memory or float("inf"), float(match[1]) * unit)
            elif match := _FORBID.fullmatch(statement):
                rules += forbid(match[1], match[2] or "*").rules
            else:
                rules += _rules(statement)
        return Constraints(tuple(dict.fromkeys(rules)), memory)


def forbid(axis: str, where: str = "*") -> Constraints:
    """No op, and nothing that is stored, uses an axis."""
    stored = (Rule(kind, where, axis, ("B",)) for kind in KINDS[2:])
    return Constraints((Rule("op", where, axis, (_NONE,)), *stored))


def _rules(statement: str) -> list[Rule]:
    match = _RULE.fullmatch(statement)
    if match is None or match[1] not in KINDS:
        raise _unreadable(statement, f"a statement starts with {', '.join(KINDS)}, forbid or memory")
    kind, where, rest = match.groups()
    rules, position = [], 0
    while position < len(rest):
        part = _PART.match(rest, position)
        if part is None:
            raise _unreadable(statement, f"{rest[position:].strip()!r} is no AXIS = CHOICES")
        allowed = tuple(choice.strip() for choice in part[2].split("|"))
        if not all(allowed):
            raise _unreadable(statement, "a choice is empty")
        rules.append(Rule(kind, where, part[1], allowed))
        position = part.end()
    return rules


def _unreadable(statement: str, reason: str) -> CompileError:
    return CompileError(
        "W0601", f"cannot read the constraint {statement!r}", reason=reason,
        hint="for example `param *.weight : dp = S(0)` or `op *.mlp : tp = -`",
    )  # fmt: skip


@dataclass(frozen=True)
class Selection:
    """The rules of one mesh, by kind, asked once per op and parameter."""

    constraints: Constraints
    mesh: Mesh
    _by_kind: dict[str, list[Rule]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for rule in self.constraints.on(self.mesh).rules:
            self._by_kind.setdefault(rule.kind, []).append(rule)

    @property
    def empty(self) -> bool:
        """Does no rule say anything here?"""
        return not self._by_kind

    def about(self, kind: str, path: str, name: str = "") -> tuple[Rule, ...]:
        """The rules of a kind about a module path or name."""
        return tuple(r for r in self._by_kind.get(kind, ()) if r.selects(path, name))

    def unused(self, seen: Iterable[Rule]) -> tuple[Rule, ...]:
        """Rules of this mesh that are about nothing among what was asked for."""
        known = set(seen)
        return tuple(r for rules in self._by_kind.values() for r in rules if r not in known)


__all__ = ["KINDS", "Constraints", "Rule", "Selection", "forbid"]
