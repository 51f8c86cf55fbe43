"""Compiled train steps: a plan that owns parameters and optimizer state."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..ir.errors import CompileError
from .api import step_program
from .calls import Call
from .capture import VaryingDims
from .driver import Program
from .entries import Compiler, Entry, mode_of, state_of
from .optimizers import UNCOUNTED, refuse_late
from .owners import register
from .plan import Plan
from .state import StepState
from .structure import Structure
from .trace import Captured, input_names
from .tracebacks import shows_users_frames
from .train_step import TracedStep, capture_train_step


class TrainStep(StepState):
    """A compiled `(model, optimizer, *batch) -> loss`.

    After its first call the compiled step owns the parameters and the optimizer's state. On one
    rank, and for whole parameters on several, the model's tensors share their memory, so the model
    is always up to date; `sync()` writes everything back into model and optimizer. What is written
    into the model's tensors between steps (`model.load_state_dict`, say) is taken over.
    """

    def __init__(self, function: Callable[..., Any], compiler: Compiler) -> None:
        super().__init__()
        functools.update_wrapper(self, function)
        self.function, self.compiler = function, compiler
        self._owner: tuple[torch.nn.Module, torch.optim.Optimizer] | None = None
        self._current: Entry | None = None
        self._seen: dict[str, tuple[int, int]] = {}
        self._behind: dict[str, Tensor] = {}
        self._left: tuple[Tensor, Tensor, int] | None = None
        register(self)

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

        name = getattr(self.function, "__qualname__", "train_step")

        def finish(traced: TracedStep) -> tuple[Program, Structure]:
            return step_program(name, traced, batch, kwargs), traced.outputs

        def capture(varying: VaryingDims) -> Captured[tuple[Program, Structure]]:
            captured = capture_train_step(
                self.function, model, optimizer, batch, kwargs, varying
            )
            return captured.then(finish)

        def names() -> list[str]:
            return input_names(self.function, (None, None, *batch), kwargs)

        self._refuse_kept_gradients()
        mode = (*mode_of(model), *_settings(model, optimizer))
        call = Call.of(self.function, batch, kwargs, mode, names, capture)
        entry = self.compiler.find(call)
        self._take_changes(model)
        if entry is not self._current:
            self._move_state(entry)
        tensors = [tensor.detach() for tensor in call.tensors]
        rates = [float(group["lr"]) for group in optimizer.param_groups]
        results = entry.running.step(*tensors, lr=rates, seed=self.compiler.seed())
        vars(optimizer)["_opt_called"] = True  # schedulers of torch warn without it
        self._refresh()
        if entry.plan.meta.get("keeps_gradients"):
            self._leave_gradient(model)
        return entry.outputs.build(results)

    def _leave_gradient(self, model: torch.nn.Module) -> None:
        """Leave zeros in place of one gradient, to see whether they are cleared outside."""
        trained = (p for p in model.parameters() if p.requires_grad)
        param = min(trained, key=lambda p: p.numel())
        param.grad = torch.zeros_like(param)
        self._left = param, param.grad, param.grad._version

    def _refuse_kept_gradients(self) -> None:
        """Raise CompileError where eager would add to the gradients of the last step."""
        if self._left is None:
            return
        param, zeros, version = self._left
        if param.grad is zeros and zeros._version == version:
            raise CompileError(
                "W0304", "the gradients of the last step were not cleared",
                reason="the step neither begins nor ends with zero_grad(), so eager would add to them",
                hint="call optimizer.zero_grad() in the step, or between steps; accumulate over a "
                "loop inside of the step",
            )  # fmt: skip
        self._left = param.grad = None

    def _move_state(self, entry: Entry) -> None:
        """Load the state of the last plan, or of the model and optimizer."""
        first = self._current is None
        if self._current is None:
            entry.running.load_state(entry.plan.weights)
        elif not entry.running.share_state(self._current.running):
            last = self._current.running
            self._refuse_late(entry)
            state = {**entry.plan.weights, **last.state_dict()}
            entry.running.load_state(state, strict=False)
            if last.state_types.keys() <= entry.running.state_types.keys():
                last.drop_state()  # held once; a plan that takes over again gets all of it
        self._current = entry
        if first:
            self._ready()

    def _refuse_late(self, entry: Entry) -> None:
        """Raise CompileError W0303 where parameters join an optimizer that counts steps."""
        assert self._current is not None
        before = self._current.running.state_types
        if "step" not in before or "step" not in entry.running.state_types:
            return
        new = (name.partition("/") for name in entry.running.state_types if name not in before)
        late = sorted({name for kind, found, name in new if found and kind not in UNCOUNTED})
        held = self._current.running.state_dict(full=False, copy=False) if late else {"step": 0.0}
        steps = float(held["step"])
        refuse_late(late if steps else (), steps)

    def _refresh(self) -> None:
        """Let the model's tensors be those of the plan where this rank holds them whole.

        Updates in place keep the memory, others (of buffers) replace it.
        """
        model, entry = self._held()[0], self._entry("state")
        shards = entry.running.state_dict(full=False, copy=False)
        elsewhere = entry.running.elsewhere
        self._seen.clear()
        self._behind.clear()
        for name, tensor in state_of(model).items():
            shard = shards.get(name)
            if shard is None:
                if name in elsewhere:  # of another stage: what is written into it is noticed here too
                    self._seen[name] = (tensor._version, tensor.data_ptr())
                    self._behind[name] = tensor
                continue
            if shard.shape != tensor.shape:
                self._behind[name] = tensor
            elif shard.data_ptr() != tensor.data_ptr():
                tensor.data = shard
            self._seen[name] = (tensor._version, tensor.data_ptr())

    def _take_changes(self, model: torch.nn.Module) -> None:
        """Take over what was written into the model's tensors since the last step."""
        if self._current is None:
            return
        changed = {
            name: tensor.detach()
            for name, tensor in state_of(model).items()
            if name in self._seen and self._seen[name] != (tensor._version, tensor.data_ptr())
        }
        if changed:
            self._take(changed, strict=False)

    @property
    def model(self) -> torch.nn.Module | None:
        """The model whose parameters this step holds; None before its first call."""
        return None if self._owner is None else self._owner[0]

    def update_model(self) -> None:
        """Write the current parameters and buffers into the model; all ranks must call."""
        if self._current is None:
            return
        running, model = self._current.running, self._held()[0]
        named = state_of(model)
        # all ranks gather the same: of several stages, what another one has is behind here only
        names = [n for n in running.state_types if n in (named if running.map.staged else self._behind)]
        if not names:
            return
        self._take_changes(model)
        for name in names:
            whole = running.whole(name)
            if name in self._behind:
                named[name].data.copy_(whole)
        self._behind.clear()

    @property
    def plan(self) -> Plan:
        """The plan of the last call. Raises CompileError before the first one."""
        return self._entry("plan").plan


def _settings(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[object, ...]:
    """What of an optimizer a plan is made for: everything but the learning rates."""
    wanted = tuple(p.requires_grad for p in model.parameters())
    rows = [
        (key, tuple(map(id, value)) if key == "params" else repr(value))
        for group in optimizer.param_groups
        for key, value in group.items()
        if key not in ("lr", "initial_lr")
    ]
    return wanted, tuple(rows)
