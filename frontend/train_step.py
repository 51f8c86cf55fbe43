"""Train steps: `(model, optimizer, *batch) -> loss` as one logical program.

The user's function runs under torch.export; `step_recorder.py` stands in for autograd and the
optimizer and leaves markers. `joint.py` then puts the backward in the place of those for gradients,
`optimizers.py` the updates in the place of those for new parameters.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..ir.module import NOWHERE, Attr, Function, Location, Module, Value
from ..ir.types import FLOATS
from ..passes.outline import Outline
from ..passes.simplify import Simplify
from .capture import AtenProgram, VaryingDims, capture
from .differentiate import Differentiate
from .joint import joint, prepare, settle
from .optimizers import Update, add_updates, has_update_op, make, states_of, updates_of
from .own_gradients import refuse_own_gradients
from .step_recorder import Recorder, misused
from .structure import Structure, flatten
from .trace import Captured, Root, distinct, drop_stops, input_names, lower_program
from .traced_optimizer import TracedOptimizer

#: the attribute of the traced root that holds the state of an optimizer whose step is traced
_OWN_STEP = "o"


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
        keeps_gradients: the step neither begins nor ends with cleared gradients.
        numbers: optimizer states that are numbers of Python, with their type.
    """

    marked: Module
    tensors: Mapping[str, Tensor]
    inputs: Structure
    input_names: tuple[str, ...]
    outputs: Structure
    rates: tuple[float, ...]
    keeps_gradients: bool = False
    numbers: Mapping[str, str] = field(default_factory=dict)

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
    work = _StepCapture(step, model, optimizer, tuple(batch), dict(kwargs or {}))
    if has_update_op(optimizer):
        return work.captured(varying, None)
    # an optimizer without an op is traced itself, once it is known which gradients there are
    alive = work.alive()
    names = {id(p): name for name, p in model.named_parameters()}
    return work.captured(varying, TracedOptimizer(optimizer, names, alive))


@dataclass(frozen=True)
class _StepCapture:
    """A train step that is to be traced."""

    step: Callable[..., Any]
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    batch: tuple[Any, ...]
    kwargs: dict[str, Any]

    @cached_property
    def _ids(self) -> dict[int, str]:
        return {id(p): name for name, p in self.model.named_parameters()}

    @cached_property
    def _updates(self) -> tuple[dict[str, Update], list[float]]:
        return updates_of(self.optimizer, self._ids)

    def _run(
        self, varying: VaryingDims, own: TracedOptimizer | None
    ) -> tuple[AtenProgram, Root, Recorder]:
        recorder: list[Recorder] = []

        def call(*args: Any, **named: Any) -> tuple[Any, list[Tensor]]:
            (run,) = recorder
            with run.recording():
                result = self.step(self.model, self.optimizer, *args, **named)
                run.settle(flatten(result)[0])
            if not run.trains():
                raise misused("the step does not call optimizer.step()",
                               "a train step calls loss.backward(), then optimizer.step()",
                               _definition(self.step))  # fmt: skip
            return result, run.grads

        tensors, _, inputs = flatten((self.batch, self.kwargs))
        root = Root(call, {"": self.model}, inputs)
        if own is not None:
            root.add_module(_OWN_STEP, own.holder)
        updates, _ = self._updates
        frozen = {name for name, p in self.model.named_parameters() if not p.requires_grad}
        trained = {exported: name for exported, name in root.state_names().items()
                   if name in updates and name not in frozen}  # fmt: skip
        recorder.append(Recorder(root, self.optimizer, trained, own))
        with refuse_own_gradients(self.model):
            exported = capture(root, distinct(tensors), varying)
        return exported, root, recorder[0]

    @property
    def _input_names(self) -> tuple[str, ...]:
        return tuple(input_names(self.step, (None, None, *self.batch), self.kwargs))

    def alive(self) -> frozenset[str]:
        """Names of the parameters that get gradients."""
        exported, root, run = self._run((), None)
        entry, _, losses = lower_program(exported, root.state_names(), self._input_names)
        entry = _settled(_mark(entry, run.stepped or [], losses))
        return frozenset(str(a["name"]) for a in entry.result_attrs if a.get("role") == "grad")

    def captured(self, varying: VaryingDims, own: TracedOptimizer | None) -> Captured[TracedStep]:
        """The traced step; `own` traces the optimizer's step too."""
        exported, root, run = self._run(varying, own)
        updates, rates = self._updates
        names, stepped = self._input_names, run.stepped or []
        _, _, inputs = flatten((self.batch, self.kwargs))
        buffers = {} if own is None else own.buffers
        users_names = {**root.state_names(),
                       **{f"{_OWN_STEP}.{key}": name for key, name in buffers.items()}}  # fmt: skip
        roles = {} if own is None else own.roles

        def lower(graph: AtenProgram, outputs: Structure) -> TracedStep:
            entry, state, losses = lower_program(graph, users_names, names, roles)
            entry = _settled(_mark(entry, stepped, losses))
            if own is None:
                graded = {a["name"] for a in entry.result_attrs if a.get("role") == "grad"}
                alive = {name: update for name, update in updates.items() if name in graded}
                entry = add_updates(entry, alive, len(rates), run.stepped_at)
                state |= states_of(self.optimizer, self._ids, alive)
            known = {str(a["name"]) for a in entry.param_attrs if a.get("role") != "lr"}
            return TracedStep(
                Module("logical", (entry,)), {n: t for n, t in state.items() if n in known},
                inputs, names, _returned(outputs), tuple(rates), run.keeps_gradients,
                {} if own is None else own.numbers,
            )  # fmt: skip

        return Captured(exported, root.outputs, lower)


def _definition(function: Callable[..., Any]) -> Location:
    code = getattr(inspect.unwrap(function), "__code__", None)
    return NOWHERE if code is None else Location("", code.co_filename, code.co_firstlineno)


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


def _settled(entry: Function) -> Function:
    """The entry with markers for gradients that there are, and no others."""
    names = [a["name"] for a in entry.param_attrs if a.get("role") == "grad"]
    wrt = frozenset(
        value.name for value, attrs in zip(entry.params, entry.param_attrs, strict=True)
        if attrs.get("role") == "param" and attrs["name"] in names
    )  # fmt: skip
    return settle(drop_stops(entry, wrt))


def loss_of(output: Any) -> Tensor:
    """The loss in a model's output: a scalar, `.loss`, or `["loss"]`. Raises CompileError W0304."""
    found = output
    if isinstance(output, Mapping):
        found = output.get("loss")
    elif not isinstance(output, Tensor):
        found = getattr(output, "loss", None)
    if not isinstance(found, Tensor) or found.numel() != 1:
        raise misused("the model's output has no loss",
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
