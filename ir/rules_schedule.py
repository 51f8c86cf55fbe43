"""Rules of the schedule level: flat, each start with its wait, no use after an end of life.

What depends on views of memory and on several ranks is checked by `runtime/` before a run.
"""

from __future__ import annotations

from collections.abc import Iterator

from .module import Function, Module, Op
from .ops import OPS
from .ops.optimizer import OVERWRITES
from .rule import Rule, Violation, op_rule

_LEVEL_ATTRS = ("async", "inplace")


def _early(module: Module, op: Op) -> str:
    for name in _LEVEL_ATTRS:
        if op.attrs.get(name):
            return f"{op.name} has {name} = true, which belongs to the schedule level"
    return ""


def _flat(module: Module) -> Iterator[Violation]:
    for function in module.functions:
        kernel = "kernel" in function.attrs
        if kernel == (function is module.entry):
            what = "the entry is no kernel" if kernel else f"@{function.name} is not inlined"
            yield Violation(what, function, hint="run the pass schedule")
        for index, op in enumerate(function.ops):
            if kernel and OPS[op.name].family in ("collective", "control", "opaque"):
                yield Violation(f"{op.name} in a kernel function", function, index)


class _Lives:
    """One pass over a flat function: which values are alive."""

    def __init__(self, function: Function) -> None:
        self.function = function
        self.params = {value.name for value in function.params}
        self.ended: dict[str, str] = {}  #: value -> how its life ended
        self.handles: dict[str, Op] = {}  #: started, not yet waited for
        self.waited: set[str] = set()
        self.updates = {
            (value.name, str(attrs.get("updates", "")))
            for value, attrs in zip(function.results, function.result_attrs, strict=True)
        }

    def check(self) -> Iterator[Violation]:
        """Violations in program order."""
        function = self.function
        for index, op in enumerate(function.ops):
            step = {"free": self._free, "wait": self._wait}.get(op.name, self._action)
            for message in step(op):
                yield Violation(message, function, index)
        for value in function.results:
            for message in self._reads(value.name):
                yield Violation(message, function, len(function.ops))
        for name, op in self.handles.items():
            yield Violation(f"%{name} is started and not waited for", function,
                            function.ops.index(op))  # fmt: skip

    def _reads(self, name: str) -> Iterator[str]:
        if name in self.ended:
            yield f"%{name} is used after it was {self.ended[name]}"
        if name in self.handles or name in self.waited:
            yield f"%{name} is not a value, but what `wait` turns into one"

    def _in_flight(self, name: str) -> str:
        for handle, op in self.handles.items():
            if name == handle or any(value.name == name for value in op.operands):
                return f"while %{handle} is not waited for"
        return ""

    def _free(self, op: Op) -> Iterator[str]:
        for value in op.operands:
            if value.name in self.ended:
                yield f"{value} is freed after it was {self.ended[value.name]}"
            if value.name in self.params:
                yield f"{value} is freed, but parameters belong to the caller"
            if reason := self._in_flight(value.name):
                yield f"{value} is freed {reason}"
            self.ended[value.name] = "freed"

    def _wait(self, op: Op) -> Iterator[str]:
        (handle,) = op.operands
        if handle.name in self.ended:
            yield f"{handle} is used after it was {self.ended[handle.name]}"
        if self.handles.pop(handle.name, None) is None:
            again = " any more" if handle.name in self.waited else ""
            yield f"{handle} is nothing to wait for{again}: it is not a result of an async action"
        self.waited.add(handle.name)

    def _action(self, op: Op) -> Iterator[str]:
        for value in op.operands:
            yield from self._reads(value.name)
        if op.attrs.get("async"):
            if len(op.results) == 1:
                self.handles[op.results[0].name] = op
            else:
                yield f"{op.name} has no result to wait for, so it cannot be async"
        if op.attrs.get("inplace"):
            yield from self._overwrite(op)

    def _overwrite(self, op: Op) -> Iterator[str]:
        for position, result in zip(OVERWRITES[op.name], op.results, strict=True):
            name = op.operands[position].name
            if sum(value.name == name for value in op.operands) > 1:
                yield f"{op.name} overwrites %{name}, which it also reads elsewhere"
            if reason := self._in_flight(name):
                yield f"%{name} is overwritten {reason}"
            if name in self.params and (result.name, name) not in self.updates:
                yield f"{op.name} overwrites %{name}, but {result} is not returned as its update"
            self.ended[name] = "overwritten"


RULES: tuple[Rule, ...] = (
    Rule("flat", "calls are inlined, but those of kernel functions, which only compute", _flat),
    Rule("lives", "starts have waits, nothing is used after its end",
         lambda module: _Lives(module.entry).check()),
)  # fmt: skip
NOT_YET: tuple[Rule, ...] = (
    op_rule("not-yet", "`async` and `inplace` belong to the schedule level", _early),
)
