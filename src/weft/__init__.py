"""weft: weave a one-device PyTorch program across a cluster."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .frontend.api import plan
    from .frontend.compiled import compile
    from .frontend.load import load
    from .frontend.plan import Plan
    from .frontend.searching import search
    from .ir.errors import CompileError, RunError, WeftError

__version__: str
__all__ = ["CompileError", "Plan", "RunError", "WeftError", "compile", "load", "plan", "search"]

#: public name -> the module that has it, and its name there
_HOMES = {
    "CompileError": ("ir.errors", "CompileError"), "RunError": ("ir.errors", "RunError"),
    "WeftError": ("ir.errors", "WeftError"), "Plan": ("frontend.plan", "Plan"),
    "__version__": ("frontend.plan", "VERSION"), "compile": ("frontend.compiled", "compile"),
    "load": ("frontend.load", "load"), "plan": ("frontend.api", "plan"),
    "search": ("frontend.searching", "search"),
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Names are loaded when they are asked for: `weft.ir` opens a dump without torch, and a
    machine that only runs plans never loads the compiler."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home, attribute = _HOMES[name]
    value = getattr(import_module(f".{home}", __name__), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
