"""Pointwise ops that write their result into the memory of an operand that ends with them.

The numbers are those of the op's reference semantics: the same kernels of PyTorch, each element read
before it is written. A step saves the allocation, its page faults, and the bytes of the result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..ir.module import Function, Op
from ..ir.ops import OPS
from .lifetimes import alias_roots

Call = Callable[..., Tensor]
_aten = torch.ops.aten
#: op -> the in-place method of its first operand
_FIRST: dict[str, Call] = {
    "add": Tensor.add_, "sub": Tensor.sub_, "mul": Tensor.mul_, "div": Tensor.div_,
    "neg": Tensor.neg_, "exp": Tensor.exp_, "sqrt": Tensor.sqrt_, "rsqrt": Tensor.rsqrt_,
    "reciprocal": Tensor.reciprocal_, "tanh": Tensor.tanh_, "sigmoid": Tensor.sigmoid_,
    "relu": Tensor.relu_,
}  # fmt: skip
#: op -> how it is written into a given tensor, for the operands at the places named
_INTO: dict[str, tuple[tuple[int, ...], Callable[[int], Call]]] = {
    "add": ((1,), lambda k: lambda x, y: y.add_(x)),
    "mul": ((1,), lambda k: lambda x, y: y.mul_(x)),
    "sub": ((1,), lambda k: lambda x, y: torch.sub(x, y, out=y)),
    "where": ((1, 2), lambda k: lambda *v: torch.where(*v, out=v[k])),
    "silu_backward": ((0, 1), lambda k: lambda *v: _aten.silu_backward(*v, grad_input=v[k])),
    "tanh_backward": ((0, 1), lambda k: lambda *v: _aten.tanh_backward(*v, grad_input=v[k])),
    "sigmoid_backward": ((0, 1), lambda k: lambda *v: _aten.sigmoid_backward(*v, grad_input=v[k])),
    "relu_backward": (
        (0, 1), lambda k: lambda *v: _aten.threshold_backward(*v, 0, grad_input=v[k])
    ),
}  # fmt: skip


def into_operand(op: Op, place: int) -> Call | None:
    """What runs an op into the memory of its operand number `place`; None where nothing does."""
    if place == 0 and op.name in _FIRST:
        return _FIRST[op.name]
    places, make = _INTO.get(op.name, ((), None))
    return make(place) if make is not None and place in places else None


def reusable(function: Function, kept: Sequence[str] = ()) -> dict[int, int]:
    """Action -> the operand whose memory its result may take.

    The operand has the result's type, is a value of this function alone, is read here for the last
    time, and shares memory with nothing: it is no parameter, no result, no view, has no view, is in
    no transfer, and is not among `kept`. Placements are equal, so local shapes are. Creation and
    ATen ops may return tensors whose elements share memory; these are never written.
    """
    roots = alias_roots(function)
    barred = set(kept).union(
        *(roots[value.name] for value in (*function.params, *function.results))
    )
    last: dict[str, int] = {}
    for index, op in enumerate(function.ops):
        if op.name != "free":
            for value in op.operands:
                last.update((root, index) for root in roots[value.name])
        if op.attrs.get("async"):  # in use until its wait
            barred.update(root for value in op.operands for root in roots[value.name])
        for value in op.results:
            if op.name == "aten" or (op.name in OPS and OPS[op.name].family == "creation"):
                barred.add(value.name)
            if roots[value.name] != {value.name}:  # a view: what it looks at is not alone
                barred |= roots[value.name]
    found: dict[int, int] = {}
    for index, op in enumerate(function.ops):
        if len(op.results) != 1:
            continue
        for place, value in enumerate(op.operands):
            once = sum(value.name == other.name for other in op.operands) == 1
            alone = roots[value.name] == {value.name} and value.name not in barred
            if (
                once and alone and last[value.name] == index
                and value.type == op.result.type and into_operand(op, place) is not None
            ):  # fmt: skip
                found[index] = place
                break
    return found
