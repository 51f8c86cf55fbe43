"""Compiled modules: called as the module is, with autograd through the plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..ir.errors import CompileError, RunError
from ..runtime.checkpoint import Checkpoints
from ..runtime.checkpoint_whole import WholeState
from .api import named_inputs
from .calls import Call
from .capture import VaryingDims
from .driver import Program
from .entries import Compiler, Entry, mode_of, state_of
from .module_state import load_module, module_state
from .owners import bring_up_to_date
from .plan import Plan
from .structure import Structure, flatten
from .trace import Captured, Traced, capture_forward, input_names
from .tracebacks import shows_users_frames
from .train_step import TracedJoint, capture_joint
from .world import join_world


class _Joint(torch.autograd.Function):
    """Autograd's view of a joint plan: parameters and inputs in, outputs out."""

    @staticmethod
    def forward(ctx: Any, module: Any, entry: Entry, inputs: Any, *wanted: Tensor) -> Any:
        ctx.module, ctx.entry = module, entry
        outs = module.begin(entry, inputs)
        ctx.handed = entry.running.hand_over()  # the module may be called again before the backward
        ctx.mark_non_differentiable(*(t for t in outs if not t.is_floating_point()))
        ctx.shapes = [(t.shape, t.dtype) for t in outs]
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *tangents: Any) -> Any:
        entry: Entry = ctx.entry
        device = entry.running.executor.device
        given = [
            torch.zeros(ctx.shapes[n][0], dtype=ctx.shapes[n][1], device=device)
            if tangents[n] is None
            else tangents[n]
            for n in entry.tangents
        ]
        handed, ctx.handed = ctx.handed, None
        if handed is None:
            raise RunError(
                "W0804", "the backward of a compiled module runs a second time",
                reason="its intermediate results are gone after the first",
                hint="add the losses up and call backward() once, or call the module again",
            )  # fmt: skip
        found = entry.running.finish(*given, handed=handed)
        grads = dict(zip(entry.grads, found, strict=True))
        return None, None, None, *(grads[name] for name in entry.grads)


class CompiledModule(torch.nn.Module):
    """A compiled module; its parameters stay those of the module it was made from.

    Without gradients a forward plan runs. With them a joint plan runs up to the outputs, and its
    rest when autograd asks for the gradients.
    """

    def __init__(self, module: torch.nn.Module, compiler: Compiler) -> None:
        super().__init__()
        self.module, self.compiler = module, compiler
        self._last: Entry | None = None
        self._checkpoints: Checkpoints | None = None
        self.extra: dict[str, Any] = {}

    @shows_users_frames
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the plan on whole inputs."""
        tensors, _, _ = flatten((args, kwargs))
        learned = [p for p in self.module.parameters() if p.requires_grad]
        joint = torch.is_grad_enabled() and bool(learned or any(t.requires_grad for t in tensors))
        bring_up_to_date(self.module)
        mode = (joint, *mode_of(self.module))
        entry = self.compiler.find(
            Call.of(
                self.module, args, kwargs, mode,
                lambda: input_names(self.module, args, kwargs),
                lambda varying: self._capture(joint, args, kwargs, varying),
            )
        )  # fmt: skip
        self._last = entry
        self._load(entry)
        if not joint:
            results = entry.running.step(*(t.detach() for t in tensors), seed=self.compiler.seed())
            return entry.outputs.build(self._take(entry, results))
        wanted = [self._tensor(name, entry, tensors) for name in entry.grads]
        run: Callable[..., Any] = _Joint.apply
        return entry.outputs.build(run(self, entry, tensors, *wanted))

    def _capture(
        self, joint: bool, args: tuple[Any, ...], kwargs: dict[str, Any], varying: VaryingDims
    ) -> Captured[tuple[Program, Structure]]:
        name, kind = type(self.module).__qualname__, "joint" if joint else "forward"

        def finish(traced: Traced | TracedJoint) -> tuple[Program, Structure]:
            named = named_inputs(traced.input_names, args, kwargs)
            return Program(kind, name, traced.module, traced.tensors, named, {}), traced.outputs

        if joint:
            return capture_joint(self.module, args, kwargs, varying).then(finish)
        return capture_forward(self.module, args, kwargs, varying).then(finish)

    def begin(self, entry: Entry, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Run a joint plan up to its outputs."""
        results = entry.running.begin(*(t.detach() for t in inputs), seed=self.compiler.seed())
        return self._take(entry, results)

    def _tensor(self, name: str, entry: Entry, tensors: Sequence[Tensor]) -> Tensor:
        named = state_of(self.module)
        if name in named:
            return named[name]
        attrs = entry.plan.module("schedule").entry.param_attrs
        inputs = [str(a["name"]) for a in attrs if a.get("role") == "input"]
        return tensors[inputs.index(name)]

    def _load(self, entry: Entry) -> None:
        """Hand the module's current parameters and buffers to the plan."""
        named = state_of(self.module)
        state = {n: named[n] if n in named else entry.plan.weights[n] for n in entry.weights}
        entry.running.load_state(state, strict=False)

    def _take(self, entry: Entry, results: list[Tensor]) -> list[Tensor]:
        """Write buffers that the plan updated back into the module; the outputs."""
        if entry.updated:
            fresh = entry.running.state_dict()
            named = state_of(self.module)
            for name in entry.updated:
                if name in named:
                    named[name].data.copy_(fresh[name])
        return results

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own, with its own names."""
        bring_up_to_date(self.module)
        return self.module.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As the module's own; the next call takes the new values."""
        return self.module.load_state_dict(*args, **kwargs)

    def save(
        self,
        path: str | Path,
        step: int,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        asynchronous: bool = False,
        keep: int = 2,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        """Write a checkpoint; see `TrainStep.save`, which can load it, as it can load its.

        Args:
            optimizer: the one of the user's loop, whose state is saved too.
        """
        kept = {"user": dict(extra or {}), "seeds": self.compiler.seeds()}
        whole = module_state(self.module, optimizer)
        self._bound(whole).save(path, step, asynchronous=asynchronous, keep=keep, extra=kept)

    def load(
        self, path: str | Path, optimizer: torch.optim.Optimizer | None = None, *,
        strict: bool = True,
    ) -> int:  # fmt: skip
        """Load a checkpoint into the module, and into an optimizer; see `TrainStep.load`."""
        join_world()
        step, found = load_module(self._bound, self.module, optimizer, path, strict)
        self.extra = found.get("user", {})
        if seeds := found.get("seeds"):
            self.compiler.set_seeds(seeds)
        return step

    def wait(self) -> None:
        """Wait for an asynchronous save. Raises what it ended in."""
        if self._checkpoints is not None:
            self._checkpoints.wait()

    def _bound(self, state: WholeState) -> Checkpoints:
        if self._checkpoints is None:
            self._checkpoints = Checkpoints(state)
        else:
            self._checkpoints.bind(state)
        return self._checkpoints

    @property
    def plan(self) -> Plan:
        """The plan of the last call. Raises CompileError before the first one."""
        if self._last is None:
            raise CompileError("W0304", "the compiled module has no plan before its first call")
        return self._last.plan

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)
