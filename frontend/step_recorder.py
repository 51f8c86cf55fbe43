"""What a train step does to gradients and parameters, while it is traced.

The user's function runs with the calls of autograd and of the optimizer replaced: the gradients of
the parameters become the results of an operator, `weft::gradients`, so that what the function does
with them (clipping, for instance) is traced; the new parameters become results of `weft::updated`,
so that what it does with those (averages, constraints, an evaluation) is traced as well.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ..ir.errors import CompileError
from ..ir.module import NOWHERE, Location, Value
from ..ir.verify import user_span
from .aten import TABLE, Lowering
from .locate import user_frames
from .traced_optimizer import TracedOptimizer


def _gradients(loss: Tensor, params: list[Tensor], number: int) -> list[Tensor]:
    return [torch.empty_like(param) for param in params]


def _updated(param: Tensor, grad: Tensor) -> Tensor:
    return torch.empty_like(param)


#: stands for the gradients of parameters while a step is traced
gradients_op = torch.library.custom_op("weft::gradients", _gradients, mutates_args=())
gradients_op.register_fake(_gradients)
#: stands for a parameter after the optimizer's step
updated_op = torch.library.custom_op("weft::updated", _updated, mutates_args=())
updated_op.register_fake(_updated)


def _names_of(c: Lowering) -> dict[str, str]:
    described = zip(c.builder.params, c.builder.param_attrs, strict=True)
    return {value.name: str(attrs["name"]) for value, attrs in described}


def _lower_gradients(
    c: Lowering, loss: Value, params: Sequence[Value], number: int
) -> tuple[Value, ...]:
    """Markers for `joint.assemble`."""
    names = _names_of(c)
    if any(value.name not in names for value in params):
        raise _changed_early()
    c.losses[number] = loss
    return tuple(
        c.builder.param(value.type, f"d_{value.name}", role="grad", name=names[value.name],
                        of=number)
        for value in params
    )  # fmt: skip


def _changed_early() -> CompileError:
    return misused("the step changes parameters in place before backward() and optimizer.step()",
                   "change parameters behind optimizer.step(), gradients before it", NOWHERE)  # fmt: skip


def _lower_updated(c: Lowering, param: Value, grad: Value) -> Value:
    """A marker for `optimizers.add_updates`; the gradient leaves as a result of the entry."""
    names = _names_of(c)
    if param.name not in names:
        raise _changed_early()
    name = names[param.name]
    return c.builder.param(param.type, f"new_{param.name}", role="updated", name=name)


TABLE["weft.gradients.default"] = _lower_gradients
TABLE["weft.updated.default"] = _lower_updated


@dataclass(frozen=True)
class _Pending:
    """Parameters whose new values are not written yet, and their gradients."""

    params: Sequence[Tensor]
    grads: Sequence[Tensor]

    @cached_property
    def _memory(self) -> frozenset[int]:
        with _unseen():
            return frozenset(map(_memory_of, (*self.params, *self.grads)))

    def concerns(self, used: Any) -> bool:
        """Does a tensor in a nested object share memory with one of these?"""
        leaves = pytree.tree_leaves(used)
        with _unseen():
            return any(isinstance(x, Tensor) and _memory_of(x) in self._memory for x in leaves)


def _memory_of(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _unseen() -> Any:
    """What is asked of many tensors, and is no part of a trace, need not pass all its modes."""
    return torch._C.DisableTorchFunction()


#: what reads of a tensor only what a step does not change, or its gradient's place
_HARMLESS = frozenset({
    *(getattr(torch.Tensor, name).__get__ for name in (
        "grad", "shape", "dtype", "device", "ndim", "requires_grad", "is_leaf", "layout")),
    vars(torch._C.TensorBase)["grad"].__set__, torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel,
    torch.Tensor.stride, torch.Tensor.is_floating_point, torch.is_floating_point,
})  # fmt: skip


class _Watch(TorchFunctionMode):
    """Has the new parameters written before anything reads them."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Call `func`."""
        if func not in _HARMLESS:
            self.recorder.settle((args, kwargs))
        return func(*args, **(kwargs or {}))


@dataclass
class Recorder:
    """Stands in for autograd and the optimizer while a step is traced.

    Attributes:
        root: what is exported.
        optimizer: the user's.
        trained: exported name of a trained parameter -> its user's name.
        stepped: names of the parameters that the optimizer's step used, in the order of `grads`.
        stepped_at: the user's line that called it.
        own_step: the optimizer's step, where it is to be traced.
        keeps_gradients: the step neither begins nor ends with cleared gradients.
    """

    root: torch.nn.Module
    optimizer: torch.optim.Optimizer
    trained: Mapping[str, str]
    own_step: TracedOptimizer | None = None
    backwards: int = 0
    stepped: list[str] | None = None
    stepped_at: Location = NOWHERE
    grads: list[Tensor] = field(default_factory=list)
    keeps_gradients: bool = False
    _probe: tuple[Tensor, Tensor, int] | None = None
    _versions: list[int] = field(default_factory=list)
    _pending: _Pending | None = None

    def parameters(self) -> list[tuple[str, Tensor]]:
        """The parameters that get gradients, as the trace sees them."""
        named = self.root.named_parameters()
        return [(self.trained[name], p) for name, p in named if name in self.trained]

    # -- autograd -----------------------------------------------------------------------------

    def backward(
        self, loss: Tensor, gradient: Any = None, retain_graph: Any = None,
        create_graph: bool = False, inputs: Any = None,
    ) -> None:  # fmt: skip
        """In place of `Tensor.backward`."""
        self.run_backward(loss, gradient, retain_graph, create_graph, inputs)

    def run_backward(
        self, tensors: Any, grad_tensors: Any = None, retain_graph: Any = None,
        create_graph: bool = False, grad_variables: Any = None, inputs: Any = None,
    ) -> None:  # fmt: skip
        """In place of `torch.autograd.backward`."""
        params = self._chosen(inputs)
        made = self._gradients(tensors, grad_tensors, create_graph, params)
        self._notice_clearing()
        for param, grad in zip(params, made, strict=True):
            with _unseen():
                before = param.grad
            total = grad if before is None else before + grad
            with _unseen():
                param.grad = total

    def grad(
        self, outputs: Any, inputs: Any, grad_outputs: Any = None, retain_graph: Any = None,
        create_graph: bool = False, *args: Any, **kwargs: Any,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """In place of `torch.autograd.grad`."""
        return tuple(self._gradients(outputs, grad_outputs, create_graph, self._chosen(inputs)))

    def _chosen(self, inputs: Any) -> list[Tensor]:
        params = [param for _, param in self.parameters()]
        if inputs is None:
            return params
        chosen = [inputs] if isinstance(inputs, torch.Tensor) else list(inputs)
        if any(not any(one is param for param in params) for one in chosen):
            raise misused("gradients are taken of tensors that the optimizer does not train",
                          "take gradients of the model's parameters; a penalty on other gradients "
                          "needs second derivatives, which weft has not")  # fmt: skip
        return chosen

    def _gradients(
        self, tensors: Any, weights: Any, create_graph: bool, params: list[Tensor]
    ) -> list[Tensor]:
        if self.stepped is not None:
            raise misused("backward() is called after optimizer.step()", "compile one step at a time")
        if create_graph:
            raise misused("gradients are asked for with create_graph=True",
                          "weft takes first derivatives only")  # fmt: skip
        losses = [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)
        given = [weights] if weights is None or isinstance(weights, torch.Tensor) else list(weights)
        given += [None] * (len(losses) - len(given))
        scalars = []
        for loss, weight in zip(losses, given, strict=True):
            if weight is None and loss.numel() != 1:
                raise misused("backward() is called on a tensor that is not a scalar",
                              "reduce the loss to a scalar, or pass `gradient`")  # fmt: skip
            scalars.append(loss if weight is None else (loss * weight.detach()).sum())
        loss = scalars[0] if len(scalars) == 1 else torch.stack([s.reshape(()) for s in scalars]).sum()
        self.backwards += 1
        made: list[Tensor] = torch.ops.weft.gradients(loss, params, self.backwards - 1)
        return made

    # -- the optimizer ------------------------------------------------------------------------

    def step(self, closure: Any = None) -> None:
        """In place of `optimizer.step`."""
        if closure is not None:
            raise misused("optimizer.step() has a closure", "call it without arguments")
        if self.stepped is not None:
            raise misused("optimizer.step() is called twice", "compile one step at a time")
        if not self.backwards:
            raise misused("optimizer.step() is called before backward()",
                          "call loss.backward() first")  # fmt: skip
        if self.own_step is not None:
            self.stepped, self.stepped_at = [], users_place()
            self._trace_step(self.own_step)
            return
        with _unseen():
            found = [(name, p, p.grad) for name, p in self.parameters() if p.grad is not None]
        self.stepped, self.stepped_at = [name for name, _, _ in found], users_place()
        self.grads = [grad for _, _, grad in found]
        self._pending = _Pending([param for _, param, _ in found], self.grads)

    def settle(self, used: Any) -> None:
        """Write the new parameters down, if what is used now shares memory with them or with the
        gradients: most steps read neither afterwards, and are traced shorter without."""
        pending = self._pending
        if pending is None or not pending.concerns(used):
            return
        self._pending = None
        self.grads = [grad.clone() for grad in pending.grads]
        with torch.no_grad():
            for param, grad in zip(pending.params, pending.grads, strict=True):
                param.copy_(torch.ops.weft.updated(param, grad))

    def _trace_step(self, own: TracedOptimizer) -> None:
        """Trace the optimizer's own step; parameters without a gradient have None, as in torch."""
        kept = [(p, p.grad) for _, p in self.parameters()]
        for name, param in self.parameters():
            if name not in own.alive:
                param.grad = None
        own.trace(self.parameters())
        for param, grad in kept:
            param.grad = grad

    def trains(self) -> bool:
        """Has the step changed parameters, by the optimizer or by itself?"""
        with _unseen():
            versions = [p._version for _, p in self.parameters()]
        return self.stepped is not None or versions != self._versions

    def zero_grad(self, set_to_none: bool = True) -> None:
        """In place of `optimizer.zero_grad`."""
        with _unseen():
            for _, param in self.parameters():
                param.grad = None

    def _place_probe(self) -> None:
        """Zeros in place of one gradient tell whether the step clears gradients before it begins."""
        params = self.parameters()
        if params:
            with _unseen():
                param = min((p for _, p in params), key=lambda p: p.numel())
            param.grad = torch.zeros_like(param)
            self._probe = param, param.grad, param.grad._version

    def _notice_clearing(self) -> None:
        """Take the probe away before the first gradients arrive."""
        if self._probe is None:
            return
        param, zeros, version = self._probe
        self._probe = None
        self.keeps_gradients = param.grad is zeros and zeros._version == version
        if param.grad is zeros:
            param.grad = None

    # -- recording ----------------------------------------------------------------------------

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Replace the functions for as long as the user's step runs."""
        self.backwards, self.stepped, self.grads, self._pending = 0, None, [], None
        own: dict[str, Any] = vars(self.optimizer)
        kept: dict[str, Any] = {n: own[n] for n in ("step", "zero_grad") if n in own}
        settings = self._settings()
        with ExitStack() as stack:
            for owner, name, stand_in in self._stand_ins():
                stack.enter_context(patch.object(owner, name, stand_in))
            stack.enter_context(_Watch(self))
            own.update(step=self.step, zero_grad=self.zero_grad)
            try:
                self.zero_grad()
                self._place_probe()
                with _unseen():
                    self._versions = [p._version for _, p in self.parameters()]
                yield
                self._notice_clearing()
                with _unseen():
                    cleared = all(p.grad is None for _, p in self.parameters())
                self.keeps_gradients = self.keeps_gradients and not cleared
                self._refuse_new_settings(settings)
            finally:
                for name in ("step", "zero_grad"):
                    own.pop(name, None)
                own.update(kept)
                for group, before in zip(self.optimizer.param_groups, settings, strict=False):
                    group.update(before)
                self.zero_grad()

    def _stand_ins(self) -> list[tuple[Any, str, Callable[..., Any]]]:
        return [
            (torch.Tensor, "backward", lambda loss, *a, **k: self.backward(loss, *a, **k)),
            (torch.autograd, "backward", self.run_backward),
            (torch.autograd, "grad", self.grad),
            (torch.amp.GradScaler, "scale", _refuse_scaler(torch.amp.GradScaler.scale)),
        ]

    def _settings(self) -> list[dict[str, Any]]:
        groups = self.optimizer.param_groups
        return [{k: v for k, v in group.items() if k != "params"} for group in groups]

    def _refuse_new_settings(self, before: list[dict[str, Any]]) -> None:
        for number, (old, new) in enumerate(zip(before, self._settings(), strict=False)):
            changed = [key for key in new if key not in old or new[key] is not old[key]
                       and new[key] != old[key]]  # fmt: skip
            if changed:
                raise misused(f"the step changes {changed[0]!r} of the optimizer's group {number}",
                              "do so between steps, scheduler.step() too: a plan takes the rates "
                              "of each call and runs without Python", self.stepped_at)  # fmt: skip


def _refuse_scaler(scale: Callable[..., Any]) -> Callable[..., Any]:
    def refused(self: torch.amp.GradScaler, outputs: Any) -> Any:
        if self.is_enabled():
            raise misused("the step scales its loss by a GradScaler",
                          "use bfloat16, which needs none (enabled=False); skipping a step depends "
                          "on the values of gradients, and a plan runs without Python")  # fmt: skip
        return scale(self, outputs)

    return refused


def users_place() -> Location:
    """The line of the user's step that runs now; nothing outside of it."""
    frames = user_frames(traceback.extract_stack())
    return Location("", frames[-1].filename, frames[-1].lineno or 0) if frames else NOWHERE


def misused(message: str, hint: str, at: Location | None = None) -> CompileError:
    """The diagnostic W0304, at the line that runs now or at another."""
    place = users_place() if at is None else at
    return CompileError("W0304", message, span=user_span(place.file, place.line), hint=hint)
