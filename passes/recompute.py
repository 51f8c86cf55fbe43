"""Activation checkpointing: blocks whose forward is computed again in the backward pass.

    %y, %saved = call(%x, %w) {callee = "forward"}            forward pass
    ...
    %dx, %dw = call(%x, %w, %saved, %dy) {callee = "backward"}

becomes, for a block that is computed again,

    %y, %saved = call(%x, %w) {callee = "forward"}
    ...
    %y_again, %saved_again = call(%x, %w) {callee = "forward"}
    %dx, %dw = call(%x, %w, %saved_again, %dy) {callee = "backward"}

so that between forward and backward only the block's inputs are held (Chen et al., 2016). The
results are the same to the bit: random numbers depend on seed and position, not on when.
"""

from __future__ import annotations

from collections.abc import Collection

from ..ir.module import Module, Namer, Op, Value
from .micro import TimeSplit
from .search_units import Units


def recomputed(split: TimeSplit, units: Units, again: Collection[int]) -> Module:
    """The module of a split with some of its units computed again.

    Units that are not one call of a function keep what they save.
    """
    entry = split.module.entry
    calls: dict[int, Op] = {}
    many: set[int] = set()
    for op, unit, phase in zip(entry.ops, units.stage_of, split.phases, strict=True):
        if phase == "forward" and unit in again:
            if unit in calls or op.name != "call":
                many.add(unit)
            calls[unit] = op
    calls = {unit: op for unit, op in calls.items() if unit not in many}
    namer = Namer(
        (*(v.name for v in entry.params), *(v.name for op in entry.ops for v in op.results))
    )
    ops: list[Op] = []
    copies: dict[int, dict[str, Value]] = {}
    for op, unit, phase in zip(entry.ops, units.stage_of, split.phases, strict=True):
        if phase == "backward" and unit in calls:
            call = calls[unit]
            if unit not in copies:
                results = tuple(Value(namer(f"{v.name}_again"), v.type) for v in call.results)
                copies[unit] = {v.name: r for v, r in zip(call.results, results, strict=True)}
                ops.append(call.with_(results=results))
            table = copies[unit]
            op = op.with_(operands=tuple(table.get(v.name, v) for v in op.operands))
        ops.append(op)
    function = entry.with_(ops=tuple(ops))
    return split.module.with_(functions=(function, *split.module.functions[1:]))
