"""Runs passes: verifies after each, times and dumps it, and keeps a reproducer of a failure."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from types import TracebackType

from ..ir.errors import CompileError, Span
from ..ir.module import Function, Module, Op
from ..ir.signature import SignatureError
from ..ir.text import print_module
from ..ir.verify import excerpt, user_span, verify
from .base import Pass
from .pipeline import print_pass, print_pipeline

log = logging.getLogger("weft.passes")

#: what a bug in a pass raises; diagnostics for users pass through, as do interrupts and a full disk
_BUGS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, SignatureError,
         TypeError, ValueError)  # fmt: skip
#: what starts the first line of a reproducer and of a golden test; the pipeline follows
HEADER = "// weft opt:"


@dataclass(frozen=True)
class Stage:
    """A module on its way: `made_by` is the pass as pipeline text, empty for the input."""

    name: str
    made_by: str
    module: Module
    seconds: float = 0.0


class PassManager:
    """Runs a pipeline.

    Args:
        passes: what to run, in order.
        verify_each: check the rules of the level on the input and after each pass.
        dump_dir: folder for `NN-<pass>.weft` after each pass, `00-input.weft` first.
        print_after: names of passes after which the module is printed to stderr.
        progress: called before each pass with (index, number of passes, pass).
        reproducers: folder for reproducers; `dump_dir` or the system's temporary folder if absent.

    Attributes:
        stages: the input and the module after each pass, filled by `run`.

    Raises:
        CompileError: W0601 for a name in `print_after` that is no pass of the pipeline.
    """

    def __init__(
        self,
        passes: Sequence[Pass],
        verify_each: bool = True,
        dump_dir: Path | None = None,
        print_after: Iterable[str] = (),
        progress: Callable[[int, int, Pass], None] | None = None,
        reproducers: Path | None = None,
    ) -> None:
        self.passes = tuple(passes)
        self.verify_each, self.dump_dir = verify_each, dump_dir
        self.print_after, self.progress = frozenset(print_after), progress
        self.reproducers = reproducers or dump_dir or Path(tempfile.gettempdir())
        self.stages: list[Stage] = []
        names = sorted({item.name for item in self.passes})
        for name in sorted(self.print_after.difference(names)):
            raise CompileError(
                "W0601",
                f"nothing to print after {name!r}",
                reason=f"the pipeline runs {', '.join(names) or 'no pass'}",
            )

    def run(self, module: Module) -> Module:
        """The module after all passes.

        Raises:
            CompileError: W0602 when a pass fails or breaks a rule of the level, with the op, the
                user's line and the path of a reproducer; W02xx when the input breaks a rule; what
                a pass reports about the program itself.
        """
        if self.verify_each:
            verify(module)
        self.stages = []
        self._keep(Stage("input", "", module))
        log.debug("pipeline: %s", print_pipeline(self.passes))
        for index, item in enumerate(self.passes):
            if self.progress is not None:
                self.progress(index, len(self.passes), item)
            started = time.perf_counter()
            module = self._run_one(item, module)
            seconds = time.perf_counter() - started
            self._keep(Stage(item.name, print_pass(item), module, seconds))
            log.getChild(item.name).info(
                "%d of %d: %.3f s, %s, %d functions, %d ops", index + 1, len(self.passes), seconds,
                module.level, len(module.functions),
                sum(len(function.ops) for function in module.functions),
            )  # fmt: skip
            if item.name in self.print_after:
                print(f"// after {print_pass(item)}\n{print_module(module)}", file=sys.stderr)
        return module

    def _keep(self, stage: Stage) -> None:
        if self.dump_dir is not None:
            path = self.dump_dir / f"{len(self.stages):02d}-{stage.name}.weft"
            write_whole(path, print_module(stage.module))
        self.stages.append(stage)

    def _run_one(self, item: Pass, module: Module) -> Module:
        if module.level not in item.levels:
            raise CompileError(
                "W0601",
                f"pass {item.name} does not take a module at level {module.level}",
                reason=f"it takes {', '.join(item.levels)}",
                hint=f"the pipeline is {print_pipeline(self.passes)}",
            )
        try:
            result = item.run(module)
        except _BUGS as error:
            raise self._failure(item, module, error) from error
        if self.verify_each:
            try:
                verify(result, pass_name=item.name)
            except CompileError as error:
                path = self._reproducer(item, module)
                raise CompileError(
                    "W0602",
                    f"the result of pass {item.name} is malformed: {error.message}",
                    span=error.span,
                    reason=error.reason,
                    hint=f"`weft opt {path}` repeats it; please report it with that file",
                ) from error
        return result

    def _failure(self, item: Pass, module: Module, error: Exception) -> CompileError:
        path = self._reproducer(item, module)
        lines = [f"{type(error).__name__}: {error}"]
        span: Span | None = None
        place = _place(error.__traceback__, module)
        if place is not None:
            function, index = place
            loc = function.ops[index].loc
            span = user_span(loc.file, loc.line)
            lines.append(f"at {function.ops[index].name} of @{function.name}, from {loc}")
            lines += [f"  {line}" for line in excerpt(function, index)]
        return CompileError(
            "W0602",
            f"pass {item.name} failed",
            span=span,
            reason="\n    ".join(lines),
            hint=f"`weft opt {path}` repeats it; please report it with that file",
        )

    def _reproducer(self, item: Pass, module: Module) -> Path:
        """Write the pass and its input to one file."""
        text = f"{HEADER} {print_pass(item)}\n{print_module(module)}"
        digest = sha256(text.encode()).hexdigest()[:8]
        path = self.reproducers / f"weft-{item.name}-{digest}.weft"
        write_whole(path, text)
        return path


def write_whole(path: Path, text: str) -> None:
    """Write a file under a temporary name, then rename it: a reader never sees a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        raise


def _place(traceback: TracebackType | None, module: Module) -> tuple[Function, int] | None:
    """The op that the failing pass looked at: the innermost local variable that is an op."""
    seen: list[Op] = []
    while traceback is not None:
        local = traceback.tb_frame.f_locals.values()
        seen += [value for value in local if isinstance(value, Op)]
        traceback = traceback.tb_next
    for op in reversed(seen):
        names = {value.name for value in op.results}
        for function in module.functions:
            for index, other in enumerate(function.ops):
                if other == op or (names and names == {value.name for value in other.results}):
                    return function, index
    return None
