"""Every reference semantics on meta and fake tensors, under make_fx, and under autograd."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from tests.runtime.examples import CASES, Case
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from weft.ir.opdef import OPS
from weft.runtime.context import TORCH_DTYPES, OpContext, results_of


def run(case: Case, values: Sequence[Tensor], device: str = "cpu") -> tuple[Tensor, ...]:
    return results_of(case.op, OPS[case.name].ref(OpContext(case.op, device=device), *values))


def assert_types(case: Case, results: Sequence[Tensor]) -> None:
    for tensor, value in zip(results, case.op.results, strict=True):
        assert tuple(tensor.shape) == value.type.shape
        assert tensor.dtype == TORCH_DTYPES[value.type.dtype]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_semantics_need_no_data(case: Case) -> None:
    results = run(case, [t.to("meta") for t in case.values()], "meta")
    assert_types(case, results)
    assert all(t.device.type == "meta" for t in results)
    with FakeTensorMode() as mode:
        assert_types(case, run(case, [mode.from_tensor(t) for t in case.values()]))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_semantics_can_be_traced(case: Case) -> None:
    values = case.values()
    graph = make_fx(lambda *xs: run(case, xs), tracing_mode="fake")(*values)
    for mine, theirs in zip(graph(*values), run(case, values), strict=True):
        torch.testing.assert_close(mine, theirs, equal_nan=True)


#: ops whose gradients training takes by differentiating their semantics
DIFFERENTIABLE = ("pointwise", "contraction", "reduction", "row", "movement", "indexing")
WITHOUT_GRADIENT = ("floor_divide",)  # nor has it one in PyTorch


@pytest.mark.parametrize(
    "case",
    [c for c in CASES if OPS[c.name].family in DIFFERENTIABLE
     and not c.name.endswith("_backward") and c.name not in WITHOUT_GRADIENT],
    ids=str,
)
def test_semantics_have_gradients(case: Case) -> None:
    values = [t.requires_grad_() if t.dtype.is_floating_point else t for t in case.values()]
    results = run(case, values)
    smooth = [t for t in results if t.requires_grad]
    leaves = [t for t in values if t.requires_grad]
    if not smooth:
        assert not leaves or not any(t.dtype.is_floating_point for t in results)
        return
    terms = [torch.where(t.isfinite(), t, t.new_zeros(())).double().sum() for t in smooth]
    gradients = torch.autograd.grad(sum(terms, torch.zeros(())), leaves, allow_unused=True)
    assert any(g is not None for g in gradients)
    assert all(g.isfinite().all() for g in gradients if g is not None)
