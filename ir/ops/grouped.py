"""Grouped matrix products: each row meets the matrix of its group, as tokens meet their experts.

A split of `e` is expert parallelism: a rank holds some experts and computes the rows of these, the
rows of others are 0, so the result is a partial sum. A split of `t` is data parallelism, `n` and `k`
are tensor parallelism within the experts. Lepikhin et al., GShard, 2021.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..opdef import define
from ..signature import Signature
from ..types import TensorType

#: PyTorch's grouped product wants rows of whole vectors of this many bytes
_ALIGNED_BYTES = 16


def _work(s: Signature) -> float:
    """Two operations for each row and element of one matrix: a row has one group."""
    return 2.0 * s.size("t") * s.size("k") * s.size("n")


def _kernel(c: Any, x: Any) -> Callable[..., Any] | None:
    """PyTorch's grouped product where it takes the dtype; it wants rows sorted by group."""
    known = x.dtype in (c.torch.float32, c.torch.bfloat16, c.torch.float16)
    return c.torch.nn.functional.grouped_mm if c.fused and known else None


def _sorted(c: Any, group: Any, count: int) -> tuple[Any, Any]:
    """The order of rows by this rank's groups, those of other ranks last; where each group ends."""
    own = group - c.offset("e")
    own = c.torch.where((own < 0) | (own >= count), count, own)
    order = own.argsort(stable=True)
    groups = c.torch.arange(count, device=group.device)
    return order, (own.unsqueeze(1) <= groups).sum(0, dtype=c.torch.int32)


def _aligned(c: Any, x: Any, *dims: int) -> Any:
    """`x` padded with zeros so that `dims` are whole vectors."""
    unit = _ALIGNED_BYTES // x.element_size()
    gaps = {d % x.dim(): -x.shape[d] % unit for d in dims}
    if not any(gaps.values()):
        return x
    wide = [n for d in range(x.dim() - 1, -1, -1) for n in (0, gaps.get(d, 0))]
    return c.torch.nn.functional.pad(x, wide)


def _grouped_product(c: Any, x: Any, weight: Any, group: Any) -> Any:
    count, _, columns = weight.shape
    kernel = _kernel(c, x)
    if kernel is not None:
        order, ends = _sorted(c, group, count)
        rows = kernel(_aligned(c, x[order], -1), _aligned(c, weight, -2, -1), offs=ends)
        inside = c.torch.arange(len(x), device=x.device).unsqueeze(1) < ends[-1]
        rows = c.torch.where(inside, rows[:, :columns], 0)  # the others are not written
        return c.torch.empty_like(rows).index_copy(0, order, rows)
    y = x.new_zeros(c.shape())
    for number in range(count):
        own = (group == c.offset("e") + number).unsqueeze(1)
        y = y + c.torch.where(own, x, 0) @ weight[number]
    return y


def _grouped_weight_grad(c: Any, dy: Any, x: Any, group: Any) -> Any:
    count, rows, columns = c.shape()
    kernel = _kernel(c, x)
    if kernel is not None:
        order, ends = _sorted(c, group, count)
        left, right = _aligned(c, x[order], -1), _aligned(c, dy[order], -1)
        return kernel(left.t(), right, offs=ends)[:, :rows, :columns]
    owns = [(group == c.offset("e") + number).unsqueeze(1) for number in range(count)]
    return c.torch.stack([c.torch.where(own, x, 0).t() @ dy for own in owns])


define(name="grouped_product", family="contraction", dtypes="TTi", flops=_work,
       doc="Each row times the matrix of its group: (x, weights, group of each row) -> y. Rows in "
           "any order; a row whose group is not in 0..e-1 gives 0.",
       signature="t k, e k n, t -> t n ; e=sum, k=sum", linear=((0,), (1,)),
       types=lambda ins, attrs: [
           TensorType(ins[0].dtype, (ins[0].shape[0], ins[1].shape[2]))],
       ref=_grouped_product)  # fmt: skip
define(name="grouped_weight_grad", family="contraction", dtypes="TTi", flops=_work,
       doc="Gradient of grouped_product for its matrices: (dy, x, group of each row) -> dweights.",
       signature="t n, t k, t -> e k n ; t=sum", linear=((0,), (1,)),
       ref=_grouped_weight_grad)  # fmt: skip
