"""Whole tensors to shards and back: what a placement means.

The meaning is a fold over the mesh axes in mesh order, which is how splits nest: each axis cuts
(`S`), copies (`B`) or writes as terms (`P`) what the axes before it left.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from ..ir.errors import RunError
from ..ir.types import Mesh, Placement, TensorType, shard_offset, shard_size

#: How far replicated copies may differ, relative to the largest element, by bytes per element:
#: about 30 roundings, since equal sums may be taken in a different order.
_TOLERANCE = {8: 1e-13, 4: 4e-6, 2: 0.06, 1: 0.5}


def combine_terms(terms: Sequence[Tensor], combine: str) -> Tensor:
    """Combine partial values (`sum`, `max` or `min`) in the order given."""
    if combine == "sum":
        return reduce(torch.add, terms)
    return reduce(torch.maximum if combine == "max" else torch.minimum, terms)


def neutral(like: Tensor, combine: str) -> Tensor:
    """A tensor of the same shape and dtype that changes nothing when it is combined."""
    if combine == "sum" or like.dtype == torch.bool:
        return torch.full_like(like, combine == "min")
    if like.dtype.is_floating_point:
        return torch.full_like(like, float("-inf" if combine == "max" else "inf"))
    info = torch.iinfo(like.dtype)
    return torch.full_like(like, info.min if combine == "max" else info.max)


def _terms(
    tensor: Tensor, parts: int, combine: str, noise: torch.Generator | None
) -> list[Tensor]:
    """`parts` tensors that combine to `tensor`."""
    if combine != "sum":
        return [tensor] + [_worse(tensor, combine, noise) for _ in range(parts - 1)]
    if noise is None or tensor.dtype == torch.bool:
        return [tensor] + [torch.zeros_like(tensor)] * (parts - 1)
    if tensor.dtype.is_floating_point:
        others = [
            torch.randn(tensor.shape, generator=noise, dtype=torch.float64).to(tensor)
            for _ in range(parts - 1)
        ]
    else:
        others = [
            torch.randint(0, 5, tensor.shape, generator=noise).to(tensor) for _ in range(parts - 1)
        ]
    return [tensor - sum(others, torch.zeros_like(tensor)), *others]


def _worse(tensor: Tensor, combine: str, noise: torch.Generator | None) -> Tensor:
    """A tensor that loses against `tensor` where they are combined by `max` or `min`."""
    if noise is None:
        return tensor
    amount = torch.randint(0, 3, tensor.shape, generator=noise).to(tensor.device)
    if tensor.dtype == torch.bool:
        return tensor & (amount > 0) if combine == "max" else tensor | (amount > 0)
    return tensor - amount.to(tensor.dtype) * (1 if combine == "max" else -1)


def _cut(
    tensor: Tensor, placement: Placement, parts: int, noise: torch.Generator | None
) -> list[Tensor]:
    if placement.kind == "S":
        dim, total = placement.dim, tensor.shape[placement.dim]
        return [
            tensor.narrow(dim, shard_offset(total, parts, i), shard_size(total, parts, i))
            for i in range(parts)
        ]
    if placement.kind == "P":
        return _terms(tensor, parts, placement.combine, noise)
    return [tensor] * parts


def scatter(
    tensor: Tensor, type: TensorType, mesh: Mesh, *, noise: torch.Generator | None = None
) -> list[Tensor]:
    """The shards of a whole tensor, one for each rank in rank order, without copying.

    A `P(sum)` axis leaves the value with coordinate 0 and zeros with the others; `P(max)` and
    `P(min)` copy it. Given `noise`, the parts are random ones that combine to the value.

    Raises RunError W0804 when the tensor does not have the type's shape.
    """
    if tuple(tensor.shape) != type.shape:
        raise RunError("W0804", f"expected {type}, got a tensor of shape {list(tensor.shape)}")
    shards = [tensor]
    for placement, parts in zip(type.placement or (), mesh.sizes, strict=True):
        shards = [piece for shard in shards for piece in _cut(shard, placement, parts, noise)]
    return shards


def local(tensor: Tensor, type: TensorType, mesh: Mesh, coord: Sequence[int]) -> Tensor:
    """The shard of a whole tensor at one coordinate; a view, but for zeros of a `P(sum)` axis.

    Equals `scatter(tensor, type, mesh)[mesh.rank(coord)]`.
    """
    for placement, parts, index in zip(type.placement or (), mesh.sizes, coord, strict=True):
        if placement.kind == "S":
            total = tensor.shape[placement.dim]
            offset = shard_offset(total, parts, index)
            tensor = tensor.narrow(placement.dim, offset, shard_size(total, parts, index))
        elif placement.kind == "P" and placement.combine == "sum" and index > 0:
            tensor = torch.zeros_like(tensor)
    return tensor


def _agree(copies: Sequence[Tensor], type: TensorType, axis: str) -> None:
    first = copies[0]
    for index, other in enumerate(copies[1:], start=1):
        if torch.equal(first, other):
            continue
        same_shape = first.shape == other.shape
        if same_shape and first.dtype.is_floating_point and first.numel():
            a, b = first.double(), other.double()
            scale = float(a.nan_to_num(0.0, 0.0, 0.0).abs().max())
            atol = _TOLERANCE[first.element_size()] * scale
            if torch.allclose(a, b, rtol=0.0, atol=atol, equal_nan=True):
                continue
        raise RunError(
            "W0803", f"copies of a {type} differ along axis {axis}",
            reason=f"coordinates 0 and {index} hold different values",
        )  # fmt: skip


def _join(
    pieces: Sequence[Tensor], placement: Placement, type: TensorType, axis: str, check: bool
) -> Tensor:
    if placement.kind == "S":
        return torch.cat(list(pieces), placement.dim)
    if placement.kind == "P":
        return combine_terms(pieces, placement.combine)
    if check:
        _agree(pieces, type, axis)
    return pieces[0]


def gather(
    shards: Sequence[Tensor], type: TensorType, mesh: Mesh, *, check: bool = False
) -> Tensor:
    """The whole tensor from the shards of all ranks, in rank order: the inverse of `scatter`.

    Args:
        check: compare replicated copies with each other.

    Raises RunError W0803 when copies differ, or when the result does not have the type's shape.
    """
    pieces = list(shards)
    axes = list(zip(type.placement or (), mesh.axes, strict=True))
    for placement, (name, parts) in reversed(axes):
        pieces = [
            _join(pieces[start : start + parts], placement, type, name, check)
            for start in range(0, len(pieces), parts)
        ]
    (whole,) = pieces
    if tuple(whole.shape) != type.shape:
        raise RunError("W0803", f"shards of a {type} make up a tensor of {list(whole.shape)}")
    return whole


__all__ = ["combine_terms", "gather", "local", "neutral", "scatter"]
