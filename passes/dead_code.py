"""Dead code: what no result of the entry depends on, through calls as well."""

from __future__ import annotations

from dataclasses import replace

from ..ir.module import Function, Module, Op
from .inline import callees_first, is_kernel


def without_dead_ops(function: Function) -> Function:
    """A function without the ops that none of its results depends on."""
    needed = {value.name for value in function.results}
    ops = []
    for op in reversed(function.ops):
        if any(value.name in needed for value in op.results):
            needed.update(value.name for value in op.operands)
            ops.append(op)
    return function if len(ops) == len(function.ops) else replace(function, ops=tuple(ops[::-1]))


def eliminate_dead(module: Module) -> Module:
    """Remove dead ops, functions that nobody calls, and unread parameters and results of the others.

    Nothing is alive at first but the entry's results; life spreads until nothing changes. So a
    value that blocks only hand on to each other is dead. Kernel functions keep their signature.
    """
    return _Liveness(module).run()


class _Liveness:
    """Which results and parameters of each function are alive."""

    def __init__(self, module: Module) -> None:
        self.module = module
        self.table = {function.name: function for function in module.functions}
        self.order = callees_first(self.table, module.entry.name)[::-1]  # callers first
        self.results: dict[str, set[int]] = {name: set() for name in self.order}
        self.params: dict[str, set[int]] = {name: set() for name in self.order}
        entry = module.entry
        self.results[entry.name] = set(range(len(entry.results)))

    def run(self) -> Module:
        """The module without what is dead."""
        while True:
            before = self._count()
            for name in self.order:
                self._spread(self.table[name])
            if self._count() == before:
                break
        alive = {
            name for name in self.order if self.results[name] or name == self.module.entry.name
        }
        kept = [self._prune(f) for f in self.module.functions if f.name in alive]
        return self.module.with_(functions=tuple(kept))

    def _count(self) -> int:
        return sum(len(found) for table in (self.results, self.params) for found in table.values())

    def _spread(self, function: Function) -> set[str]:
        """Names of the live values of a function, as far as is known; marks what they need."""
        needed = {function.results[i].name for i in self.results[function.name]}
        for op in reversed(function.ops):
            live = [i for i, value in enumerate(op.results) if value.name in needed]
            if not live:
                continue
            operands = op.operands
            if op.name == "call":
                callee = str(op.attrs["callee"])
                if is_kernel(self.table[callee]):
                    live = list(range(len(op.results)))
                    self.params[callee].update(range(len(op.operands)))
                self.results[callee].update(live)
                operands = tuple(op.operands[i] for i in self.params[callee])
            needed.update(value.name for value in operands)
        read = (i for i, value in enumerate(function.params) if value.name in needed)
        self.params[function.name].update(read)
        return needed

    def _prune(self, function: Function) -> Function:
        needed = self._spread(function)
        ops = [
            self._narrow(op)
            for op in function.ops
            if any(value.name in needed for value in op.results)
        ]
        function = replace(function, ops=tuple(ops))
        if function.name == self.module.entry.name:
            return function
        params, results = sorted(self.params[function.name]), sorted(self.results[function.name])
        return replace(
            function,
            params=tuple(function.params[i] for i in params),
            param_attrs=tuple(function.param_attrs[i] for i in params),
            results=tuple(function.results[i] for i in results),
            result_attrs=tuple(function.result_attrs[i] for i in results),
        )

    def _narrow(self, op: Op) -> Op:
        """A call with the operands and results that are left."""
        if op.name != "call":
            return op
        callee = str(op.attrs["callee"])
        operands = tuple(op.operands[i] for i in sorted(self.params[callee]))
        results = tuple(op.results[i] for i in sorted(self.results[callee]))
        return replace(op, operands=operands, results=results)
