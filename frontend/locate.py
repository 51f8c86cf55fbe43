"""Places in the user's program: from traced nodes, and from exceptions."""

from __future__ import annotations

import linecache
import re
import traceback
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from types import TracebackType

import torch
from torch.fx import Node

from ..ir.errors import Span
from ..ir.module import Location
from ..ir.verify import user_span as line_span

_OWN = f"{Path(__file__).parent}/"
#: frames below these folders are not the user's: torch, and the frontend itself
_INTERNAL = (f"{Path(torch.__file__).parent}/", _OWN)
#: what these put in place of torch's functions stands between the user's call and torch
_STAND_INS = tuple(
    f"{_OWN}{name}.py"
    for name in ("capture", "own_gradients", "repeats", "rewrites", "step_recorder", "train_step")
)
_FRAME = re.compile(r'File "([^"]+)", line (\d+), in ')


def is_internal(file: str) -> bool:
    """Does a frame of this file belong to torch or to weft's tracing?"""
    return file.startswith(_INTERNAL) or file.startswith("<")


@lru_cache(maxsize=4096)
def _user_frame(stack: str) -> tuple[str, int]:
    """(file, line) of the innermost frame outside torch; ("", 0) when there is none."""
    for file, line in reversed(_FRAME.findall(stack)):
        if not is_internal(file):
            return file, int(line)
    return "", 0


def module_path(node: Node, prefix: str) -> str:
    """The path of the innermost module that a node belongs to, without `prefix`."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = str(next(reversed(stack.values()))[0])
    path = re.sub(r"@\d+$", "", path)  # a module that is called several times
    return path.removeprefix(prefix).removeprefix(".")


def node_location(node: Node, prefix: str = "") -> Location:
    """Where a traced node comes from."""
    file, line = _user_frame(node.meta.get("stack_trace") or "")
    return Location(module_path(node, prefix), file, line)


def user_frames(stack: traceback.StackSummary) -> traceback.StackSummary:
    """The frames of the program that is being traced, outermost first."""
    kept: list[traceback.FrameSummary] = []
    for frame in reversed(stack):
        if frame.filename in _STAND_INS or frame.name == "__torch_function__":
            continue
        if frame.filename.startswith(_OWN):
            break  # further out is whoever called the tracing
        if not is_internal(frame.filename):
            kept.append(frame)
    return traceback.StackSummary.from_list(kept[::-1])


def user_span(tb: TracebackType | None) -> Span | None:
    """The innermost place of a traceback that lies in the user's code, or None."""
    for frame in reversed(traceback.extract_tb(tb)):
        if not is_internal(frame.filename):
            text = linecache.getline(frame.filename, frame.lineno or 0).rstrip("\n")
            column = (frame.colno or 0) + 1
            same_line = frame.end_lineno in (None, frame.lineno)
            end = frame.end_colno if same_line and frame.end_colno else len(text)
            return Span(frame.filename, frame.lineno or 0, column, text, max(1, end - column + 1))
    return None


def caller_span() -> Span | None:
    """The user's line that calls what runs now; None where nobody does."""
    for frame in reversed(traceback.extract_stack()):
        if not is_internal(frame.filename):
            return line_span(frame.filename, frame.lineno or 0)
    return None


def user_traceback(tb: TracebackType | None) -> TracebackType | None:
    """A traceback with the frames of torch and of weft left out; None when nothing is left."""
    return without_frames(tb, is_internal)


def without_frames(
    tb: TracebackType | None, hidden: Callable[[str], bool]
) -> TracebackType | None:
    """A traceback without the frames whose file is `hidden`; None when nothing is left."""
    kept: list[TracebackType] = []
    while tb is not None:
        if not hidden(tb.tb_frame.f_code.co_filename):
            kept.append(tb)
        tb = tb.tb_next
    out: TracebackType | None = None
    for entry in reversed(kept):
        out = TracebackType(out, entry.tb_frame, entry.tb_lasti, entry.tb_lineno)
    return out
