"""WEFT_LOGS: which of weft's loggers speak, in the grammar of TORCH_LOGS.

A comma-separated list of names: `place` shows a logger's INFO messages, `+place` its DEBUG messages
as well, `-place` its errors only; `all` is all of them, `help` prints the names. What is not named
shows warnings. Each name is a logger `weft.NAME`; that of a pass is `weft.passes.NAME`.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from typing import TextIO

from ..ir.errors import CompileError
from .pass_table import ALL_PASSES

#: name -> what it tells
LOGGERS: dict[str, str] = {
    "trace": "what is traced, which operators have no rule of their own",
    "recompiles": "why a program is traced and planned again, and how to avoid it",
    "passes": "each pass: time, level, functions and ops; + the pipeline",
    "place": "the placement chosen on each mesh: time, gap, memory; + the split of each op",
    "run": "artifacts and ranks that start, steps; + each step's results",
    "nan": "the first action whose result is not finite; costs a check of each result",
}
#: every pass is a name as well
_PASSES = tuple(ALL_PASSES)
_LEVELS = {"": logging.INFO, "+": logging.DEBUG, "-": logging.ERROR}


def parse_logs(items: Sequence[str]) -> dict[str, int]:
    """Name -> level, in order; `help` is a name too. Raises CompileError W1001 for another one."""
    levels: dict[str, int] = {}
    for item in items:
        sign = item[0] if item[:1] in ("+", "-") else ""
        name = item[len(sign) :].strip().removeprefix("weft.")
        if name == "all":
            levels.update(dict.fromkeys(LOGGERS, _LEVELS[sign]))
        elif name in LOGGERS or name in _PASSES or (name == "help" and not sign):
            levels[name] = _LEVELS[sign]
        else:
            near = get_close_matches(name, [*LOGGERS, *_PASSES], 1)
            raise CompileError(
                "W1001",
                f"WEFT_LOGS: there is no logger {name!r}",
                reason=f"the names are {', '.join(LOGGERS)}, all, help, and those of the passes",
                hint=f"did you mean {near[0]!r}?" if near else "WEFT_LOGS=help says what each tells",
            )
    return levels


def help_text() -> str:
    """What `WEFT_LOGS=help` prints."""
    rows = [f"  {name:<12}{what}" for name, what in LOGGERS.items()]
    return "\n".join([
        "WEFT_LOGS is a comma-separated list of names, such as trace,+place,-passes:",
        "NAME shows what happens, +NAME all details, -NAME errors only; all stands for every name.",
        *rows,
        f"and the passes: {', '.join(_PASSES)}",
    ])  # fmt: skip


class _Stderr(logging.StreamHandler[TextIO]):
    """Writes to what standard error is now: pytest and notebooks replace it."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:
        return sys.stderr

    @stream.setter
    def stream(self, value: TextIO) -> None:
        raise AttributeError("the stream is always sys.stderr")


def configure(items: Sequence[str]) -> None:
    """Set the levels of weft's loggers and print help where it is asked for.

    Without items nothing changes, and Python's logging configuration rules. Raises CompileError.
    """
    levels = parse_logs(items)
    if not levels:
        return
    if levels.pop("help", None) is not None:
        print(help_text(), file=sys.stderr)
    root = logging.getLogger("weft")
    if not any(isinstance(handler, _Stderr) for handler in root.handlers):
        handler = _Stderr()
        handler.setFormatter(logging.Formatter("[%(name)s] %(message)s"))
        root.addHandler(handler)
        root.propagate = False
    for name, level in levels.items():
        if name in LOGGERS:
            logging.getLogger(f"weft.{name}").setLevel(level)
        if name in _PASSES:
            logging.getLogger(f"weft.passes.{name}").setLevel(level)
