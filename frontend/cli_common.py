"""What the commands share: the console, types of arguments, and how a diagnostic is shown."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, NoReturn

import click
from rich.console import Console

from ..ir.errors import WeftError
from .options import OPTIONS

console = Console(highlight=False)
FOLDER = click.Path(path_type=Path)
SEED = click.IntRange(0, 2**62)


def diagnosed(command: Callable[..., Any]) -> Callable[..., Any]:
    """Print a diagnostic instead of a traceback; exit with 2. Other exceptions keep theirs."""

    @wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except WeftError as error:
            fail(error)

    return wrapped


def fail(error: WeftError) -> NoReturn:
    """Print a diagnostic on standard error, with all frames if they are asked for, and exit."""
    if OPTIONS.full_tracebacks:
        traceback.print_exception(error)
    Console(stderr=True, highlight=False).print(error.render(), markup=False, soft_wrap=True)
    sys.exit(2)


__all__ = ["FOLDER", "SEED", "console", "diagnosed", "fail"]
