"""Compiled train steps: a plan that owns parameters and optimizer state."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..ir.errors import CompileError
from .api import step_program
from .driver import Program
from .entries import Compiler, Entry, Key, mode_of, state_of, tensors_of
from .plan import Plan
from .structure import Structure
from .tracebacks import shows_users_frames
from .train_step import trace_train_step


class TrainStep:
    """A compiled `(model, optimizer, *batch) -> loss`.

    After its first call the compiled step owns the parameters and the optimizer's state. On one
    rank, and for whole parameters on several, the model's tensors share their memory, so the model
    is always up to date; `sync()` writes everything back into model and optimizer.
    """

    def __init__(self, function: Callable[..., Any], compiler: Compiler) -> None:
        functools.update_wrapper(self, function)
        self.function, self.compiler = function, compiler
        self._owner: tuple[torch.nn.Module, torch.optim.Optimizer] | None = None
        self._current: Entry | None = None

    @shows_users_frames
    def __call__(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, *batch: Any, **kwargs: Any
    ) -> Any:
        """One step on the whole batch."""
        if self._owner is not None and self._owner != (model, optimizer):
            raise CompileError(
                "W0304",
                "the compiled step was called with another model or optimizer",
                reason="it holds the state of the first one",
                hint="compile the function once more for the other model: weft.compile(step)",
            )
        self._owner = model, optimizer

        def trace() -> tuple[Program, Structure]:
            traced = trace_train_step(self.function, model, optimizer, batch, kwargs)
            name = getattr(self.function, "__qualname__", "train_step")
            return step_program(name, traced, batch, kwargs), traced.outputs

        entry = self.compiler.find(Key.of(batch, kwargs, mode_of(model)), trace)
        if entry is not self._current:
            self._move_state(entry)
        tensors = list(tensors_of(batch, kwargs))
        rates = [float(group["lr"]) for group in optimizer.param_groups]
        results = entry.running.step(*tensors, lr=rates, seed=self.compiler.seed())
        self._share(entry, model)
        return entry.outputs.build(results)

    def _move_state(self, entry: Entry) -> None:
        """Load the state of the last plan, or of the model and optimizer."""
        if self._current is None:
            entry.running.load_state(entry.plan.weights)
        else:
            entry.running.load_state(self._current.running.state_dict(), strict=False)
        self._current = entry

    @staticmethod
    def _share(entry: Entry, model: torch.nn.Module) -> None:
        """Let the model's tensors be those of the plan where this rank holds them whole.

        Updates in place keep the memory, others (of buffers) replace it.
        """
        shards = entry.running.state_dict(full=False, copy=False)
        for name, tensor in state_of(model).items():
            shard = shards.get(name)
            if shard is None or shard.shape != tensor.shape:
                continue
            if shard.data_ptr() != tensor.data_ptr():
                tensor.data = shard

    def state_dict(self, *, dtensor: bool = False) -> dict[str, Tensor]:
        """All state by the user's names (`exp_avg/NAME` for the optimizer's); all ranks call.

        Args:
            dtensor: DTensors on the plan's mesh instead of whole tensors.
        """
        if self._current is None:
            raise CompileError("W0304", "the compiled step has no state before its first call")
        return self._current.running.state_dict(dtensor=dtensor)

    def sync(self) -> None:
        """Write parameters, buffers and optimizer states back into model and optimizer."""
        if self._owner is None or self._current is None:
            return
        model, optimizer = self._owner
        state = self.state_dict()
        named = state_of(model)
        for name, value in state.items():
            if name in named:
                named[name].data.copy_(value)
        by_name = dict(model.named_parameters())
        for key, value in state.items():
            kind, slash, name = key.partition("/")
            if slash and name in by_name:
                optimizer.state[by_name[name]][kind] = value
                if kind != "momentum_buffer":
                    optimizer.state[by_name[name]]["step"] = state["step"].float()

    @property
    def plan(self) -> Plan:
        """The plan of the last call. Raises CompileError before the first one."""
        if self._current is None:
            raise CompileError("W0304", "the compiled step has no plan before its first call")
        return self._current.plan
