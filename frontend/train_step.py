"""Train steps: `(model, optimizer, *batch) -> loss` as one logical program.

The user's function runs under torch.export with three things replaced while it is traced:
`Tensor.backward` becomes an operator that stands for the gradients of the parameters (so what the
function does with them, clipping for instance, is traced as well), `optimizer.step` records which
gradients it would use, `optimizer.zero_grad` drops them. `joint.py` then puts the backward in the
operator's place, `optimizers.py` the updates behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..ir.errors import CompileError
from ..ir.module import Attr, Function, Module, Value
from ..ir.types import FLOATS
from ..passes.outline import Outline
from ..passes.simplify import Simplify
from .aten import TABLE, Lowering
from .capture import AtenProgram, VaryingDims, capture
from .differentiate import Differentiate
from .joint import joint, prepare, settle
from .optimizers import Update, add_updates, make, states_of, updates_of
from .own_gradients import refuse_own_gradients
from .structure import Structure, flatten
from .trace import Captured, Root, distinct, drop_stops, input_names, lower_program


@dataclass(frozen=True)
class TracedStep:
    """A traced train step.

    Attributes:
        marked: logical IR before differentiation, one flat entry with the markers of `joint.py`.
            Entry parameters: params, buffers, inputs (in order), seed if random, markers,
            `lr.<group>`, `step`, optimizer states. Results: loss and other outputs, then updates.
        tensors: the user's tensors for params and buffers, and optimizer states where the
            optimizer has stepped before, by entry name; states that are absent start at 0.
        inputs: the structure of the batch (a tuple of the arguments after the optimizer, and a
            dict of keyword arguments); its tensors are the entry's inputs.
        input_names: names of the inputs.
        outputs: the structure of what the step returns.
        rates: the learning rate of each group at the time of tracing.
    """

    marked: Module
    tensors: Mapping[str, Tensor]
    inputs: Structure
    input_names: tuple[str, ...]
    outputs: Structure
    rates: tuple[float, ...]

    @cached_property
    def module(self) -> Module:
        """The training-level program: repeated blocks outlined, the backward written out."""
        return Differentiate().run(Outline().run(Simplify().run(self.marked)))


@dataclass(frozen=True)
class TracedJoint:
    """A module traced with its backward, for a loss that is computed outside.

    Attributes:
        module: logical IR. Entry parameters: params, buffers, inputs, seed if random, tangents of
            the outputs (role `tangent`; attribute `of` is the output's number). Results: outputs,
            buffer updates, gradients (role `grad`, named as the parameter or the input).
        tensors, inputs, input_names, outputs: as in `trace.Traced`.
    """

    module: Module
    tensors: Mapping[str, Tensor]
    inputs: Structure
    input_names: tuple[str, ...]
    outputs: Structure


def _gradients(loss: Tensor, params: list[Tensor], number: int) -> list[Tensor]:
    return [torch.empty_like(param) for param in params]


#: stands for the gradients of parameters while a step is traced
gradients_op = torch.library.custom_op("weft::gradients", _gradients, mutates_args=())
gradients_op.register_fake(_gradients)


def _lower_gradients(
    c: Lowering, loss: Value, params: Sequence[Value], number: int
) -> tuple[Value, ...]:
    """Markers for `joint.assemble`."""
    described = zip(c.builder.params, c.builder.param_attrs, strict=True)
    names = {value.name: attrs["name"] for value, attrs in list(described)}
    c.losses[number] = loss
    return tuple(
        c.builder.param(value.type, f"d_{value.name}", role="grad", name=names[value.name],
                        of=number)
        for value in params
    )  # fmt: skip


TABLE["weft.gradients.default"] = _lower_gradients


@dataclass
class _Recorder:
    """What the user's step does to gradients and parameters while it is traced."""

    root: torch.nn.Module
    optimizer: torch.optim.Optimizer
    trained: Mapping[str, str]  #: exported name of a trained parameter -> its user's name
    backwards: int = 0
    stepped: list[str] | None = None
    grads: list[Tensor] = field(default_factory=list)

    def parameters(self) -> list[tuple[str, Tensor]]:
        """The parameters that get gradients, as the trace sees them."""
        named = self.root.named_parameters()
        return [(self.trained[name], p) for name, p in named if name in self.trained]

    def backward(self, loss: Tensor, gradient: Any = None, *args: Any, **kwargs: Any) -> None:
        """In place of `Tensor.backward`."""
        if self.stepped is not None:
            raise _misused("backward() is called after optimizer.step()", "compile one step at a time")
        if loss.numel() != 1 or gradient is not None or kwargs.get("inputs") is not None:
            raise _misused("backward() has arguments, or its tensor is not a scalar",
                           "call backward() on the loss, without arguments")  # fmt: skip
        params = self.parameters()
        made = torch.ops.weft.gradients(loss, [p for _, p in params], self.backwards)
        self.backwards += 1
        for (_, param), grad in zip(params, made, strict=True):
            param.grad = grad if param.grad is None else param.grad + grad

    def step(self, closure: Any = None) -> None:
        """In place of `optimizer.step`."""
        if closure is not None:
            raise _misused("optimizer.step() has a closure", "call it without arguments")
        if self.stepped is not None:
            raise _misused("optimizer.step() is called twice", "compile one step at a time")
        if not self.backwards:
            raise _misused("optimizer.step() is called before backward()",
                           "call loss.backward() first")  # fmt: skip
        found = [(name, p.grad) for name, p in self.parameters() if p.grad is not None]
        self.stepped = [name for name, _ in found]
        self.grads = [grad.clone() for _, grad in found]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """In place of `optimizer.zero_grad`."""
        for _, param in self.parameters():
            param.grad = None

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Replace the methods for as long as the user's function runs."""

        def unsupported(*args: Any, **kwargs: Any) -> None:
            raise _misused("torch.autograd.backward() is called", "call loss.backward()")

        own: dict[str, Any] = vars(self.optimizer)
        kept: dict[str, Any] = {n: own[n] for n in ("step", "zero_grad") if n in own}
        backward, free = torch.Tensor.backward, torch.autograd.backward
        own.update(step=self.step, zero_grad=self.zero_grad)
        torch.Tensor.backward = lambda loss, *a, **k: self.backward(loss, *a, **k)  # type: ignore[method-assign]
        torch.autograd.backward = unsupported
        try:
            self.zero_grad()
            yield
        finally:
            torch.Tensor.backward, torch.autograd.backward = backward, free  # type: ignore[method-assign]
            for name in ("step", "zero_grad"):
                own.pop(name, None)
            own.update(kept)
            self.zero_grad()


def _misused(message: str, hint: str) -> CompileError:
    return CompileError("W0304", message, hint=hint)


def trace_train_step(
    step: Callable[..., Any],
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
) -> TracedStep:
    """Trace `step(model, optimizer, *batch, **kwargs)`, which calls backward() and step() itself.

    Args:
        step: one training step; returns the loss, alone or first of several outputs.
        batch: example inputs, real, fake or meta, nested as the step takes them.

    Raises CompileError W0301 to W0304; an exception of the step itself passes through.
    """
    return capture_train_step(step, model, optimizer, batch, kwargs).lowered()


def capture_train_step(
    step: Callable[..., Any],
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    varying: VaryingDims = (),
) -> Captured[TracedStep]:
    """The first half of `trace_train_step`; `varying` are the dims of the inputs that may vary."""
    kwargs = dict(kwargs or {})
    ids = {id(p): name for name, p in model.named_parameters()}
    updates, rates = updates_of(optimizer, ids)
    names = tuple(input_names(step, (None, None, *batch), kwargs))
    tensors, _, inputs = flatten((tuple(batch), kwargs))
    recorder: list[_Recorder] = []

    def call(*args: Any, **named: Any) -> tuple[Any, list[Tensor]]:
        (run,) = recorder
        run.backwards, run.stepped = 0, None
        with run.recording():
            result = step(model, optimizer, *args, **named)
        if run.stepped is None:
            raise _misused("the step does not call optimizer.step()",
                           "a train step calls loss.backward(), then optimizer.step()")  # fmt: skip
        return result, run.grads

    root = Root(call, {"": model}, inputs)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    trained = {exported: name for exported, name in root.state_names().items()
               if name in updates and name not in frozen}  # fmt: skip
    recorder.append(_Recorder(root, optimizer, trained))
    with refuse_own_gradients(model):
        exported = capture(root, distinct(tensors), varying)
    stepped = recorder[0].stepped or []
    users_names = root.state_names()

    def lower(graph: AtenProgram, outputs: Structure) -> TracedStep:
        entry, state, losses = lower_program(graph, users_names, names)
        entry = _mark(entry, stepped, losses)
        states = states_of(optimizer, ids, updates)
        marked = _marked(entry, updates, len(rates))
        known = {str(a["name"]) for a in marked.entry.param_attrs}
        by_name = {**state, **{name: t for name, t in states.items() if name in known}}
        return TracedStep(marked, by_name, inputs, names, _returned(outputs), tuple(rates))

    return Captured(exported, root.outputs, lower)


def _returned(outputs: Structure) -> Structure:
    """The structure of the step's own result, without the gradients that were added to it."""
    returned, grads = outputs.body
    return Structure(returned, outputs.count - len(grads))


def _mark(entry: Function, stepped: Sequence[str], losses: Mapping[int, Value]) -> Function:
    """Say which results are the loss, which are gradients; add the losses of `backward()`."""
    attrs: list[Mapping[str, Attr]] = list(entry.result_attrs)
    outputs = [i for i, a in enumerate(attrs) if a.get("role") == "output"]
    grads = outputs[len(outputs) - len(stepped) :]
    for index, name in zip(grads, stepped, strict=True):
        attrs[index] = {"role": "grad", "name": name}
    if len(outputs) > len(grads):
        first = entry.results[outputs[0]].type
        if not first.shape and first.dtype in FLOATS:
            attrs[outputs[0]] = {"role": "loss"}
    extra = [{"role": "backward", "of": number} for number in losses]
    return entry.with_(
        results=(*entry.results, *losses.values()), result_attrs=(*attrs, *extra)
    )


def _marked(entry: Function, updates: Mapping[str, Update], groups: int) -> Module:
    """The program before differentiation: gradients are markers, updates read them."""
    names = [a["name"] for a in entry.param_attrs if a.get("role") == "grad"]
    wrt = frozenset(
        value.name for value, attrs in zip(entry.params, entry.param_attrs, strict=True)
        if attrs.get("role") == "param" and attrs["name"] in names
    )  # fmt: skip
    entry = add_updates(settle(drop_stops(entry, wrt)), updates, groups)
    return Module("logical", (entry,))


def loss_of(output: Any) -> Tensor:
    """The loss in a model's output: a scalar, `.loss`, or `["loss"]`. Raises CompileError W0304."""
    found = output
    if isinstance(output, Mapping):
        found = output.get("loss")
    elif not isinstance(output, Tensor):
        found = getattr(output, "loss", None)
    if not isinstance(found, Tensor) or found.numel() != 1:
        raise _misused("the model's output has no loss",
                       "return a scalar, or an output with `loss` (give the model its labels)")  # fmt: skip
    return found


def trace_module_train(
    module: torch.nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    optimizer: str = "adamw",
    **hyper: Any,
) -> TracedStep:
    """Trace the train step of a module whose output is a scalar or carries a `loss`.

    Args:
        optimizer: `sgd`, `adam` or `adamw`; `hyper` are its arguments in torch.

    Raises CompileError W0301 to W0304.
    """

    def step(model: torch.nn.Module, optim: torch.optim.Optimizer, *batch: Any, **named: Any
             ) -> Tensor:  # fmt: skip
        loss = loss_of(model(*batch, **named))
        loss.backward()  # type: ignore[no-untyped-call]
        optim.step()
        return loss

    made = make(optimizer, module.parameters(), **hyper)
    traced = trace_train_step(step, module, made, args, kwargs)
    own = input_names(module, args, kwargs or {})
    return _renamed(traced, own)


def _renamed(traced: TracedStep, names: Sequence[str]) -> TracedStep:
    """The inputs under the names that the module itself gives them."""
    entry = traced.marked.entry
    fresh = iter(names)
    attrs = [{**a, "name": next(fresh)} if a.get("role") == "input" else a
             for a in entry.param_attrs]  # fmt: skip
    entry = entry.with_(param_attrs=tuple(attrs))
    return replace(traced, marked=traced.marked.with_(functions=(entry,)), input_names=tuple(names))


def trace_joint(
    module: torch.nn.Module, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
) -> TracedJoint:
    """Trace a module's forward and backward, for training with a loss outside of it.

    Gradients are those of the parameters and inputs that require them.

    Raises CompileError W0301, W0302; an exception of the module itself passes through.
    """
    return capture_joint(module, args, kwargs).lowered()


def capture_joint(
    module: torch.nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    varying: VaryingDims = (),
) -> Captured[TracedJoint]:
    """The first half of `trace_joint`; `varying` are the dims of the inputs that may vary."""
    kwargs = dict(kwargs or {})
    names = tuple(input_names(module, args, kwargs))
    tensors, _, inputs = flatten((tuple(args), kwargs))
    root = Root(module, {"": module}, inputs)
    with refuse_own_gradients(module):
        exported = capture(root, distinct(tensors), varying)
    users_names = root.state_names()
    wanted = {name for name, p in module.named_parameters() if p.requires_grad}
    wanted |= {name for name, t in zip(names, tensors, strict=True) if t.requires_grad}

    def lower(graph: AtenProgram, outputs: Structure) -> TracedJoint:
        entry, state, _ = lower_program(graph, users_names, names)
        wrt = frozenset(
            value.name for value, attrs in zip(entry.params, entry.param_attrs, strict=True)
            if attrs["name"] in wanted
        )  # fmt: skip
        made = joint(prepare(entry, wrt), sorted(wrt))
        return TracedJoint(made, state, inputs, names, outputs)

    return Captured(exported, root.outputs, lower)
