"""What a rule of the verifier is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .module import Function, Module, Op


@dataclass(frozen=True, slots=True)
class Violation:
    """A place where a rule is broken.

    Attributes:
        message: what is wrong, in one sentence.
        function: where; None when it is the module as a whole.
        index: which op of the function; -1 its header, the number of ops its `return`.
        code: the diagnostic's code.
        hint: what to do about it.
    """

    message: str
    function: Function | None = None
    index: int = -1
    code: str = "W0201"
    hint: str = ""


@dataclass(frozen=True, slots=True)
class Rule:
    """One line of a level's rule table. `check` yields violations, in program order."""

    name: str
    doc: str
    check: Callable[[Module], Iterator[Violation]]


def op_rule(name: str, doc: str, check: Callable[[Module, Op], str], code: str = "W0201") -> Rule:
    """A rule on single ops: `check(module, op)` returns what is wrong, or ''."""

    def run(module: Module) -> Iterator[Violation]:
        for function in module.functions:
            for index, op in enumerate(function.ops):
                message = check(module, op)
                if message:
                    yield Violation(message, function, index, code)

    return Rule(name, doc, run)
