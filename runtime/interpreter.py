"""The reference interpreter: what a module means, at every level. The oracle of every pass.

`run_function` calls each op's reference semantics on whole tensors, on one logical device.
`evaluate` is for any level, the ones with several ranks included (`lockstep.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..ir.errors import RunError
from ..ir.module import Function, Module, Op
from ..ir.ops import OPS
from ..ir.types import Mesh
from .context import OpContext, results_of
from .lockstep import Lockstep
from .shards import gather, scatter

#: `hook(op)` is entered around the evaluation of an op
Hook = Callable[[Op], AbstractContextManager[object]]
#: op name -> what is called in place of the op's reference semantics
Override = Mapping[str, Callable[..., Any]]


def run_function(
    module: Module,
    function: Function,
    operands: Sequence[Tensor],
    *,
    hook: Hook | None = None,
    override: Override | None = None,
    device: torch.device | str | None = None,
) -> list[Tensor]:
    """Evaluate a function on one logical device: a reshard is the identity, calls recurse.

    Works on fake and meta tensors, under autograd and under make_fx.

    Args:
        operands: one whole tensor for each parameter.
        hook: entered around the evaluation of each op but `call`.
        override: for an op name, what to call instead of its semantics, as
            `override(context, *operands)`.
        device: where new tensors are created; the device of the operands by default.

    Raises RunError W0804 when the number of operands is wrong.
    """
    if device is None:
        device = next((tensor.device for tensor in operands), torch.device("cpu"))
    runner = _Runner(module, torch.device(device), hook, override or {})
    return runner.run(function, operands)


class _Runner:
    """Evaluates functions on one logical device and keeps the contexts of their ops."""

    def __init__(
        self, module: Module, device: torch.device, hook: Hook | None, override: Override
    ) -> None:
        self.functions = {function.name: function for function in module.functions}
        self.device, self.hook, self.override = device, hook, override
        self.contexts: dict[int, OpContext] = {}  # by id of the op, which `functions` keeps alive
        self.drops: dict[str, list[tuple[str, ...]]] = {}

    def run(self, function: Function, operands: Sequence[Tensor]) -> list[Tensor]:
        if len(operands) != len(function.params):
            raise _wrong_count(function, len(operands))
        values = {p.name: t for p, t in zip(function.params, operands, strict=True)}
        if function.name not in self.drops:
            self.drops[function.name] = function.last_uses()
        for op, dropped in zip(function.ops, self.drops[function.name], strict=True):
            arguments = [values[value.name] for value in op.operands]
            results = self.evaluate(op, arguments)
            del arguments
            for value, tensor in zip(op.results, results, strict=True):
                values[value.name] = tensor
            for name in dropped:
                values.pop(name, None)
        return [values[value.name] for value in function.results]

    def evaluate(self, op: Op, operands: list[Tensor]) -> Sequence[Tensor]:
        if op.name == "call":
            return self.run(self.functions[str(op.attrs["callee"])], operands)
        if op.name == "reshard":
            return operands
        context = self.contexts.get(id(op))
        if context is None:
            context = self.contexts[id(op)] = OpContext(op, device=self.device)
        semantics = self.override.get(op.name, OPS[op.name].ref)
        with self.hook(op) if self.hook else nullcontext():
            return results_of(op, semantics(context, *operands))


def evaluate(
    module: Module,
    inputs: Sequence[Tensor],
    *,
    ranks: bool = False,
    noise: torch.Generator | None = None,
) -> list[Tensor]:
    """The oracle: whole tensors in, whole tensors out, at any level.

    The logical level runs on one device. So does the placed level, whose placements do not change
    what it means; with `ranks` it runs on all ranks of its mesh, with ideal reshards. The spmd and
    schedule levels run on all ranks in lock step, with simulated collectives.

    Args:
        module: the module; its entry function is run.
        inputs: a whole tensor for each entry parameter, cut as the parameter's type says.
        ranks: run the placed level on all ranks.
        noise: writes partial values of inputs and of ideal reshards as random terms, which makes
            a comparison sharper than zeros do.

    Returns a whole tensor for each result. Raises RunError W0804 when the inputs do not match,
    W0803 when copies of a replicated value differ or a schedule reads what is gone.
    """
    function = module.entry
    if module.level == "logical" or (module.level == "placed" and not ranks):
        return run_function(module, function, inputs)
    if len(inputs) != len(function.params):
        raise _wrong_count(function, len(inputs))
    mesh = module.mesh or Mesh()
    device = next((tensor.device for tensor in inputs), torch.device("cpu"))
    runner = Lockstep(module, device=device, noise=noise)
    shards = [
        scatter(tensor, param.type, mesh, noise=noise)
        for param, tensor in zip(function.params, inputs, strict=True)
    ]
    outputs = runner.run(function, shards)
    return [
        gather(value, result.type, mesh, check=True)
        for result, value in zip(function.results, outputs, strict=True)
    ]


def _wrong_count(function: Function, count: int) -> RunError:
    return RunError(
        "W0804", f"@{function.name} has {len(function.params)} parameters, got {count} values"
    )


__all__ = ["Hook", "Override", "evaluate", "run_function"]
