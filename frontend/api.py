"""Planning ahead of time: `weft.plan`, and what the command line's `compile` calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..ir.errors import CompileError
from .calls import refuse_empty
from .driver import Program, Progress, plan_program
from .load_target import Target, is_train_step, target_of
from .logs import configure
from .options import OPTIONS, Options, expect
from .plan import Plan
from .structure import flatten
from .trace import input_names, trace_forward
from .tracebacks import shows_users_frames
from .train_step import TracedStep, trace_module_train, trace_train_step


@shows_users_frames
def plan(
    model: Any,
    example_inputs: Sequence[Any] | Mapping[str, Any] = (),
    *,
    cluster: str = "1x1:cpu",
    optimizer: str = "",
    mesh: str = "",
    stages: int | None = None,
    micro: int | None = None,
    order: str | None = None,
    chunks: int | None = None,
    meshes: str | None = None,
    budget: str | None = None,
    options: Options = OPTIONS,
    **hyper: Any,
) -> Plan:
    """Plan a program for a cluster; needs no device, and no data (meta tensors will do).

    Args:
        model: a module, a function, or a train step `(model, optimizer, *batch) -> loss`, whose
            example inputs then begin with the model and the optimizer.
        example_inputs: positional inputs, or a dict of keyword inputs.
        cluster: `HOSTSxDEVICES:KIND`, joined with `+`, or the path of a TOML file.
        optimizer: `sgd`, `adam` or `adamw`: plan the train step of a module whose output is a
            scalar or carries a `loss`. `hyper` are its arguments in torch.
        mesh: axis sizes such as `2x2`; all default meshes are tried without it.
        stages, micro, order, chunks: pipeline stages (the mesh is that of one), micro-batches, and
            their order; see `Options`, whose values they replace.
        meshes: the mesh of each stage, joined by `+`, where they differ: `2x2+4`.
        budget: time in which stages, micro-batches, order and mesh are searched, `10s` or `inf`.

    Raises CompileError; an exception of the program itself passes through.
    """
    target = target_of(model, example_inputs)
    expect(optimizer, str, "optimizer")
    expect(options, Options, "options")
    chosen = {"stages": stages, "micro": micro, "order": order, "chunks": chunks,
              "meshes": meshes, "budget": budget}  # fmt: skip
    options = options.with_({name: value for name, value in chosen.items() if value is not None})
    return plan_target(
        target, cluster=cluster, train=optimizer, mesh=mesh, options=options, hyper=hyper
    )


def plan_target(
    target: Target,
    *,
    cluster: str,
    train: str = "",
    mesh: str = "",
    options: Options = OPTIONS,
    hyper: Mapping[str, Any] | None = None,
) -> Plan:
    """Trace and plan a target. See `plan`."""
    expect(cluster, str, "cluster")
    expect(mesh, str, "mesh")
    configure(options.logs)
    progress = Progress(options.progress)
    try:
        progress("trace")
        program = trace_target(target, train, hyper or {})
        return plan_program(program, cluster, mesh, options, progress)
    finally:
        progress.stop()


def trace_target(target: Target, train: str, hyper: Mapping[str, Any]) -> Program:
    """Trace a module, a function or a train step; `train` names an optimizer, or is empty."""
    program, args, kwargs = target.program, target.args, target.kwargs
    tensors = flatten((args, kwargs))[0]
    refuse_empty(input_names(program, args, kwargs), [tuple(t.shape) for t in tensors], target.span)
    if is_train_step(program, args):
        model, optimizer, *batch = args
        if train and type(optimizer).__name__.lower() != train.lower():
            raise CompileError(
                "W1001",
                f"--train {train}, but the step of {target.name} has {type(optimizer).__name__}",
                hint=f"leave --train out, or name {type(optimizer).__name__.lower()}",
            )
        step = trace_train_step(program, model, optimizer, batch, kwargs)
        return step_program(target.name, step, tuple(batch), kwargs)
    if train:
        if not isinstance(program, torch.nn.Module):
            raise CompileError(
                "W1001",
                f"--train needs a module or a train step, {target.name} is "
                f"{type(program).__name__}",
                reason="a train step takes the model and the optimizer first",
                hint="return (module, args, kwargs) from the factory",
            )
        step = trace_module_train(program, args, kwargs, train, **hyper)
        return step_program(target.name, step, args, kwargs)
    traced = trace_forward(program, args, kwargs)
    named = named_inputs(traced.input_names, args, kwargs)
    return Program("forward", target.name, traced.module, traced.tensors, named, {})


def step_program(
    name: str, step: TracedStep, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Program:
    """What the planner needs of a traced train step."""
    named = named_inputs(step.input_names, args, kwargs)
    meta = {"lr": list(step.rates), "keeps_gradients": step.keeps_gradients,
            "numbers": dict(step.numbers)}  # fmt: skip
    return Program("train", name, step.marked, step.tensors, named, meta)


def named_inputs(
    names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The tensors among the inputs by their names in the entry."""
    tensors, _, _ = flatten((tuple(args), dict(kwargs)))
    return dict(zip(names, tensors, strict=True))
