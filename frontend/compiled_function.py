"""Compiled functions: of tensors, or train steps."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from ..ir.errors import CompileError
from .api import named_inputs
from .calls import Call
from .capture import VaryingDims
from .compiled_step import TrainStep
from .driver import Program
from .entries import Compiler, Entry, mode_of
from .load_target import is_train_step
from .owners import bring_up_to_date
from .plan import Plan
from .structure import Structure
from .trace import Captured, Traced, capture_forward, input_names
from .tracebacks import shows_users_frames


class CompiledFunction:
    """A compiled plain function of tensors; a train step is told by its first arguments."""

    def __init__(self, function: Callable[..., Any], compiler: Compiler) -> None:
        functools.update_wrapper(self, function)
        self.function, self.compiler = function, compiler
        self.step: TrainStep | None = None
        self._last: Entry | None = None

    @shows_users_frames
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the plan on whole inputs."""
        if is_train_step(self.function, args):
            return self._train_step()(*args, **kwargs)
        modules = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.nn.Module)]
        name = getattr(self.function, "__qualname__", "function")

        def finish(traced: Traced) -> tuple[Program, Structure]:
            named = named_inputs(traced.input_names, args, kwargs)
            program = Program("forward", name, traced.module, traced.tensors, named, {})
            return program, traced.outputs

        def capture(varying: VaryingDims) -> Captured[tuple[Program, Structure]]:
            return capture_forward(self.function, args, kwargs, varying).then(finish)

        def names() -> list[str]:
            return input_names(self.function, args, kwargs)

        bring_up_to_date(*modules)
        call = Call.of(self.function, args, kwargs, mode_of(*modules), names, capture)
        entry = self._last = self.compiler.find(call)
        entry.running.load_state(entry.plan.weights, strict=False)
        tensors = (tensor.detach() for tensor in call.tensors)
        return entry.outputs.build(entry.running.step(*tensors, seed=self.compiler.seed()))

    def __getattr__(self, name: str) -> Any:
        """State of a train step: everything that `TrainStep` has, `save` and `load` among it."""
        if name.startswith("_") or not hasattr(TrainStep, name):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self._train_step(), name)

    def _train_step(self) -> TrainStep:
        if self._last is not None:
            raise CompileError(
                "W0304", "the compiled function is no train step and has no state",
                reason="a train step takes a model and an optimizer first",
                hint="state belongs to the modules that the function is given",
            )  # fmt: skip
        self.step = self.step or TrainStep(self.function, self.compiler)
        return self.step

    @property
    def plan(self) -> Plan:
        """The plan of the last call. Raises CompileError before the first one."""
        if self.step is not None:
            return self.step.plan
        if self._last is None:
            raise CompileError("W0304", "the compiled function has no plan before its first call")
        return self._last.plan
