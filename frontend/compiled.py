"""`@weft.compile`: programs that trace, plan and run themselves at their first call.

A program is planned once for each *signature* of its inputs (`entries.py`). On several ranks every
rank calls with the same whole inputs and gets the same whole results. What is called stands in
`compiled_function.py`, `compiled_module.py` and `compiled_step.py`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from ..ir.errors import CompileError
from .compiled_function import CompiledFunction
from .compiled_module import CompiledModule
from .entries import Compiler
from .logs import configure
from .options import OPTIONS, expect


def _compile_class(cls: type[torch.nn.Module], compiler: Callable[[], Compiler]) -> Any:
    """A subclass whose instances run compiled; it keeps name, doc and `isinstance`."""

    def run(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        compiled = self.__dict__.get("_weft")
        if compiled is None:
            plain = _plain_view(self, cls)
            compiled = self.__dict__["_weft"] = CompiledModule(plain, compiler())
        return compiled(*args, **kwargs)

    names = {"__doc__": cls.__doc__, "__module__": cls.__module__, "__call__": run}
    return type(cls.__name__, (cls,), {**names, "__qualname__": cls.__qualname__})


def _plain_view(instance: torch.nn.Module, cls: type[torch.nn.Module]) -> torch.nn.Module:
    """The same module, attribute dictionary shared, without the compiled `__call__`."""
    plain = cls.__new__(cls)
    plain.__dict__ = instance.__dict__
    return plain


def compile(
    target: Any = None,
    *,
    cluster: str = "",
    mesh: str | DeviceMesh = "",
    dynamic_shapes: Any = None,
    **options: Any,
) -> Any:
    """Compile a module class, a module, a function, or a train step `(model, optimizer, *batch)`.

    Use it as a decorator, with or without arguments, or call it. Nothing happens before the first
    call, which traces, plans and runs.

    Args:
        cluster: shorthand or TOML path; by default torchrun's world, or this one device.
        mesh: axis sizes such as `2x2`, or a DeviceMesh, whose names, sizes and process groups are
            used; all default meshes are tried without it.
        dynamic_shapes: sizes of inputs that may vary, by input name, as `torch.export.export` takes
            them: `{"ids": {0: torch.export.Dim("batch", max=64)}}`. One trace and one search then
            serve all sizes, as for tensors with `torch._dynamo.mark_dynamic`.
        options: fields of `Options`.

    Raises CompileError, now for unknown options and at the first call for the program.
    """
    if target is None:
        return functools.partial(
            compile, cluster=cluster, mesh=mesh, dynamic_shapes=dynamic_shapes, **options
        )
    expect(cluster, str, "cluster")
    expect(mesh, (str, DeviceMesh), "mesh")
    chosen = OPTIONS.with_(options)
    configure(chosen.logs)

    def compiler() -> Compiler:
        return Compiler(cluster or chosen.cluster, mesh, chosen, dynamic_shapes)

    if inspect.isclass(target) and issubclass(target, torch.nn.Module):
        return _compile_class(target, compiler)
    if isinstance(target, torch.nn.Module):
        return CompiledModule(target, compiler())
    if callable(target):
        return CompiledFunction(target, compiler())
    raise CompileError(
        "W1001",
        f"cannot compile {type(target).__name__}",
        hint="compile a module class, a module, a function, or a train step",
    )
