"""Finding what the command line names: `module:factory`, a function without arguments."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from types import FunctionType
from typing import Any

import torch

from ..ir.errors import CompileError, Span
from .locate import caller_span
from .options import expect


@dataclass(frozen=True)
class Target:
    """A program with its example inputs.

    Attributes:
        name: `module:factory`.
        program: a module, a plain function, or a train-step function.
        args, kwargs: its example inputs.
        span: the user's line that names them, where it is Python that asks.
    """

    name: str
    program: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    span: Span | None = None


def target_of(model: Any, example_inputs: Sequence[Any] | Mapping[str, Any]) -> Target:
    """What the user's Python asks for. Raises CompileError W1001 for what is no program or inputs."""
    if not callable(model):
        expect(model, (torch.nn.Module, FunctionType), "what is planned")
    expect(example_inputs, (Mapping, Sequence), "example_inputs")
    name = getattr(model, "__qualname__", type(model).__qualname__)
    if isinstance(example_inputs, Mapping):
        return Target(name, model, (), dict(example_inputs), caller_span())
    return Target(name, model, tuple(example_inputs), {}, caller_span())


def is_train_step(program: Any, args: tuple[Any, ...]) -> bool:
    """Is this `(model, optimizer, *batch) -> loss`?"""
    return (
        callable(program)
        and not isinstance(program, torch.nn.Module)
        and len(args) >= 2
        and isinstance(args[0], torch.nn.Module)
        and isinstance(args[1], torch.optim.Optimizer)
    )


def load_target(name: str) -> Target:
    """Import `module:factory` and call the factory. Raises CompileError W1001."""
    module_name, colon, factory_name = name.partition(":")
    if not colon or not module_name or not factory_name:
        raise CompileError(
            "W1001",
            f"{name!r} is not a target",
            reason="a target is module:factory, e.g. examples.llama:train_step",
            hint="name a function without arguments that returns (program, args, kwargs)",
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except (TypeError, ValueError) as error:  # a relative or empty name
        raise CompileError(
            "W1001", f"{module_name!r} is not the name of a module", reason=str(error),
            hint="write it as in an import, e.g. examples.llama",
        ) from None  # fmt: skip
    except ModuleNotFoundError as error:
        if error.name and not module_name.startswith(error.name):
            raise  # the user's module is there, but imports something that is not: their traceback
        raise CompileError(
            "W1001",
            f"there is no module {module_name!r}",
            reason=f"looked in {os.getcwd()} and the installed packages",
            hint="run from the folder that holds the package, or set PYTHONPATH",
        ) from None
    factory = getattr(module, factory_name, None)
    if not callable(factory):
        public = [n for n in vars(module) if callable(getattr(module, n)) and not n.startswith("_")]
        near = get_close_matches(factory_name, public, 1)
        raise CompileError(
            "W1001",
            f"module {module_name!r} has no function {factory_name!r}",
            hint=f"did you mean {near[0]!r}?" if near else f"it has {', '.join(public[:8])}",
        )
    return _unpack(name, factory)


def _unpack(name: str, factory: Callable[[], Any]) -> Target:
    try:
        inspect.signature(factory).bind()
    except TypeError as error:
        raise CompileError(
            "W1001", f"{name} cannot be called without arguments", reason=str(error),
            hint="name a function without arguments that returns (program, args, kwargs)",
        ) from None  # fmt: skip
    except ValueError:
        pass  # a builtin has no signature: the call will tell
    result = factory()
    shaped = isinstance(result, tuple) and len(result) == 3
    if not shaped or not isinstance(result[1], (tuple, list)) or not isinstance(result[2], Mapping):
        raise CompileError(
            "W1001",
            f"{name} returned {type(result).__name__}, not (program, args, kwargs)",
            hint="return the program, a tuple of positional and a dict of keyword inputs",
        )
    program, args, kwargs = result
    return Target(name, program, tuple(args), dict(kwargs))
