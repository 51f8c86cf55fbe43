"""Optimizer updates in place, on several tensors at once.

Each function takes lists of tensors (parameters, gradients, states) and the two scalars. They
compute what the reference semantics of `ir/ops/optimizer.py` say, with PyTorch's fused and foreach
kernels, which read and write each tensor once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..ir.module import Attr, Op
from ..ir.ops import OPS
from ..ir.ops.optimizer import OVERWRITES
from .context import OpContext

Tensors = list[Tensor]
#: update(*columns, step, lr): one column (a list of tensors) for each operand but the scalars
Update = Callable[..., None]
_FUSED_DTYPES = frozenset({"f64", "f32", "f16", "bf16"})


def _number(attrs: Mapping[str, Attr], name: str) -> float:
    value = attrs[name]
    assert not isinstance(value, (str, tuple))
    return float(value)


def _rate(lr: Tensor) -> Any:
    """The learning rate as the fused kernels take it, without waiting for a GPU."""
    return lr.to(torch.float32) if lr.is_cuda else float(lr)


def _descend(params: Tensors, grads: Tensors, lr: Tensor) -> None:
    """params -= lr * grads, without waiting for a GPU."""
    if lr.is_cuda:
        torch._foreach_add_(params, torch._foreach_mul(grads, (-lr).to(grads[0].dtype)))
    else:
        torch._foreach_add_(params, grads, alpha=-float(lr))


def _adam(kernel: Callable[..., None], a: Mapping[str, Attr]) -> Update:
    def update(
        params: Tensors, grads: Tensors, ms: Tensors, vs: Tensors, step: Tensor, lr: Tensor
    ) -> None:
        count = step.to(device=params[0].device, dtype=torch.float32)
        kernel(
            params, [g.contiguous() for g in grads], ms, vs, [], [count] * len(params),
            lr=_rate(lr), beta1=a["beta1"], beta2=a["beta2"], weight_decay=a["weight_decay"],
            eps=a["eps"], amsgrad=False, maximize=a["maximize"],
        )  # fmt: skip

    return update


def _gradients(params: Tensors, grads: Tensors, a: Mapping[str, Attr]) -> Tensors:
    """The gradients with sign and L2 term."""
    decay = _number(a, "weight_decay")
    out = list(torch._foreach_neg(grads)) if a["maximize"] else grads
    return list(torch._foreach_add(out, params, alpha=decay)) if decay else out


def _sgd(a: Mapping[str, Attr]) -> Update:
    def update(params: Tensors, grads: Tensors, step: Tensor, lr: Tensor) -> None:
        _descend(params, _gradients(params, grads, a), lr)

    return update


def _momentum(a: Mapping[str, Attr]) -> Update:
    momentum, dampening = _number(a, "momentum"), _number(a, "dampening")

    def update(
        params: Tensors, grads: Tensors, buffers: Tensors, step: Tensor, lr: Tensor
    ) -> None:
        new = _gradients(params, grads, a)
        # the first step takes the gradient without dampening, as torch does
        damp = 1.0 - dampening if dampening and float(step) > 1 else 1.0
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_add_(buffers, new, alpha=damp)
        new = list(torch._foreach_add(new, buffers, alpha=momentum)) if a["nesterov"] else buffers
        _descend(params, new, lr)

    return update


def _by_reference(op: Op, context: OpContext) -> Update:
    """Any update: the reference semantics, then copies into the old storage."""
    semantics, places = OPS[op.name].ref, OVERWRITES[op.name]

    def update(*columns: Any) -> None:
        *lists, step, lr = columns
        for row in zip(*lists, strict=True):
            new = semantics(context, *row, step, lr)
            new = new if isinstance(new, tuple) else (new,)
            for place, tensor in zip(places, new, strict=True):
                row[place].copy_(tensor)

    return update


def update_key(op: Op) -> tuple[object, ...]:
    """Updates with equal keys can run together."""
    attrs = tuple(sorted((k, v) for k, v in op.attrs.items() if k != "inplace"))
    scalars = tuple(value.name for value in op.operands[-2:])
    return op.name, attrs, scalars, tuple(value.type.dtype for value in op.operands[:-2])


def update_name(op: Op) -> str:
    """The name of the kernel that runs updates like `op`, whatever their shapes."""
    attrs = sorted((k, repr(v)) for k, v in op.attrs.items() if k != "inplace")
    content = repr((op.name, attrs, [value.type.dtype for value in op.operands]))
    return f"{op.name}_{hashlib.sha256(content.encode()).hexdigest()[:8]}"


def by_kernel(kernel: Callable[..., object], otherwise: Update) -> Update:
    """An update by a compiled kernel; by another function where it does not take the tensors."""

    def update(*columns: Any) -> None:
        try:
            kernel(*columns)
        except ValueError:
            otherwise(*columns)

    return update


def make_update(op: Op, context: OpContext) -> Update:
    """The function that runs a group of updates like `op` in place."""
    dtypes = {value.type.dtype for value in op.operands[:-2]}
    if len(dtypes) > 1 or not dtypes <= _FUSED_DTYPES:
        return _by_reference(op, context)
    attrs = context.attrs
    makers: dict[str, Callable[[], Update]] = {
        "adam_update": lambda: _adam(torch._fused_adam_, attrs),
        "adamw_update": lambda: _adam(torch._fused_adamw_, attrs),
        "sgd_update": lambda: _sgd(attrs),
        "momentum_update": lambda: _momentum(attrs),
    }
    maker = makers.get(op.name)
    return maker() if maker else _by_reference(op, context)
