"""Diagnostics: every message a user can see has a stable code, a place, a reason and a way out.

One table (`CODES`) holds the closed set of codes, so that a code can be looked up in a minute.
`CompileError` is raised before anything runs, `RunError` while a plan runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

CODES: dict[str, str] = {
    "W0101": "text: the .weft text is malformed",
    "W0102": "text: unknown op, dtype, level or attribute",
    "W0103": "text: a value is used before it is defined, or defined twice",
    "W0201": "verify: the module breaks a rule of its level",
    "W0202": "verify: operand or result shapes do not fit the op's signature",
    "W0203": "verify: placements do not fit the op's split",
    "W0301": "trace: control flow depends on the data",
    "W0302": "trace: the program cannot be traced",
    "W0303": "trace: the optimizer is not supported",
    "W0304": "trace: the train step does not call backward() and step() in a supported way",
    "W0306": "trace: a size is out of the bounds of its dynamic dim",
    "W0401": "plan: an op cannot be split as asked",
    "W0402": "plan: no placement satisfies the constraints",
    "W0404": "plan: the program cannot be cut into micro-batches or stages as asked",
    "W0501": "cluster: the cluster specification is not understood",
    "W0601": "pass: unknown pass or option",
    "W0602": "pass: a pass failed",
    "W0701": "artifact: missing, truncated or modified file",
    "W0702": "artifact: written by another version",
    "W0801": "run: the world size does not match the plan",
    "W0802": "run: the schedules of the ranks do not agree",
    "W0803": "run: a rank failed or did not answer in time",
    "W0804": "run: inputs do not match the plan",
    "W0901": "codegen: a kernel cannot be generated or built",
    "W0902": "codegen: the backend for CPUs cannot compile",
    "W1001": "command line: bad arguments",
    "W1101": "checkpoint: there is none",
    "W1102": "checkpoint: it does not fit the plan",
    "W1103": "checkpoint: truncated or modified file",
    "W1104": "checkpoint: written by another version",
    "W1105": "checkpoint: it could not be written",
    "W1106": "checkpoint: another job writes to the folder",
    "W1201": "trace file: it does not match the plan",
    "W1301": "cost model: unknown device or op, or a size that no kernel has",
    "W1302": "cost model: a device, calibration or weights file cannot be used",
}


@dataclass(frozen=True)
class Span:
    """A place in a text: 1-based line and column, and the text of that line."""

    file: str
    line: int
    column: int
    text: str = ""
    width: int = 1

    def render(self) -> str:
        """Return `file:line:column` and, when known, the line with a caret below it."""
        head = f"{self.file}:{self.line}:{self.column}"
        if not self.text:
            return head
        shown = self.text.replace("\t", " ")
        return f"{head}\n    {shown}\n    {' ' * (self.column - 1)}{'^' * max(1, self.width)}"


class WeftError(Exception):
    """Base of all diagnostics.

    Args:
        code: one of `CODES`.
        message: what is wrong, in one sentence.
        span: where, in the user's source or in a `.weft` text.
        reason: why it is wrong.
        hint: what to do about it.
    """

    def __init__(
        self,
        code: str,
        message: str,
        *,
        span: Span | None = None,
        reason: str = "",
        hint: str = "",
    ) -> None:
        if code not in CODES:
            raise KeyError(f"unknown diagnostic code {code}")
        self.code, self.message, self.span = code, message, span
        self.reason, self.hint = reason, hint
        super().__init__(self.render())

    def __reduce__(self) -> tuple[Any, ...]:
        """Diagnostics travel between ranks, with all their parts."""
        return _rebuilt, (type(self), self.code, self.message, self.span, self.reason, self.hint)

    def render(self) -> str:
        """Return the whole diagnostic as text, most important line first."""
        parts = [f"[{self.code}] {self.message}"]
        if self.span is not None:
            parts.append(f"  at {self.span.render()}")
        if self.reason:
            parts.append(f"  why: {self.reason}")
        if self.hint:
            parts.append(f"  try: {self.hint}")
        return "\n".join(parts)


def _rebuilt(
    kind: type[WeftError], code: str, message: str, span: Span | None, reason: str, hint: str
) -> WeftError:
    return kind(code, message, span=span, reason=reason, hint=hint)


class CompileError(WeftError):
    """The program cannot be compiled as asked; nothing has run and nothing was written."""


class RunError(WeftError):
    """A plan cannot be run, or failed while it ran."""
