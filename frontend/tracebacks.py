"""Tracebacks of diagnostics show the user's frames; weft's and torch's own are hidden."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import ParamSpec, TypeVar

import torch

from ..ir.errors import WeftError
from .locate import without_frames
from .options import OPTIONS

NOTE = "frames of weft and torch are hidden; WEFT_TRACEBACKS=full shows them"
_HIDDEN = (
    str(Path(__file__).parents[1]) + "/",
    str(Path(torch.__file__).parent) + "/",
    contextlib.__file__,
)

P = ParamSpec("P")
R = TypeVar("R")


def users_frames(traceback: TracebackType | None) -> TracebackType | None:
    """A traceback without the frames of weft and torch; None where no other is left."""
    return without_frames(traceback, lambda file: file.startswith(_HIDDEN))


def shows_users_frames(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator of what users call: a diagnostic leaves it with the user's frames and a note."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except WeftError as error:
            if OPTIONS.full_tracebacks:
                raise
            if NOTE not in getattr(error, "__notes__", ()):
                error.add_note(NOTE)
            raise error.with_traceback(users_frames(error.__traceback__)) from None

    return wrapped


__all__ = ["NOTE", "shows_users_frames", "users_frames"]
