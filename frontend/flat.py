"""Flat programs for those who describe them, who ask for the same one many times."""

from __future__ import annotations

from collections import deque
from itertools import accumulate

from ..ir.module import Module, Op
from ..passes.inline import callees_first, inline, is_kernel

#: a report goes back and forth between a placed and an spmd module
_RECENT: deque[tuple[Module, Module]] = deque(maxlen=2)


def flat(module: Module) -> Module:
    """`inline` of a module; that of the last few is kept."""
    for known, made in _RECENT:
        if known is module:
            return made
    made = inline(module)
    _RECENT.append((module, made))
    return made


def beginning(module: Module, count: int) -> Module:
    """`inline` of what comes first in a module: `count` ops, and the rest of the call that they
    end in. Takes time linear in `count` and in the size of the module itself."""
    table = {function.name: function for function in module.functions}
    sizes: dict[str, int] = {}

    def size(op: Op) -> int:
        return sizes[str(op.attrs["callee"])] if op.name == "call" else 1

    for name in callees_first(table, module.entry.name):
        flat_size = sum(map(size, table[name].ops))
        sizes[name] = 1 if is_kernel(table[name]) else flat_size
    ops = module.entry.ops
    kept = sum(before < count for before in accumulate(map(size, ops[:-1]), initial=0))
    if kept >= len(ops):
        return inline(module)
    # the names of what is left out stay taken, so that all others are those of the whole
    taken = tuple(value for op in ops[kept:] for value in op.results)
    entry = module.entry
    entry = entry.with_(ops=ops[:kept], results=(), result_attrs=(), params=(*entry.params, *taken))
    return inline(module.with_(functions=(entry, *module.functions[1:])))
