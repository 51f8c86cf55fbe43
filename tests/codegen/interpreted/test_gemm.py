"""Matrix products in Triton's interpreter against float64 references. Needs TRITON_INTERPRET=1."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.codegen.kit import TORCH, check_close
from tests.codegen.skeletons import FORMATS, gated, gelu_residual, module_of, normed, weight
from torch import Tensor

from weft.codegen.formats import HALF, quantize_rows
from weft.codegen.gemm import Gemm, Tile, gemm_source
from weft.ir.types import TensorType

#: sizes that fill no tile, and the ones at their edges
SIZES = st.sampled_from([0, 1, 15, 16, 17, 33, 64, 70])


def launch(gemm: Gemm, tile: Tile, *operands: Tensor) -> tuple[Tensor, ...]:
    source = gemm_source(gemm, tile)
    return tuple(module_of(source.name, source.text).launch(*operands))


def check(got: Tensor, expected: Tensor, dtype: str) -> None:
    check_close(got, expected, TensorType(dtype, tuple(expected.shape)))


def strided(x: Tensor) -> Tensor:
    """The same numbers with rows further apart, not at the start of their memory."""
    wide = torch.full((x.shape[0], x.shape[1] + 24), 9.0).to(x.dtype)
    wide[:, 8 : 8 + x.shape[1]] = x
    return wide[:, 8 : 8 + x.shape[1]]


def finished(product: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    y = product + bias.double()
    return torch.nn.functional.gelu(y, approximate="tanh") + residual.double()


VARIANTS = {
    "plain": Tile(32, 32, 32, 4, 2),
    "swapped": Tile(16, 32, 32, 4, 2, swapped=True),
    "split": Tile(16, 32, 16, 4, 2, splits=3),
    "swapped split": Tile(16, 32, 16, 4, 2, swapped=True, splits=2),
    "persistent": Tile(32, 32, 32, 4, 2, persistent=True),
}


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(list(VARIANTS)), SIZES, SIZES, SIZES, st.sampled_from(["f32", "bf16"]),
       st.sampled_from(["mk", "km"]), st.sampled_from(["nk", "kn"]))  # fmt: skip
def test_variants_equal_the_reference(
    variant: str, m: int, n: int, k: int, dtype: str, a_order: str, b_order: str
) -> None:
    if variant == "persistent":  # rows of tensor descriptors are multiples of 16 bytes
        m, n, k = (max(16, -(-size // 16) * 16) for size in (m, n, k))
    generator = torch.Generator().manual_seed(m * 71 + n)
    a, b = (torch.randn(s, generator=generator).to(TORCH[dtype]) for s in ((m, k), (n, k)))
    bias = torch.randn(n, generator=generator)
    residual = torch.randn(m, n, generator=generator).bfloat16()
    gemm = gelu_residual("g", m, n, k, dtype, a_order=a_order, b_order=b_order)
    expected = finished(a.double() @ b.double().t(), bias, residual)
    stored = (strided(a) if a_order == "mk" else a.t().contiguous(),
              strided(b) if b_order == "nk" else b.t().contiguous())  # fmt: skip
    (got,) = launch(gemm, VARIANTS[variant], *stored, bias, strided(residual))
    check(got, expected, "f32" if dtype == "f32" else "bf16")


@pytest.mark.parametrize("name", ["int8", "fp8", "int4", "int4_256"])
@settings(max_examples=8, deadline=None)
@given(st.sampled_from(list(VARIANTS)),
       st.sampled_from([1, 16, 33]), st.sampled_from([1, 17, 40]), st.sampled_from([0, 1, 64, 100, 300]),
       st.sampled_from(["bf16", "f16"]))  # fmt: skip
def test_weight_formats_equal_their_numbers(
    name: str, variant: str, m: int, n: int, k: int, dtype: str
) -> None:
    format, tile = FORMATS[name], VARIANTS[variant]
    if format.name == "int4":
        tile = replace(tile, k=HALF, persistent=False)
    if tile.persistent:
        n, k = -(-n // 16) * 16, max(16, -(-k // 16) * 16)
    generator = torch.Generator().manual_seed(n)
    a = torch.randn(m, k, generator=generator).to(TORCH[dtype])
    w = weight(format, n, k, dtype, generator)
    bias, residual = torch.randn(n, generator=generator), torch.randn(m, n).bfloat16()
    gemm = gelu_residual("g", m, n, k, dtype, format=format)
    (got,) = launch(gemm, tile, strided(a), *w.operands, bias, residual)
    check(got, finished(a.double() @ w.numbers.t(), bias, residual), "bf16")


@pytest.mark.parametrize("variant", ["plain", "swapped split", "persistent"])
@pytest.mark.parametrize("storage", ["i8", "f8e4m3"])
def test_quantized_rows_and_weights(storage: str, variant: str) -> None:
    m, n, k = 21, 48, 80
    x, scale = quantize_rows(torch.randn(m, k), storage)
    format = FORMATS["int8" if storage == "i8" else "fp8"]
    w = weight(format, n, k, storage, torch.Generator().manual_seed(1))
    bias, residual = torch.randn(n), torch.randn(m, n).bfloat16()
    gemm = gelu_residual("g", m, n, k, storage, format=format, a_scaled=True)
    (got,) = launch(gemm, VARIANTS[variant], x, *w.operands, scale, bias, residual)
    product = (x.double() * scale.double()[:, None]) @ w.numbers.t()
    check(got, finished(product, bias, residual), "bf16")


@pytest.mark.parametrize("variant", list(VARIANTS))
@pytest.mark.parametrize("k", [32, 48])
def test_prologues_apply_to_what_is_inside(variant: str, k: int) -> None:
    m, n = 19, 36
    a, b, rstd, gain = torch.randn(m, k), torch.randn(n, k), torch.rand(m), torch.randn(k)
    gemm = normed("g", m, n, k, "f32")
    (got,) = launch(gemm, VARIANTS[variant], a, b, rstd, gain)
    left = a.double() * rstd.double()[:, None] * gain.double() + 1.0
    check(got, left @ (b.double() + 0.5).t(), "f32")


def test_an_epilogue_has_several_results() -> None:
    m, n, k = 20, 40, 48
    a, b, gate = torch.randn(m, k).bfloat16(), torch.randn(n, k).bfloat16(), torch.randn(m, n)
    c, d = launch(gated("g", m, n, k), VARIANTS["plain"], a, b, gate)
    product, wide = a.double() @ b.double().t(), gate.double()
    s = wide.sigmoid()
    check(c, product, "bf16")
    check(d, product * s * (1 + wide * (1 - s)), "f32")


@settings(max_examples=8, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=4), st.booleans(), st.booleans(),
       st.sampled_from(["nk", "kn"]))  # fmt: skip
def test_groups_meet_their_own_weights(
    counts: list[int], swapped: bool, indexed: bool, order: str
) -> None:
    n, k, rest = 36, 40, 5  # five rows have no group
    offsets = torch.tensor([0, *counts]).cumsum(0).int()
    rows, grouped = sum(counts) + rest, sum(counts)
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, k, generator=generator).bfloat16()
    w = torch.randn(len(counts), n, k, generator=generator).bfloat16()
    bias, residual = torch.randn(n), torch.randn(rows, n, generator=generator).bfloat16()
    group = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    index = torch.randperm(rows, generator=generator) if indexed else torch.arange(rows)
    gemm = gelu_residual("g", rows, n, k, "bf16", groups=len(counts), indexed=indexed, b_order=order)
    stored = w if order == "nk" else w.transpose(1, 2).contiguous()
    extra = (index,) if indexed else ()
    tile = Tile(16, 32, 16, 4, 2, swapped=swapped)
    (got,) = launch(gemm, tile, x, stored, offsets, *extra, bias, residual)
    product = torch.zeros(rows, n, dtype=torch.float64)
    own = index[:grouped]
    product[own] = torch.einsum("rk,rnk->rn", x[own].double(), w[group].double())
    check(got, finished(product, bias, residual), "bf16")
