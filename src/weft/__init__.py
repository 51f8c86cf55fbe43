"""weft: weave a one-device PyTorch program across a cluster."""

from .frontend.api import plan
from .frontend.compiled import compile
from .frontend.plan import VERSION, Plan
from .ir.errors import CompileError, RunError, WeftError
from .runtime.executable import load

__version__ = VERSION
__all__ = ["CompileError", "Plan", "RunError", "WeftError", "compile", "load", "plan"]
