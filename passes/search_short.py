"""A program with fewer repetitions: what one search needs to see of a deep one.

Equal consecutive calls are a chain: each takes the place of the one before it, its boundary values
have the types of the next one's. Leaving one out, forward, backward and update together, gives a
program of the same kind with one block less. The placement of the middle blocks of a long chain
does not depend on its length, so the costs of the units that are left stand for those left out.
What is taken is carried over to the full length (`search_carry.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from ..ir.module import Function, Module, Op, Value
from .dead_code import without_dead_ops
from .micro import TimeSplit
from .search_units import Units

#: calls of a chain that are kept at its beginning and end: the first ones may differ, the middle
#: one stands for those left out
FIRST, LAST = 3, 1


@dataclass(frozen=True)
class Short:
    """A shortened program.

    Attributes:
        module: logical.
        of: for each unit of the whole program, the unit of the short one with its costs.
        share: parameters' elements of the short program over those of the whole one.
    """

    module: Module
    of: tuple[int, ...]
    share: float


def shorten(split: TimeSplit, units: Units, first: int = FIRST, last: int = LAST) -> Short | None:
    """The program without the inner calls of its chains; None where nothing can be left out.

    Args:
        split: the program over time, of one micro-batch for example; its module is shortened.
        first, last: calls of a chain that are kept at its beginning and end.
    """
    entry = split.module.entry
    forward = _unit_ops(entry, split.phases, units, "forward")
    backward = _unit_ops(entry, split.phases, units, "backward")
    dropped: list[int] = []
    stands: dict[int, int] = {}
    for chain in _chains(units, forward, first + last):
        inner = chain[first:-last]
        kept = chain[first - 1]
        stands.update(dict.fromkeys(inner, kept))
        dropped += inner
    if not dropped:
        return None
    module = _without(split.module, units, forward, backward, set(dropped))
    if module is None:
        return None
    numbers = {u: i for i, u in enumerate(u for u in range(units.count) if u not in stands)}
    of = tuple(numbers[stands.get(u, u)] for u in range(units.count))
    return Short(module, of, _elements(module) / max(1, _elements(split.module)))


def _elements(module: Module) -> int:
    rows = zip(module.entry.params, module.entry.param_attrs, strict=True)
    return sum(prod(value.type.shape) for value, attrs in rows if attrs.get("role") == "param")


def _unit_ops(
    entry: Function, phases: Sequence[str], units: Units, phase: str
) -> dict[int, list[Op]]:
    found: dict[int, list[Op]] = {}
    for op, unit, own in zip(entry.ops, units.stage_of, phases, strict=True):
        if unit >= 0 and own == phase:
            found.setdefault(unit, []).append(op)
    return found


def _chains(units: Units, forward: Mapping[int, list[Op]], kept: int) -> list[list[int]]:
    """Runs of more units than are kept, of one callee, each feeding the next alone."""
    chains: list[list[int]] = []
    for unit in range(units.count):
        last = chains[-1][-1] if chains else -1
        name = _callee(forward, unit)
        if name and (last, unit) in units.edges and _callee(forward, last) == name:
            chains[-1].append(unit)
        else:
            chains.append([unit])
    return [chain for chain in chains if len(chain) > kept]


def _callee(forward: Mapping[int, list[Op]], unit: int) -> str:
    ops = forward.get(unit, [])
    return str(ops[0].attrs["callee"]) if len(ops) == 1 and ops[0].name == "call" else ""


def _without(
    module: Module,
    units: Units,
    forward: Mapping[int, list[Op]],
    backward: Mapping[int, list[Op]],
    dropped: set[int],
) -> Module | None:
    """The module without the units; None where something else reads what only they make."""
    entry = module.entry
    stands: dict[str, Value] = {}
    gone: set[str] = set()
    for rows, step in ((forward, 1), (backward, -1)):
        for unit in sorted(dropped, reverse=step < 0):
            here, following = rows.get(unit, []), rows.get(unit + step, [])
            if len(here) != 1 or len(following) != 1:
                return None
            pairs = _pairs(here[0], following[0])
            if pairs is None:
                return None
            stands.update(pairs)
            gone.update(v.name for v in here[0].results if v.name not in pairs)

    def now(value: Value) -> Value:
        while value.name in stands:
            value = stands[value.name]
        return value

    removed = {op.results[0].name for rows in (forward, backward) for u in dropped for op in rows[u]}
    ops = []
    for op in entry.ops:
        if op.results[0].name in removed:
            continue
        if any(value.name in gone for value in op.operands):
            gone.update(value.name for value in op.results)
            continue
        ops.append(op.with_(operands=tuple(map(now, op.operands))))
    keep = [v.name not in gone for v in entry.results]
    lost = {
        str(attrs["updates"])
        for attrs, kept in zip(entry.result_attrs, keep, strict=True)
        if not kept and "updates" in attrs
    }
    read = {value.name for op in ops for value in op.operands}
    if lost & read:  # something of all blocks at once, such as the norm of all gradients
        return None
    params = [p.name not in lost for p in entry.params]
    function = entry.with_(
        params=tuple(p for p, k in zip(entry.params, params, strict=True) if k),
        param_attrs=tuple(a for a, k in zip(entry.param_attrs, params, strict=True) if k),
        ops=tuple(ops),
        results=tuple(now(v) for v, k in zip(entry.results, keep, strict=True) if k),
        result_attrs=tuple(a for a, k in zip(entry.result_attrs, keep, strict=True) if k),
    )
    function = without_dead_ops(function)
    return module.with_(functions=(function, *module.functions[1:]))


def _pairs(op: Op, following: Op) -> dict[str, Value] | None:
    """Results of a call that the next one reads -> what the call itself reads there."""
    if op.name != "call" or following.name != "call" or len(op.operands) != len(following.operands):
        return None
    made = {value.name for value in op.results}
    found: dict[str, Value] = {}
    for value, own in zip(following.operands, op.operands, strict=True):
        if value.name in made:
            if value.type != own.type or found.get(value.name, own) != own:
                return None
            found[value.name] = own
    return found or None
