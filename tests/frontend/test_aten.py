"""The table of ATen entries and the derivatives of IR ops, each against eager PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft.frontend.aten import broken_entries
from weft.frontend.train_step import trace_joint
from weft.ir.verify import verify
from weft.runtime.interpreter import evaluate


class Wrapped(nn.Module):
    """A function of tensors as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Tensor) -> Any:
        return self.function(*args)


def randn(*shape: int) -> Tensor:
    """Random numbers that require a gradient."""
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


def positive(*shape: int) -> Tensor:
    return (torch.rand(*shape, dtype=torch.float64) + 0.5).requires_grad_()


def ints(high: int, *shape: int) -> Tensor:
    return torch.randint(0, high, shape)


def mask(*shape: int) -> Tensor:
    """Random truth."""
    return torch.rand(*shape) > 0.4


def _put(x: Tensor, index: Tensor, values: Tensor) -> Tensor:
    x = x * 1
    x[index] = values
    return x


def _inplace(x: Tensor) -> Tensor:
    y = x.clone()
    y[1:3] = 2 * y[:2]
    y[:, 0] += 1
    return y.mul_(3).tanh_()


#: name -> (function, inputs)
CASES: dict[str, tuple[Callable[..., Any], Callable[[], list[Tensor]]]] = {
    # pointwise
    "unary": (lambda x: [f(x) for f in (
        torch.neg, torch.abs, torch.exp, torch.log, torch.log1p, torch.expm1, torch.sqrt,
        torch.rsqrt, torch.reciprocal, torch.sin, torch.cos, torch.tanh, torch.erf, torch.sigmoid,
        torch.relu, F.silu, F.softplus, F.gelu, torch.square)], lambda: [positive(3, 4)]),
    "activations": (lambda x: [f(x) for f in (
        F.leaky_relu, F.elu, F.hardtanh, F.hardswish, F.mish, F.selu, F.relu6, F.softsign,
        F.logsigmoid, lambda y: F.gelu(y, approximate="tanh"), F.tanhshrink, F.celu)],
        lambda: [randn(3, 4)]),
    "rounding": (lambda x: [x.floor(), x.ceil(), x.round(), x.sign(), x * x.trunc()],
                 lambda: [randn(3, 4)]),
    "binary-broadcast": (lambda x, y: [x + y, x - y, x * y, x / y, 2 - x, 3 / y, x**3, x**-1.5,
                                       y**x.abs(), torch.add(x, y, alpha=2), x % y],
                         lambda: [positive(3, 1, 4), positive(2, 4)]),
    "integers": (lambda x, i, j: [x * i, x / j, i + j, i * 2.5, i / 2, i // j, i % j, -i, i > j,
                                  (i == j) | (i < 2), ~(i != 3), i.float(), i.bool() & (j > 1)],
                 lambda: [randn(4), ints(5, 4), ints(4, 4) + 1]),
    "extremes": (lambda x, y: [torch.maximum(x, y), torch.minimum(x, y), x.clamp(-0.5, 0.5),
                               x.clamp(min=0.1), x.clamp(max=y), x.amax(1), x.amin((0, 1)), x.max(),
                               x.max(1)[0], x.argmax(0)], lambda: [randn(3, 4), randn(3, 4)]),
    "selection": (lambda x, y, m: [torch.where(m, x, y), torch.where(m, x, 0.0), x.masked_fill(m, 2),
                                   x.masked_fill(~m, float("-inf")).softmax(-1), x * m],
                  lambda: [randn(3, 4), randn(4), ~torch.eye(3, 4, dtype=torch.bool)]),
    "fused-pointwise": (lambda x, y: [torch.lerp(x, y, 0.3), torch.addcmul(x, x, y, value=2),
                                      torch.addcdiv(x, y, y, value=0.5), torch.hypot(x, y)],
                        lambda: [randn(3, 4), positive(3, 4)]),
    "tests": (lambda x: [x.isnan(), x.isinf(), x.isfinite(), x.any(), (x > 0).all(1), x.sum()],
              lambda: [randn(3, 4)]),
    "dtypes": (lambda x: [x.float() * 2, x.to(torch.bfloat16) + 1, x.half().mean(), x.float().sum(
        dtype=torch.float64), x.int(), x.double()], lambda: [randn(3, 4)]),
    # contractions
    "matmul": (lambda a, b, c, v: [a @ b, c @ b, c @ a.mT, v @ b, a @ v, v @ v, b.T @ a[0:1].mT,
                                   torch.outer(v, v)],
               lambda: [randn(3, 4), randn(4, 5), randn(2, 6, 4), randn(4)]),
    "batched-matmul": (lambda a, b: [a @ b, a[:, :1] @ b, a[0] @ b, torch.bmm(a[0], b[0])],
                       lambda: [randn(2, 3, 4, 5), randn(2, 3, 5, 6)]),
    "linear": (lambda x, w, b: [F.linear(x, w, b), F.linear(x[0, 0], w), F.bilinear(
        x, x, w.unsqueeze(1).expand(6, 5, 5))], lambda: [randn(2, 3, 5), randn(6, 5), randn(6)]),
    "addmm": (lambda b, x, w: [torch.addmm(b, x.reshape(6, 5), w).view(2, 3, 4), torch.addmm(
        b, x[0], w, beta=0.5, alpha=2), torch.baddbmm(b, x, w.expand(2, 5, 4))],
        lambda: [randn(4), randn(2, 3, 5), randn(5, 4)]),
    "einsum": (lambda a, b, c: [torch.einsum("bik,bkj->bij", a, b), torch.einsum("bik,bkj->ij", a, b),
                                torch.einsum("bik,bkj,jc->bc", a, b, c), torch.einsum("bik->kb", a),
                                torch.einsum("...k,kj->...j", a, b[0])],
               lambda: [randn(2, 3, 4), randn(2, 4, 5), randn(5, 6)]),
    "convolution": (lambda x, w, b: [F.conv2d(x, w, b), F.conv2d(x, w, None, 2, 1), F.conv2d(
        x, w, b, (1, 2), "same" if False else (0, 1), 2)],
        lambda: [randn(2, 3, 8, 9), randn(4, 3, 3, 3), randn(4)]),
    "convolution-1d-groups": (lambda x, w: [F.conv1d(x, w, None, 1, 1, groups=2), F.conv1d(
        x, w, padding="same", groups=2)], lambda: [randn(2, 4, 9), randn(6, 2, 3)]),
    "transposed-convolution": (lambda x, w, b: F.conv_transpose2d(x, w, b, 2, 1, 1),
                               lambda: [randn(2, 3, 4, 5), randn(3, 4, 3, 3), randn(4)]),
    # windows and grids
    "average-pooling": (lambda x: [
        F.avg_pool2d(x, 3, 1, 1), F.avg_pool2d(x, 3, 2, 1, count_include_pad=False), F.avg_pool2d(
            x, 3, 2, divisor_override=2), F.avg_pool1d(x[:, 0], 3, 2)],
        lambda: [randn(2, 3, 8, 7)]),
    "resizing": (lambda x: [F.interpolate(x, scale_factor=2, mode="bilinear"), F.interpolate(
        x, size=(5, 7)), F.interpolate(x, scale_factor=2, mode="bicubic"), F.adaptive_avg_pool2d(
            x, (3, 4))], lambda: [randn(2, 3, 4, 6)]),
    "edges": (lambda x: [F.pad(x, (1, 2, 1, 0), mode) for mode in (
        "reflect", "replicate", "circular")] + [F.pad(x, (-1, 2, 0, 1), "replicate")],
        lambda: [randn(2, 3, 4, 6)]),
    "strided-writes": (lambda x, y: [torch.slice_scatter(x, y, 1, 2, 6, 2), torch.slice_scatter(
        x, y, 1, 3, 5)], lambda: [randn(3, 8), randn(3, 2)]),
    # attention
    "attention": (lambda q, k, v: [F.scaled_dot_product_attention(q, k, v), F.
                  scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)],
                  lambda: [randn(2, 4, 5, 6), randn(2, 4, 5, 6), randn(2, 4, 5, 6)]),
    "attention-mask": (lambda q, k, v, m: [F.scaled_dot_product_attention(q, k, v, m), F.
                       scaled_dot_product_attention(q[:, 0], k[:, 0], v[:, 0])],
                       lambda: [randn(2, 4, 5, 6), randn(2, 4, 7, 6), randn(2, 4, 7, 6),
                                mask(5, 7) | torch.eye(5, 7, dtype=torch.bool)]),
    "attention-bias-with-gradient": (F.scaled_dot_product_attention, lambda: [
        randn(2, 4, 5, 6), randn(2, 4, 7, 6), randn(2, 4, 7, 6), randn(1, 4, 5, 7)]),
    "attention-groups": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
                         lambda: [randn(2, 6, 5, 4), randn(2, 2, 5, 4), randn(2, 2, 5, 4)]),
    # rows and norms
    "softmax": (lambda x: [x.softmax(-1), x.softmax(0), x.log_softmax(1), x.logsumexp(1),
                           x.logsumexp(-1, True), F.softmin(x, 2), F.normalize(x, dim=1)],
                lambda: [randn(3, 4, 5)]),
    "layer-norm": (lambda x, w, b: [F.layer_norm(x, (5,), w, b), F.layer_norm(x, (4, 5)), F.
                   layer_norm(x, (5,), w), F.rms_norm(x, (5,), w), F.rms_norm(x, (5,), eps=1e-4)],
                   lambda: [randn(3, 4, 5), randn(5), randn(5)]),
    "group-norm": (lambda x, w, b: [F.group_norm(x, 2, w, b), F.group_norm(x, 4), F.instance_norm(x)],
                   lambda: [randn(3, 4, 5, 2), randn(4), randn(4)]),
    "batch-norm": (lambda x, w, b: [F.batch_norm(x, None, None, w, b, True), F.batch_norm(
        x, w.detach(), b.detach().abs() + 1, w, b, False)],
        lambda: [randn(3, 4, 5, 2), randn(4), randn(4)]),
    # reductions
    "reductions": (lambda x: [x.sum(), x.sum(1), x.mean((0, 2), True), x.var(1), x.std(), x.var(
        2, correction=0), x.prod(1), x.norm(), x.norm(dim=1), x.abs().sum((0, 1)), torch.var_mean(
        x, 0)[0], x.cumsum(1), x.diff(dim=2)], lambda: [randn(3, 4, 5)]),
    "order": (lambda x: [x.sort(1)[0], x.topk(2)[0], x.sort(0, True)[1], x.topk(3, 0)[1],
                         x.argsort(1), x.median() * 0], lambda: [randn(4, 5)]),
    # movement
    "shapes": (lambda x: [x.reshape(6, 4), x.flatten(1), x.permute(2, 0, 1), x.mT, x.unsqueeze(1),
                          x[None, ..., 0:1].squeeze(), x.expand(5, 2, 3, 4), x.repeat(2, 1, 3),
                          x.unflatten(2, (2, 2)), x.swapaxes(0, 2).contiguous().view(-1)],
               lambda: [randn(2, 3, 4)]),
    "pieces": (lambda x: [*x.split(2, 1), *x.chunk(3, 1), x[1], x[:, -2:], x[::2, 1::2], x[..., 0],
                          *x.unbind(0), x.narrow(1, 1, 2), *x.split([1, 4], 1), x.select(1, -1)],
               lambda: [randn(3, 5)]),
    "joins": (lambda x, y: [torch.cat([x, y], 1), torch.stack([x, x], 1), F.pad(x, (1, 2, 0, 1)),
                            F.pad(x, (-1, 1), value=3.0), x.flip(0), x.flip(0, 1), x.roll(1, 1),
                            x.roll(2), torch.hstack([x, y]), F.pad(x, (1, 1), mode="reflect"),
                            x.tril(), x.triu(1), torch.meshgrid(x[0], y[0], indexing="ij")[0]],
              lambda: [randn(3, 4), randn(3, 2)]),
    "creation": (lambda x: [x + torch.arange(4), x * torch.ones(3, 1), x + torch.full((4,), 0.5),
                            x @ torch.eye(4, dtype=x.dtype), x * torch.zeros_like(x), torch.arange(
                            1, 9, 2) * x, x * torch.tensor([1.0, 2.0, 3.0, 4.0]), x.new_ones(2),
                            torch.linspace(0, 1, 4) * x], lambda: [randn(3, 4)]),
    "in-place": (_inplace, lambda: [randn(4, 3)]),
    # indexing
    "embedding": (lambda i, w: [F.embedding(i, w), F.embedding(i, w, padding_idx=1),
                                F.one_hot(i, 7) @ w.long()], lambda: [ints(7, 3, 4), randn(7, 5)]),
    "gather": (lambda x, i, s: [x.gather(1, i), x.scatter(1, i, s), x.scatter_add(1, i, s),
                                x.index_select(0, i[0] % 3), x.take_along_dim(i, 1)],
               lambda: [randn(3, 6), torch.stack([torch.randperm(6)[:4] for _ in range(3)]),
                        randn(3, 4)]),
    "index": (lambda x, i, j: [x[i], x[:, j], x[i, j], x[i - 3], x[torch.arange(3)[:, None], j],
                               x[:, :, i], x[i, :, j]], lambda: [randn(3, 4, 5), ints(3, 2), ints(3, 2)]),
    "index-put": (lambda x, v: [_put(x, torch.tensor([2, 0]), v), x.index_add(0, torch.tensor(
        [1, 1]), v), _put(x, x[:, 0] > 0, torch.tensor(5.0, dtype=x.dtype)), x.index_put(
        (torch.tensor([1, 1]),), v, accumulate=True)], lambda: [randn(3, 4), randn(2, 4)]),
    # losses and pooling
    "cross-entropy": (lambda x, y, w: [
        F.cross_entropy(x, y), F.cross_entropy(x, y, w), F.cross_entropy(x, y, reduction="none"),
        F.cross_entropy(x, y, w, label_smoothing=0.2), F.cross_entropy(x, y, ignore_index=2),
        F.cross_entropy(x, x.softmax(1)), F.cross_entropy(x, y, reduction="sum"),
        F.nll_loss(x.log_softmax(1), y), F.nll_loss(x.log_softmax(1), y, w, ignore_index=1)],
        lambda: [randn(6, 4), ints(4, 6), torch.rand(4, dtype=torch.float64)]),
    "cross-entropy-of-images": (F.cross_entropy, lambda: [randn(2, 4, 3, 3), ints(4, 2, 3, 3)]),
    "losses": (lambda x, y: [F.mse_loss(x, y), F.l1_loss(x, y), F.smooth_l1_loss(x, y), F.huber_loss(
        x, y), F.kl_div(x, y.softmax(1), reduction="batchmean"), F.cosine_similarity(x, y),
        F.binary_cross_entropy_with_logits(x, y.sigmoid()), F.binary_cross_entropy(
        x.sigmoid(), y.sigmoid())], lambda: [randn(4, 5), randn(4, 5)]),
    "pooling": (lambda x: [F.max_pool2d(x, 2), F.max_pool2d(x.relu(), 3, 2, 1), F.max_pool2d(
        x, 3, 1, dilation=2), F.max_pool2d(x, 3, 2, ceil_mode=True), F.avg_pool2d(x, 2), F.
        adaptive_avg_pool2d(x, 1), F.adaptive_avg_pool2d(x, (4, 2)), F.avg_pool2d(x, 3, 2, 1),
        F.adaptive_max_pool2d(x, 2), F.interpolate(x, scale_factor=2), F.max_pool1d(x[0], 3, 2, 1),
        F.max_pool3d(x, 2), F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2)],
        lambda: [randn(2, 3, 8, 8)]),
    "opaque": (lambda x: [torch.linalg.inv(x @ x.mT + torch.eye(3)), torch.atan2(x, x + 3),
                          torch.special.erfinv(x.tanh() / 2), x.det()], lambda: [randn(3, 3)]),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_equal_eager(name: str) -> None:
    torch.manual_seed(3)
    function, make = CASES[name]
    inputs = make()
    traced = trace_joint(Wrapped(function), inputs)
    verify(traced.module)
    outputs = function(*[x * 1 if x.requires_grad else x for x in inputs])
    theirs = list(outputs) if isinstance(outputs, (list, tuple)) else [outputs]
    entry = traced.module.entry
    tangents = {int(a["of"]): torch.randn_like(theirs[int(a["of"])]) for a in entry.param_attrs  # type: ignore[arg-type]
                if a["role"] == "tangent"}  # fmt: skip
    given = iter(inputs)
    values = [
        tangents[int(a["of"])] if a["role"] == "tangent"  # type: ignore[arg-type]
        else traced.tensors[str(a["name"])] if a["role"] == "buffer" else next(given).detach()
        for a in entry.param_attrs
    ]  # fmt: skip
    results = evaluate(traced.module, values)
    roles = [a["role"] for a in entry.result_attrs]
    mine = [r for r, role in zip(results, roles, strict=True) if role == "output"]
    for number, (own, eager) in enumerate(zip(mine, theirs, strict=True)):
        tight = {} if own.dtype in (torch.float64, torch.int64) else {"rtol": 2e-2, "atol": 1e-2}
        torch.testing.assert_close(own, eager.detach(), msg=lambda m, n=number: f"[{n}] {m}", **tight)
    active = {n: t for n, t in tangents.items() if theirs[n].requires_grad}
    assert set(active) == set(tangents) or name in ("rounding", "order")
    wanted = torch.autograd.grad([theirs[n] for n in active], [x for x in inputs if x.requires_grad],
                                 list(active.values()), allow_unused=True)  # fmt: skip
    grads = iter(r for r, role in zip(results, roles, strict=True) if role == "grad")
    for eager in wanted:
        if eager is not None:
            torch.testing.assert_close(next(grads), eager, rtol=1e-5, atol=1e-5)


def test_every_entry_names_an_operator_of_this_torch() -> None:
    assert broken_entries() == []


def test_an_unknown_operator_is_named_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", logger="weft.trace"):
        traced = trace_joint(Wrapped(lambda x: torch.linalg.qr(x)[0]), [randn(3, 3)])
    assert "aten.linalg_qr" in caplog.text
    targets = {op.attrs["target"] for _, op in traced.module.walk() if op.name == "aten"}
    assert any("linalg_qr" in str(target) for target in targets)
