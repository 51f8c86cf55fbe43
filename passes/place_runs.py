"""How often each function of a module runs in a step."""

from __future__ import annotations

from collections.abc import Sequence

from ..ir.module import Function, Module


def executions(module: Module, weights: Sequence[float] | None = None) -> dict[str, float]:
    """Runs of each function in a step; 0 for functions that nothing calls.

    Args:
        weights: runs of each op of the entry; 1 each by default.
    """
    counts = {function.name: 0.0 for function in module.functions}
    counts[module.entry.name] = 1.0
    for function in _callers_first(module):
        own = weights if function is module.entry else None
        for index, op in enumerate(function.ops):
            if op.name == "call":
                runs = counts[function.name] * (own[index] if own is not None else 1.0)
                counts[str(op.attrs["callee"])] += runs
    return counts


def _callers_first(module: Module) -> list[Function]:
    table = {function.name: function for function in module.functions}
    done: set[str] = set()
    order: list[Function] = []

    def visit(function: Function) -> None:
        if function.name not in done:
            done.add(function.name)
            for name in dict.fromkeys(_callees(function)):
                visit(table[name])
            order.append(function)

    visit(module.entry)
    return order[::-1]


def _callees(function: Function) -> list[str]:
    return [str(op.attrs["callee"]) for op in function.ops if op.name == "call"]
