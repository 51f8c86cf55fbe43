"""How often each function of a module runs in a step."""

from __future__ import annotations

from ..ir.module import Function, Module


def executions(module: Module) -> dict[str, int]:
    """Runs of each function in a step; 0 for functions that nothing calls."""
    counts = {function.name: 0 for function in module.functions}
    counts[module.entry.name] = 1
    for function in _callers_first(module):
        for name in _callees(function):
            counts[name] += counts[function.name]
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
