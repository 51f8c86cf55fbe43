"""The reference interpreter: what a module means, at every level. The oracle of every pass.

One logical device: `run_function` calls each op's reference semantics on whole tensors.
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
from .context import OpContext

#: `hook(op)` is entered around the evaluation of an op
Hook = Callable[[Op], AbstractContextManager[object]]
#: op name -> what is called in place of the op's reference semantics
Override = Mapping[str, Callable[..., Any]]


def last_uses(function: Function) -> list[tuple[str, ...]]:
    """For each op, the names of values that nothing after it reads (its own dead results too)."""
    kept = {value.name for value in function.results}
    out: list[tuple[str, ...]] = []
    for op in reversed(function.ops):
        names = dict.fromkeys(value.name for value in (*op.operands, *op.results))
        out.append(tuple(name for name in names if name not in kept))
        kept.update(names)
    return out[::-1]


def results_of(op: Op, out: Any) -> tuple[Tensor, ...]:
    """The tuple of results that a semantics returned for an op. Raises RunError W0803."""
    results = tuple(out) if isinstance(out, (tuple, list)) else (out,)
    if len(results) != len(op.results):
        raise RunError(
            "W0803", f"{op.name} returned {len(results)} results, the op has {len(op.results)}",
            reason=f"at {op.loc}" if str(op.loc) else "",
        )  # fmt: skip
    return results


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
            raise RunError(
                "W0804", f"@{function.name} has {len(function.params)} parameters, "
                f"got {len(operands)} values")  # fmt: skip
        values = {p.name: t for p, t in zip(function.params, operands, strict=True)}
        if function.name not in self.drops:
            self.drops[function.name] = last_uses(function)
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


def evaluate(module: Module, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Evaluate a module on whole tensors: one for each entry parameter, one for each result."""
    return run_function(module, module.entry, inputs)


__all__ = ["Hook", "Override", "evaluate", "last_uses", "results_of", "run_function"]
