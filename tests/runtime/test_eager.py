"""The reference semantics against plain PyTorch, values and gradients."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.runtime.examples import EXAMPLES, Case
from torch import Tensor

from weft.ir.module import Attr, Op, Value
from weft.ir.opdef import OPS
from weft.ir.ops.creation import philox
from weft.ir.types import TensorType
from weft.runtime.context import WEFT_DTYPES, OpContext, results_of


def run(
    name: str, operands: Sequence[Tensor], results: Sequence[Tensor | tuple[int, ...]] = (),
    fused: bool = False, **attrs: Attr,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Run one op on tensors; `results` are shapes (of the first operand's dtype) or examples."""
    types = [TensorType(WEFT_DTYPES[t.dtype], tuple(t.shape)) for t in operands]
    if results:
        outs = [
            TensorType(types[0].dtype, r) if isinstance(r, tuple)
            else TensorType(WEFT_DTYPES[r.dtype], tuple(r.shape))
            for r in results
        ]  # fmt: skip
    else:
        rule = OPS[name].types
        assert rule is not None
        defaults = {k: s.default for k, s in OPS[name].attrs.items() if s.default is not None}
        outs = list(rule(types, {**defaults, **attrs}))
    op = Op(
        name, tuple(Value(f"x{i}", t) for i, t in enumerate(types)),
        tuple(Value(f"y{i}", t) for i, t in enumerate(outs)), attrs,
    )  # fmt: skip
    return results_of(op, OPS[name].ref(OpContext(op, fused=fused), *operands))


def close(a: Tensor, b: Tensor, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def leaf(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype, requires_grad=True)


def grads(y: Tensor, dy: Tensor, *xs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(y, xs, dy)


DIM_SIZES = {"a": 2, "b": 3, "c": 4, "d": 5, "e": 1}


@given(st.lists(st.sampled_from("abcde"), unique=True, max_size=4),
       st.lists(st.sampled_from("abcde"), unique=True, max_size=4), st.randoms())  # fmt: skip
@settings(max_examples=300, deadline=None)
def test_einsum_equals_torch_for_any_spec(x: list[str], y: list[str], rng: random.Random) -> None:
    names = sorted({*x, *y})
    out = rng.sample(names, rng.randint(0, len(names)))
    spec = f"{' '.join(x) or '_'}, {' '.join(y) or '_'} -> {' '.join(out) or '_'}"
    a, b = (torch.randn([DIM_SIZES[n] for n in own], dtype=torch.float64) for own in (x, y))
    expected = torch.einsum(f"{''.join(x)},{''.join(y)}->{''.join(out)}", a, b)
    close(run("einsum", [a, b], [tuple(expected.shape)], spec=spec)[0], expected)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("masked", ["no", "causal", "bool", "added"])
def test_attention_and_its_gradient_equal_scaled_dot_product_attention(
    fused: bool, kv_heads: int, masked: str
) -> None:
    dtype = torch.float32 if fused else torch.float64
    tolerance = 2e-5 if fused else 1e-11
    torch.manual_seed(0)
    q, k, v = (leaf(2, h, 6, 8, dtype=dtype) for h in (4, kv_heads, kv_heads))
    mask = None
    if masked == "bool":
        mask = torch.rand(2, 1, 6, 6) < 0.6
        mask[..., 0] = True
    elif masked == "added":
        mask = torch.randn(1, 4, 6, 6, dtype=dtype)
    y = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=masked == "causal", scale=0.3, enable_gqa=True
    )
    dy = torch.randn_like(y)
    attrs: dict[str, Attr] = {"scale": 0.3, "causal": masked == "causal", "mask": mask is not None}
    rest = [] if mask is None else [mask]
    operands = [q.detach(), k.detach(), v.detach()]
    out, lse = run("attention", [*operands, *rest], fused=fused, **attrs)
    close(out, y.detach(), tolerance)
    mine = run("attention_backward", [dy, *operands, out, lse, *rest], fused=fused, **attrs)
    for ours, theirs in zip(mine, grads(y, dy, q, k, v), strict=True):
        close(ours, theirs, tolerance)
    again = run("attention_backward", [dy, *operands, out, lse.contiguous(), *rest], fused=fused,
                **attrs)  # fmt: skip
    close(again[0], mine[0], tolerance)


def test_attention_autograd_through_the_semantics_equals_attention_backward() -> None:
    q, k, v = leaf(2, 4, 5, 3), leaf(2, 2, 6, 3), leaf(2, 2, 6, 7)
    seed = torch.tensor(11)
    attrs: dict[str, Attr] = {"scale": 0.3, "dropout": 0.4}
    out, lse = run("attention", [q, k, v, seed], **attrs)
    dy = torch.randn_like(out)
    mine = run("attention_backward", [dy, q, k, v, out, lse, seed], **attrs)
    for ours, theirs in zip(mine, grads(out, dy, q, k, v), strict=True):
        close(ours.detach(), theirs)


def test_rows_that_see_nothing_give_zero_and_no_nan() -> None:
    q, k, v = (torch.randn(1, 1, 3, 4, dtype=torch.float64) for _ in range(3))
    mask = torch.tensor([[True, True, True], [False, False, False], [True, False, False]])
    out, lse = run("attention", [q, k, v, mask.reshape(1, 1, 3, 3)], scale=1.0, mask=True)
    assert torch.equal(out[0, 0, 1], torch.zeros(4, dtype=torch.float64))
    assert lse[0, 0, 1] == float("-inf") and not out.isnan().any()


def test_layer_norm_and_its_gradients() -> None:
    x, w, b = leaf(3, 5, 7), leaf(7), leaf(7)
    y = F.layer_norm(x, (7,), w, b, 1e-4)
    out, mean, rstd = run("layer_norm", [x, w, b], eps=1e-4)
    close(out, y)
    dy = torch.randn_like(y)
    mine = run("layer_norm_backward", [dy, x, w, mean, rstd], [x, w, b])
    for ours, theirs in zip(mine, grads(y, dy, x, w, b), strict=True):
        close(ours.detach(), theirs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fused", [False, True])
def test_batch_norm_and_its_gradients(dtype: torch.dtype, fused: bool) -> None:
    x = (torch.randn(5, 3, 4, 7, dtype=torch.float64) * 2 + 3).to(dtype).requires_grad_()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    w, b = leaf(3, dtype=wide), leaf(3, dtype=wide)
    y = F.batch_norm(x.double(), None, None, w.double(), b.double(), True, eps=1e-3)
    count, rounding = x.numel() // 3, {8: 1e-11, 4: 2e-5, 2: 3e-2}[dtype.itemsize]
    mean = x.detach().to(wide).mean((0, 2, 3))
    var = run("channel_squares", [x.detach(), mean], fused=fused)[0] / count
    out = run("batch_norm", [x, mean, var, w, b], fused=fused, eps=1e-3)[0]
    close(out.detach().double(), y.detach(), rounding)
    dy = torch.randn_like(out)
    with torch.no_grad():
        total, products = run("batch_norm_sums", [dy, x, mean], fused=fused)
        operands = [dy, x, mean, var, w, total, products]
        dx = run("batch_norm_backward", operands, fused=fused, eps=1e-3)[0]
    dw = products * (var + 1e-3).rsqrt()
    for ours, theirs in zip((dx, dw, total), grads(y, dy.double(), x, w, b), strict=True):
        close(ours.double(), theirs.double(), rounding * 10)


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_max_pool_and_its_gradient(data: st.DataObject) -> None:
    spatial = data.draw(st.sampled_from([2, 3]))
    sizes = [data.draw(st.integers(5, 7)) for _ in range(spatial)]
    kernel = [data.draw(st.integers(1, 3)) for _ in range(spatial)]
    window = {
        "kernel": tuple(kernel), "stride": tuple(data.draw(st.integers(1, 3)) for _ in kernel),
        "padding": tuple(data.draw(st.integers(0, k // 2)) for k in kernel),
        "dilation": tuple(1 if k == 1 else data.draw(st.integers(1, 2)) for k in kernel),
        "ceil": data.draw(st.booleans()),
    }  # fmt: skip
    lead = data.draw(st.sampled_from([(3,), (2, 3), (2, 1, 3)]))
    x = torch.randint(-3, 3, (*lead, *sizes)).double().requires_grad_()  # with ties
    pool = F.max_pool2d if spatial == 2 else F.max_pool3d
    y = pool(x.flatten(0, -spatial - 1), *window.values()).unflatten(0, lead)
    ours, index = run("max_pool", [x.detach()], **window)
    assert torch.equal(ours, y)
    dy = torch.randn_like(y)
    (theirs,) = grads(y, dy, x)
    close(run("max_pool_backward", [dy, x.detach(), index], **window)[0], theirs)


def test_layer_norm_gradient_takes_statistics_of_any_strides() -> None:
    dy, x, w = (torch.randn(*s, dtype=torch.float64) for s in ((3, 5, 7), (3, 5, 7), (7,)))
    mean, rstd = torch.randn(3, 9, 1, dtype=torch.float64), torch.rand(3, 9, 1, dtype=torch.float64)
    mean, rstd = mean[:, 2:7], rstd[:, 2:7]
    strided = run("layer_norm_backward", [dy, x, w, mean, rstd], [x, w, w])
    mean, rstd = mean.contiguous(), rstd.contiguous()
    whole = run("layer_norm_backward", [dy, x, w, mean, rstd], [x, w, w])
    for a, b in zip(strided, whole, strict=True):
        close(a, b)


def test_rms_norm_and_its_gradients() -> None:
    x, w = leaf(3, 5, 7), leaf(7)
    y = F.rms_norm(x, (7,), w, 1e-4)
    out, rstd = run("rms_norm", [x, w], eps=1e-4)
    close(out, y)
    dy = torch.randn_like(y)
    mine = run("rms_norm_backward", [dy, x, w, rstd], [x, w])
    for ours, theirs in zip(mine, grads(y, dy, x, w), strict=True):
        close(ours.detach(), theirs)


def test_cross_entropy_and_its_gradient() -> None:
    logits = leaf(4, 5, 9)
    labels = torch.randint(0, 9, (4, 5))
    labels[0, 1] = labels[3, 2] = -100
    loss = F.cross_entropy(logits.permute(0, 2, 1), labels, reduction="none")
    mine, lse = run("cross_entropy", [logits, labels])
    close(mine, loss)
    dloss = torch.randn_like(loss)
    (theirs,) = grads(loss, dloss, logits)
    (ours,) = run("cross_entropy_backward", [dloss, logits.detach(), labels, lse.detach()])
    close(ours, theirs)


def test_cross_entropy_of_bf16_logits_keeps_its_log_sum_exp_in_f32() -> None:
    logits = 8 * torch.randn(16, 50, dtype=torch.float64)
    rounded = logits.bfloat16()
    labels = torch.randint(0, 50, (16,))
    loss, lse = run("cross_entropy", [rounded, labels])
    assert loss.dtype == torch.bfloat16 and lse.dtype == torch.float32
    exact = F.cross_entropy(rounded.double(), labels, reduction="none")
    torch.testing.assert_close(loss.double(), exact, rtol=2**-8, atol=1e-5)
    ones = torch.ones(16, dtype=torch.bfloat16)
    (grad,) = run("cross_entropy_backward", [ones, rounded, labels, lse])
    exact = rounded.double().softmax(-1) - F.one_hot(labels, 50)
    torch.testing.assert_close(grad.double(), exact, rtol=2**-8, atol=1e-5)


def test_softmax_family_and_gradients() -> None:
    x = leaf(3, 7)
    for name, function in (("softmax", F.softmax), ("log_softmax", F.log_softmax)):
        y = function(x, -1)
        dy = torch.randn_like(y)
        close(run(name, [x])[0], y)
        (theirs,) = grads(y, dy, x)
        close(run(f"{name}_backward", [dy, y.detach()])[0], theirs)
    close(run("logsumexp", [x])[0], x.logsumexp(-1))


def test_embedding_and_its_gradient() -> None:
    table, ids = leaf(9, 4), torch.randint(0, 9, (3, 5))
    y = F.embedding(ids, table, padding_idx=2)
    close(run("embedding", [ids, table])[0], y)
    dy = torch.randn_like(y)
    (theirs,) = grads(y, dy, table)
    close(run("embedding_backward", [dy, ids], [table], padding_idx=2)[0], theirs)


@pytest.mark.parametrize("case", EXAMPLES["convolution"], ids=lambda c: c.note)
def test_convolution_and_its_gradients(case: Case) -> None:
    x, w = (t.requires_grad_() for t in case.values())
    attrs = dict(case.attrs)
    function = (F.conv1d, F.conv2d, F.conv3d)[x.dim() - 3]
    y = function(x, w, None, *(attrs[k] for k in ("stride", "padding", "dilation")),
                 attrs.get("groups", 1))  # fmt: skip
    close(run("convolution", [x, w], [y], **attrs)[0], y)
    dy = torch.randn_like(y)
    dx, dw = grads(y, dy, x, w)
    close(run("convolution_input_grad", [dy, w.detach()], [x], **attrs)[0], dx)
    close(run("convolution_weight_grad", [dy, x.detach()], [w], **attrs)[0], dw)


UNARY: list[tuple[str, Callable[[Tensor], Tensor], bool]] = [
    ("gelu", F.gelu, True), ("silu", F.silu, True), ("tanh", torch.tanh, False),
    ("sigmoid", torch.sigmoid, False), ("relu", F.relu, True), ("relu", F.relu, False),
]  # fmt: skip


@pytest.mark.parametrize(("name", "function", "from_operand"), UNARY)
def test_activation_gradients(
    name: str, function: Callable[[Tensor], Tensor], from_operand: bool
) -> None:
    x = leaf(5, 7)
    y = function(x)
    dy = torch.randn_like(y)
    (theirs,) = grads(y, dy, x)
    saved = x.detach() if from_operand else y.detach()
    close(run(name, [x])[0], y)
    close(run(f"{name}_backward", [dy, saved])[0], theirs)


OPTIMIZERS: list[tuple[str, Callable[..., torch.optim.Optimizer], dict[str, float | bool], int]] = [
    ("adam_update", torch.optim.Adam, {"lr": 0.1}, 2),
    ("adam_update", torch.optim.Adam, {"lr": 0.1, "weight_decay": 0.1, "maximize": True}, 2),
    ("adamw_update", torch.optim.AdamW, {"lr": 0.1, "weight_decay": 0.2, "eps": 1e-5}, 2),
    ("sgd_update", torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.1}, 0),
    ("momentum_update", torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.2}, 1),
    ("momentum_update", torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True,
                                          "weight_decay": 0.1, "maximize": True}, 1),
]  # fmt: skip


@pytest.mark.parametrize(("name", "optimizer", "options", "states"), OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_optimizer_updates_equal_torch_over_steps(
    name: str, optimizer: Callable[..., torch.optim.Optimizer],
    options: dict[str, float | bool], states: int, dtype: torch.dtype,
) -> None:  # fmt: skip
    torch.manual_seed(0)
    param = torch.randn(4, 5, dtype=dtype, requires_grad=True)
    mine, moments = param.detach().clone(), [torch.zeros(4, 5, dtype=dtype) for _ in range(states)]
    theirs = optimizer([param], **options)
    attrs: dict[str, Attr] = {k: v for k, v in options.items() if k != "lr"}
    for step in range(1, 7):
        grad = torch.randn(4, 5, dtype=dtype)
        lr = options["lr"] / step
        theirs.param_groups[0]["lr"] = lr
        param.grad = grad.clone()
        theirs.step()
        scalars = [torch.tensor(float(n), dtype=torch.float64) for n in (step, lr)]
        mine, *moments = run(name, [mine, grad, *moments, *scalars], **attrs)
        close(mine, param.detach(), 1e-12 if dtype == torch.float64 else 2e-6)


def test_philox_equals_the_published_test_vectors() -> None:
    # Random123's known answers for philox4x32-10 with counter and key 0
    first, second = philox(torch, torch.tensor(0), torch.tensor([0]))
    assert (int(first), int(second)) == (0x6627E8D5, 0xE169C58D)


def test_random_numbers_are_the_same_on_the_fast_path() -> None:
    x, seed = torch.randn(200, 300), torch.tensor(2**40 + 3)
    slow, fast = (run("dropout", [x, seed], fused=fused, p=0.3)[0] for fused in (False, True))
    assert torch.equal(slow, fast)
    assert abs((slow == 0).float().mean() - 0.3) < 0.01
