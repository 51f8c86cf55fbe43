"""The units that pipeline stages are made of, and the ways to cut between them.

Units are calls of outlined functions in the forward pass, and the ops before, between and behind
them. Each op of the backward pass belongs to the unit whose saved values it reads, each update to
the unit of its parameter. A stage is a set of units; a pipeline is a chain of down-sets (order ideals)
of the unit graph: every set of units that is closed under "is read by a unit of the set" may be
the first stages' share. A line of n units has n + 1 of them; two towers of n have (n + 1)^2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..ir.module import Function, Op
from .micro import LOOP, TimeSplit

#: where there are fewer calls than this, single ops are units as well
_FEW_CALLS = 4
#: units of a program without repeated blocks
_MOST_SEGMENTS = 48
#: down-sets of the unit graph; a graph with more is cut along one topological order only
MOST_IDEALS = 1500
_FREE = frozenset({"input", "seed", "lr", "tangent"})


@dataclass(frozen=True)
class Units:
    """The units of a program.

    Attributes:
        names: a name for people of each unit: its module path or its ops.
        stage_of: the unit of each op of the entry, -1 for ops that follow others; what `stages.cut`
            takes, with units in the place of stages.
        edges: (i, j) where unit j reads a value of unit i in the forward pass.
        ideals: down-sets as rows of a boolean matrix, shape (count, units), by size; the first is
            empty, the last has all units.
        complete: whether these are all down-sets.
    """

    names: tuple[str, ...]
    stage_of: tuple[int, ...]
    edges: frozenset[tuple[int, int]]
    ideals: NDArray[np.bool_]
    complete: bool

    @property
    def count(self) -> int:
        """Number of units."""
        return len(self.names)


def units_of(split: TimeSplit) -> Units:
    """The units of a program over time."""
    entry = split.module.entry
    copied = _copied(entry)
    forward = [
        op for op, phase in zip(entry.ops, split.phases, strict=True)
        if phase == "forward" and op.results[0].name not in copied
    ]  # fmt: skip
    groups = _groups(entry, forward, copied)
    unit_of = {op.results[0].name: unit for unit, group in enumerate(groups) for op in group}
    edges = _edges(entry, forward, unit_of)
    _assign_backward(entry, split.phases, copied, unit_of)
    stage_of = tuple(
        unit_of.get(op.results[0].name, -1) if phase in LOOP else -1
        for op, phase in zip(entry.ops, split.phases, strict=True)
    )
    ideals, complete = down_sets(len(groups), edges)
    return Units(tuple(map(_name, groups)), stage_of, frozenset(edges), ideals, complete)


def _copied(entry: Function) -> set[str]:
    """First results of the ops that inputs alone decide: each stage computes them for itself."""
    new = {str(attrs.get("updates", "")) for attrs in entry.result_attrs}
    known = {
        value.name for value, attrs in zip(entry.params, entry.param_attrs, strict=True)
        if attrs.get("role") in _FREE or (attrs.get("role") == "buffer" and value.name not in new)
    }  # fmt: skip
    found = set()
    for op in entry.ops:
        if all(value.name in known for value in op.operands):
            known.update(value.name for value in op.results)
            found.add(op.results[0].name)
    return found


def _groups(entry: Function, forward: Sequence[Op], copied: set[str]) -> list[list[Op]]:
    """Ops of each unit, units in a topological order.

    Each call is a unit. Ops that depend on the same set of calls are one: no path leads from such
    a set out and back, since what is behind a call depends on that call as well.
    """
    calls = [op for op in forward if op.name == "call"]
    if len(calls) < _FEW_CALLS:
        return _segments(forward)
    number = {op.results[0].name: i for i, op in enumerate(calls)}
    behind: dict[str, int] = {}  #: value -> calls that it depends on, as bits
    groups: dict[tuple[int, int], list[Op]] = {}
    for op in forward:
        mask = 0
        for value in op.operands:
            mask |= behind.get(value.name, 0)
        own = number.get(op.results[0].name, -1)
        groups.setdefault((mask, own), []).append(op)
        behind.update((value.name, mask | (1 << own if own >= 0 else 0)) for value in op.results)
    return _topological(list(groups.values()))


def _topological(groups: list[list[Op]]) -> list[list[Op]]:
    """Groups such that each comes behind those that it reads; else in program order."""
    made = {v.name: g for g, group in enumerate(groups) for op in group for v in op.results}
    needs = [
        {made[v.name] for op in group for v in op.operands if v.name in made} - {g}
        for g, group in enumerate(groups)
    ]
    order: list[int] = []
    done: set[int] = set()

    def visit(g: int) -> None:
        stack = [(g, iter(sorted(needs[g])))]
        while stack:
            at, rest = stack[-1]
            following = next((n for n in rest if n not in done), None)
            if following is None:
                stack.pop()
                if at not in done:
                    done.add(at)
                    order.append(at)
            else:
                stack.append((following, iter(sorted(needs[following]))))

    for g in range(len(groups)):
        visit(g)
    return [groups[g] for g in order]


def _segments(forward: Sequence[Op]) -> list[list[Op]]:
    """Consecutive ops of a program without repeated blocks, at most so many pieces."""
    count = min(_MOST_SEGMENTS, len(forward))
    bounds = [len(forward) * k // count for k in range(count + 1)] if count else [0]
    return [list(forward[a:b]) for a, b in zip(bounds, bounds[1:], strict=False)]


def _edges(
    entry: Function, forward: Sequence[Op], unit_of: Mapping[str, int]
) -> set[tuple[int, int]]:
    made = {value.name: unit_of[op.results[0].name] for op in forward for value in op.results}
    found = set()
    for op in forward:
        here = unit_of[op.results[0].name]
        for value in op.operands:
            there = made.get(value.name, here)
            if there != here:
                found.add((there, here))
    return found


def _assign_backward(
    entry: Function, phases: Sequence[str], copied: set[str], unit_of: dict[str, int]
) -> None:
    """Give each backward op a unit, such that gradients go to units that are not later.

    The latest unit whose values it reads (what a block saved), but none behind those whose gradients
    it reads. An op that reads gradients only and makes the gradient of a parameter goes to the
    parameter's unit.
    """
    forward_unit: dict[str, int] = {}
    backward_unit: dict[str, int] = {}
    owner: dict[str, int] = {}
    for op, phase in zip(entry.ops, phases, strict=True):
        name = op.results[0].name
        if phase == "forward" and name in unit_of:
            forward_unit.update((value.name, unit_of[name]) for value in op.results)
            for value in op.operands:
                if value.name not in forward_unit:
                    owner.setdefault(value.name, unit_of[name])
    wanted = _parameter_units(entry, phases, owner)
    for op, phase in zip(entry.ops, phases, strict=True):
        name = op.results[0].name
        if phase != "backward" or name in copied:
            continue
        saved = [forward_unit[v.name] for v in op.operands if v.name in forward_unit]
        if op.name == "call":  # a block that is computed again reads its weights, and saves nothing
            saved += [owner[v.name] for v in op.operands if v.name in owner]
        above = [backward_unit[v.name] for v in op.operands if v.name in backward_unit]
        home = [wanted[v.name] for v in op.results if v.name in wanted]
        if saved:
            unit = max(saved)
        elif home:
            unit = max(home)
        else:
            unit = min(above, default=0)
        unit = min([unit, *above])
        unit_of[name] = unit
        backward_unit.update((value.name, unit) for value in op.results)


def _parameter_units(
    entry: Function, phases: Sequence[str], owner: Mapping[str, int]
) -> dict[str, int]:
    """Values that updates read -> the unit of the parameter that the same op reads."""
    found: dict[str, int] = {}
    for op, phase in zip(entry.ops, phases, strict=True):
        if phase == "update":
            homes = [owner[v.name] for v in op.operands if v.name in owner]
            if homes:
                for value in op.operands:
                    found.setdefault(value.name, homes[0])
    return found


def down_sets(count: int, edges: set[tuple[int, int]]) -> tuple[NDArray[np.bool_], bool]:
    """All down-sets by size, or those of one topological order where there are too many."""
    needs = [0] * count
    for i, j in edges:
        needs[j] |= 1 << i
    level, found = {0}, [0]
    while level:
        above = set()
        for mask in level:
            for unit in range(count):
                if not mask >> unit & 1 and needs[unit] & mask == needs[unit]:
                    above.add(mask | 1 << unit)
        found += sorted(above)
        if len(found) > MOST_IDEALS:
            line = [(1 << k) - 1 for k in range(count + 1)]
            return _matrix(line, count), False
        level = above
    return _matrix(found, count), True


def _matrix(masks: Sequence[int], count: int) -> NDArray[np.bool_]:
    rows = [[bool(mask >> unit & 1) for unit in range(count)] for mask in masks]
    return np.array(rows, dtype=np.bool_).reshape(len(masks), count)


def _name(group: Sequence[Op]) -> str:
    paths = [op.loc.path for op in group if op.loc.path]
    if group[0].name == "call":
        return paths[0] if paths else str(group[0].attrs["callee"])
    names = list(dict.fromkeys(path.rpartition(".")[2] or path for path in paths))
    return ", ".join(names[:3]) or ", ".join(dict.fromkeys(op.name for op in group))
