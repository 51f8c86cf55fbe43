"""What was traced for a compiled program, and which calls it serves.

A tracing without symbols serves one signature. One with symbols serves all sizes that meet its
conditions: a new size is a substitution, and its plan takes the placement of an earlier one.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from typing import Any

from ..ir.errors import CompileError
from ..ir.module import Module
from .calls import Call, Changes, Key, refuse_empty
from .capture import first_line
from .driver import Program
from .dynamic_dims import Bounds, Declared, DynamicDims, marks_of
from .dynamic_graph import SymbolicProgram
from .locate import caller_span
from .structure import Structure
from .trace import Captured

log = logging.getLogger("weft.recompiles")

#: traces of one program after which a warning says how to avoid them; torch.compile gives up after
#: as many (torch._dynamo.config.recompile_limit)
MANY_TRACES = 8
#: what tracing with symbols may raise where tracing without them would not: the program's own code
#: is given symbols for numbers
_SYMBOL_ERRORS = (CompileError, TypeError, ValueError, RuntimeError)
#: what sizes were checked against: the version of what was declared, and the marks of the tensors
Checked = tuple[int, tuple[dict[int, Bounds], ...]]


@dataclass
class Tracing:
    """One trace of a program.

    Attributes:
        captured: gives the program of a graph without symbols.
        symbolic: the graph with symbols; None for a trace of one signature.
        placed: placed modules of the plans that were searched for it, whatever their sizes.
    """

    captured: Captured[tuple[Program, Structure]]
    symbolic: SymbolicProgram | None
    placed: list[Module] = field(default_factory=list)

    def lower(self, call: Call) -> tuple[Program, Structure]:
        """The program for a call, and the structure of its result."""
        if self.symbolic is None:
            return self.captured.lowered()
        shapes = call.key.shapes
        outputs = self.symbolic.outputs_at(self.captured.outputs, shapes)
        program, structure = self.captured.lower(self.symbolic.at(shapes), outputs)
        tensors = dict(zip(call.name_inputs(), call.tensors, strict=True))
        return replace(program, inputs=tensors), structure


class Tracings:
    """The traces of one compiled program.

    Args:
        dynamic_shapes: of `weft.compile`.

    Attributes:
        count: how often the program was traced.
    """

    def __init__(self, dynamic_shapes: Any = None) -> None:
        self.declared = Declared(dynamic_shapes)
        self.count = 0
        self._symbolic: dict[Key, list[Tracing]] = {}
        self._last: Key | None = None

    def find(self, call: Call) -> Tracing:
        """A trace that serves a call, made where there is none.

        Raises what tracing raises.
        """
        names, key = call.name_inputs(), call.key
        dims = self.declared.of(call.program, names, call.tensors)
        misfits: list[str] = []
        for tracing in self._symbolic.get(key.without_sizes, ()):
            assert tracing.symbolic is not None
            reason = tracing.symbolic.misfit(key.shapes)
            if not reason:
                return tracing
            misfits.append(reason)
        if self._last is not None:
            self._tell(call.title, Changes.between(self._last, key, names), misfits)
        tracing = self._trace(call, dims)
        self.count += 1
        self._last = key
        return tracing

    def check(self, call: Call, before: Checked | None = None) -> Checked:
        """Check the sizes of a call, unless nothing was marked since the check `before` of its key.

        Raises CompileError W0302 for an input without elements, W0306 for a size out of its bounds.
        """
        marks = tuple(marks_of(tensor) for tensor in call.tensors)
        if before != (self.declared.version, marks):
            names = call.name_inputs()
            refuse_empty(names, call.key.shapes, caller_span())
            self.declared.of(call.program, names, call.tensors).check(call.key.shapes)
        return self.declared.version, marks

    @property
    def families(self) -> list[Tracing]:
        """The traces with symbols, oldest first."""
        return [tracing for found in self._symbolic.values() for tracing in found]

    def seen(self, key: Key) -> None:
        """Remember the last call, for the next log message."""
        self._last = key

    def _trace(self, call: Call, dims: DynamicDims) -> Tracing:
        varying = dims.varying(call.key.shapes) if dims else ()
        if any(varying):
            try:
                captured = call.capture(varying)
                symbolic = SymbolicProgram(captured.program, dims.names)
            except _SYMBOL_ERRORS as error:
                log.warning("%s cannot be traced with dynamic dims, each size is traced: %s",
                            call.title, f"{type(error).__name__}: {first_line(error)}")  # fmt: skip
            else:
                self._tell_fixed(call, dims, symbolic)
                tracing = Tracing(captured, symbolic if symbolic.symbols else None)
                if symbolic.symbols:
                    self._symbolic.setdefault(call.key.without_sizes, []).append(tracing)
                return tracing
        return Tracing(call.capture(()), None)

    def _tell(self, title: str, changes: Changes, misfits: list[str]) -> None:
        """Say why a program is traced again, and how to avoid it."""
        why = f"{changes}; {misfits[-1]}" if misfits else str(changes)
        hint = "" if misfits else changes.how_to_mark()
        text = f"{title} is traced and planned again: {why}"
        log.info("%s%s", text, f". {hint}" if hint else "")
        if self.count == MANY_TRACES:
            log.warning(
                "%s was traced %d times, and is again: %s. %s (WEFT_LOGS=recompiles tells each)",
                title, self.count, why, hint or "keep shapes fixed, or pad, to avoid this",
            )  # fmt: skip

    @staticmethod
    def _tell_fixed(call: Call, dims: DynamicDims, symbolic: SymbolicProgram) -> None:
        """Say which dims are no symbols although the user wants them to be."""
        for tensor, (name, row) in enumerate(zip(dims.names, dims.dims, strict=True)):
            for dim in row:
                size = call.key.shapes[tensor][dim]
                if symbolic.varies(tensor, dim):
                    continue
                if size < 2:
                    log.info("%s.shape[%d] is %d: sizes below 2 have a trace of their own",
                             name, dim, size)  # fmt: skip
                    continue
                condition = symbolic.fixed_by(tensor, dim)
                what = symbolic.text(condition.expression) if condition else "its operators"
                where = f" ({condition.place})" if condition and condition.place else ""
                log.warning(
                    "%s.shape[%d] is marked dynamic, but %s fixes it to %d by %s%s; other sizes "
                    "are traced again", name, dim, call.title, size, what, where,
                )  # fmt: skip


__all__ = ["MANY_TRACES", "Checked", "Tracing", "Tracings"]
