"""Cross-entropy of a linear layer, and merged attention, in the interpreter. Needs TRITON_INTERPRET=1."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.codegen.kit import TORCH, check_close
from tests.codegen.skeletons import module_of
from torch import Tensor

from weft.codegen.attention_merge import merge_source
from weft.codegen.gemm import Tile
from weft.codegen.linear_loss import (
    LinearLoss,
    linear_loss_gradient_source,
    linear_loss_source,
)
from weft.ir.types import TensorType

TILE = Tile(16, 32, 16, 4, 2)


def check(got: Tensor, expected: Tensor, dtype: str) -> None:
    check_close(got, expected, TensorType(dtype, tuple(expected.shape)))


@settings(max_examples=12, deadline=None)
@given(st.sampled_from([0, 1, 16, 21]), st.sampled_from([1, 50, 130]), st.sampled_from([1, 16, 40]),
       st.sampled_from(["f32", "bf16"]), st.sampled_from([1, 3]))  # fmt: skip
def test_loss_and_gradient_equal_the_reference(m: int, n: int, k: int, dtype: str, parts: int) -> None:
    generator = torch.Generator().manual_seed(m + n)
    x, w = (torch.randn(s, k, generator=generator).to(TORCH[dtype]) for s in (m, n))
    labels = torch.randint(0, n, (m,), generator=generator)
    labels[::5] = -100
    dloss = torch.rand(m, generator=generator)
    wide_x, wide_w = x.double().requires_grad_(), w.double().requires_grad_()
    logits = wide_x @ wide_w.t()
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    grads = torch.autograd.grad(expected, (wide_x, wide_w), dloss.double())
    problem = LinearLoss("l", m, n, k, dtype, parts=parts, chunk=48)
    forward, backward = (make(problem, TILE) for make in (linear_loss_source, linear_loss_gradient_source))
    loss, lse = module_of("l", forward.text).launch(x, w, labels)
    check(loss, expected.detach(), "f32")
    check(lse, logits.logsumexp(-1).detach(), "f32")
    dx, dw = module_of("l", backward.text).launch(dloss, x, w, labels, lse)
    for got, wanted in ((dx, grads[0]), (dw, grads[1])):
        assert got.dtype == TORCH[dtype]
        # the gradients of logits are rounded to the dtype before they are multiplied and summed
        error = 1e-5 if dtype == "f32" else 2.0**-7
        size = max(1.0, float(wanted.abs().max())) if wanted.numel() else 1.0
        assert not wanted.numel() or (got.double() - wanted).abs().max() <= error * size


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_parts_of_the_keys_are_joined(dtype: str) -> None:
    """A shared prefix of 30 keys and 12 of each sequence's own; a row may see nothing of a part."""
    scores, v = torch.randn(5, 7, 42), torch.randn(42, 24)
    scores[0, 0, :30] = float("-inf")
    scores[0, 1, 30:] = float("-inf")
    scores[0, 2] = float("-inf")

    def attend(at: slice) -> tuple[Tensor, Tensor]:
        lse = scores.double()[..., at].logsumexp(-1)
        p = (scores.double()[..., at] - lse.masked_fill(lse.isinf(), 0.0)[..., None]).exp()
        return p @ v.double()[at], lse

    parts = [attend(slice(0, 30)), attend(slice(30, 42))]
    stored = [x.to(TORCH[dtype]) if x.dim() == 3 and x.shape[-1] == 24 else x.float()
              for part in parts for x in part]  # fmt: skip
    out, lse = module_of("m", merge_source("m", 35, 24, dtype).text).launch(*stored)
    joined = [x.double() for x in (stored[0], stored[2])]
    shares = torch.stack([parts[0][1], parts[1][1]]).softmax(0).nan_to_num(0.0)
    check(out, joined[0] * shares[0][..., None] + joined[1] * shares[1][..., None], dtype)
    check(lse, attend(slice(0, 42))[1], "f32")
