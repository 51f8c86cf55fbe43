"""The verifier: one table of rules per level, and messages that show the place."""

from __future__ import annotations

import linecache
from itertools import islice

from . import rules_placed, rules_program, rules_schedule, rules_spmd, rules_types
from .errors import CompileError, Span
from .module import Function, Module
from .rule import Rule, Violation
from .text import print_header, print_op, print_return

_PROGRAM = (*rules_program.RULES, *rules_types.RULES, *rules_program.LATE)
_PLACED = (*_PROGRAM, *rules_placed.RULES)
_SPMD = (*_PLACED, *rules_spmd.RULES)

#: level -> its rules, in the order in which they are checked: later ones rely on earlier ones
RULES: dict[str, tuple[Rule, ...]] = {
    "logical": (*_PROGRAM, *rules_placed.LOGICAL, *rules_schedule.NOT_YET),
    "placed": (*_PLACED, *rules_schedule.NOT_YET),
    "spmd": (*_SPMD, *rules_schedule.NOT_YET),
    "schedule": (*_SPMD, *rules_schedule.RULES),
}
#: Characters of a line that a message shows: the header of an entry may have thousands.
_WIDEST = 240
#: Ops that a message shows before and behind the offending one, ten in all.
_BEFORE, _BEHIND = 5, 4
#: Violations that a message counts at most.
_COUNTED = 100


def verify(module: Module, *, pass_name: str = "") -> None:
    """Check all rules of the module's level.

    Args:
        pass_name: the pass that made the module, for the message.

    Raises:
        CompileError: W0201 a rule of the level is broken, W0202 shapes or dtypes do not fit, W0203
            placements do not fit. The message names the rule, the pass and the user's line, and
            prints the ops around.
    """
    for rule in RULES.get(module.level, rules_program.RULES[:1]):
        violations = rule.check(module)
        first = next(violations, None)
        if first is not None:
            raise _error(rule, first, sum(1 for _ in islice(violations, _COUNTED)), pass_name)


def _error(rule: Rule, violation: Violation, more: int, pass_name: str) -> CompileError:
    after = f" after the pass {pass_name}" if pass_name else ""
    message = f"rule `{rule.name}`{after}: {violation.message}"
    lines = [rule.doc]
    if more:
        lines.append(f"{more}{' or more' if more == _COUNTED else ''} further violations")
    span = None
    if violation.function is not None:
        function, index = violation.function, violation.index
        if 0 <= index < len(function.ops):
            loc = function.ops[index].loc
            span = user_span(loc.file, loc.line)
            if loc.path:
                lines.append(f"in {loc.path}")
        lines += [f"  {line}" for line in excerpt(function, index)]
    reason = "\n    ".join(lines)
    return CompileError(violation.code, message, span=span, reason=reason, hint=violation.hint)


def user_span(file: str, line: int) -> Span | None:
    """The user's line, with its text where the file can be read; None without a file."""
    if not file:
        return None
    try:
        text = linecache.getline(file, line).rstrip()
    except ValueError:  # a name that no file can have
        text = ""
    code = text.lstrip()
    return Span(file, line, len(text) - len(code) + 1, text, len(code))


def excerpt(function: Function, index: int) -> list[str]:
    """The function's header and up to ten ops around op `index`, which is marked with carets.

    -1 marks the header, the number of ops the `return`.
    """
    rows = [print_header(function)]
    rows += [f"  {print_op(op)}" for op in function.ops]
    rows.append(f"  {print_return(function)}")
    mark = index + 1
    first, last = max(1, mark - _BEFORE), min(len(rows) - 1, max(mark, 1) + _BEHIND)
    shown = [0, *range(first, last + 1)]
    out: list[str] = []
    for previous, row in zip([-1, *shown], shown, strict=False):
        if row != previous + 1:
            out.append("  ...")
        text = rows[row]
        if len(text) > _WIDEST:
            text = text[: _WIDEST - 4] + " ..."
        out.append(text)
        if row == mark:
            start = len(text) - len(text.lstrip())
            out.append(" " * start + "^" * (len(text) - start))
    if last < len(rows) - 1:
        out.append("  ...")
    return out
