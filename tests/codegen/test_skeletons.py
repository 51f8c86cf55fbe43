"""Skeletons of contractions compiled for sm_90: no spills, and the matrix instruction is there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from tests.codegen.skeletons import FORMATS, gated, gelu_residual, normed

from weft.codegen.attention import Attention, attention_source
from weft.codegen.compile import available, compile_kernel
from weft.codegen.formats import int4
from weft.codegen.gemm import Gemm, Tile, default_tile, gemm_source
from weft.codegen.linear_loss import (
    LinearLoss,
    linear_loss_gradient_source,
    linear_loss_source,
)
from weft.codegen.source import KernelSource
from weft.ir.errors import CompileError

needs_triton = pytest.mark.skipif(not available(), reason="Triton is not installed")
SQUARE = (4096, 4096, 4096)
W8A8 = gelu_residual("w8a8", *SQUARE, "i8", format=FORMATS["int8"], a_scaled=True)
E4M3 = gelu_residual("fp8", *SQUARE, "f8e4m3", format=FORMATS["fp8"], a_scaled=True)
#: products, and the start of the instruction that multiplies: wgmma is HGMMA, IGMMA, QGMMA
PRODUCTS = {
    "persistent": (gelu_residual("g", *SQUARE, "bf16"), "HGMMA.64x256x16.F32.BF16"),
    "few rows": (gelu_residual("g", 16, 4096, 4096, "bf16"), "HGMMA.64x16x16.F32.BF16"),
    "two results": (gated("g", *SQUARE), "HGMMA.64x128x16.F32.BF16"),
    "prologues": (normed("g", *SQUARE), "HGMMA.64x128x16.F32.BF16"),
    "experts": (gelu_residual("g", *SQUARE, "bf16", groups=8, indexed=True), "HGMMA.64x128x16"),
    "int4": (gelu_residual("g", 16, 4096, 4096, "bf16", format=int4()), "HGMMA.64x16x16"),
    "w8a8": (W8A8, "IGMMA.64x128x32.S8.S8"),
    "fp8": (E4M3, "QGMMA.64x128x32.F32.E4M3.E4M3"),
}  # fmt: skip


@needs_triton
@pytest.mark.parametrize("name", PRODUCTS)
def test_products_use_wgmma_and_keep_their_registers(name: str) -> None:
    gemm, instruction = PRODUCTS[name]
    resources = compile_kernel(gemm_source(gemm), "cuda:90").resources
    assert resources.spill_bytes == 0
    assert resources.matrix.startswith(instruction)
    assert resources.async_copies > 0


@needs_triton
def test_a_split_product_compiles() -> None:
    tile = replace(default_tile(PRODUCTS["few rows"][0]), splits=4)
    resources = compile_kernel(gemm_source(PRODUCTS["few rows"][0], tile), "cuda:90").resources
    assert resources.spill_bytes == 0 and resources.matrix.startswith("HGMMA")


@needs_triton
@pytest.mark.parametrize("kind, d", [("forward", 64), ("forward", 128), ("dq", 128), ("dkdv", 128)])
def test_attention_uses_wgmma_and_keeps_its_registers(kind: str, d: int) -> None:
    attention = Attention("a", kind, "bf16", 32, 8, 4096, 4096, d, d, causal=True)
    resources = compile_kernel(attention_source(attention), "cuda:90").resources
    assert resources.spill_bytes == 0
    assert resources.matrix.startswith("HGMMA.64x")
    assert resources.async_copies > 0


@needs_triton
def test_decoding_uses_the_matrix_unit() -> None:
    """A tile of 16 query heads is a quarter of wgmma's rows: Triton takes mma."""
    attention = Attention("a", "decode", "bf16", 32, 8, 1, 4096, 128, 128)
    resources = compile_kernel(attention_source(attention), "cuda:90").resources
    assert resources.spill_bytes == 0 and resources.matrix.startswith("HMMA.16816.F32.BF16")


@needs_triton
@pytest.mark.parametrize("make", [linear_loss_source, linear_loss_gradient_source])
def test_a_linear_loss_uses_wgmma(make: Callable[[LinearLoss], KernelSource]) -> None:
    loss = LinearLoss("l", 8192, 50257, 4096, "bf16")
    resources = compile_kernel(make(loss), "cuda:90").resources
    assert resources.spill_bytes == 0 and resources.matrix.startswith("HGMMA.64x128x16")


def test_decoding_has_no_features() -> None:
    attention = Attention("a", "decode", "bf16", 32, 8, 1, 4096, 128, 128, causal=True)
    with pytest.raises(CompileError, match="whole cache"):
        attention_source(attention)


@pytest.mark.parametrize(
    "gemm, tile, reason",
    [
        (gated("g", *SQUARE), Tile(128, 128, 64, 8, 3, persistent=True), "one result"),
        (gelu_residual("g", 4, 4, 4, "bf16"), Tile(16, 16, 16, 4, 2, persistent=True), "16 bytes"),
        (gelu_residual("g", *SQUARE, "bf16", groups=2), Tile(64, 64, 64, 4, 2, splits=2), "groups"),
        (gelu_residual("g", *SQUARE, "bf16", format=int4()), Tile(64, 64, 32, 4, 2), "int4"),
        (gelu_residual("g", *SQUARE, "i8"), Tile(64, 64, 64, 4, 2), "weights of i8"),
    ],
)
def test_variants_that_do_not_fit_are_a_diagnostic(gemm: Gemm, tile: Tile, reason: str) -> None:
    with pytest.raises(CompileError, match=reason) as caught:
        gemm_source(gemm, tile)
    assert caught.value.code == "W0901" and caught.value.hint


def test_int4_has_groups_of_whole_tiles() -> None:
    with pytest.raises(CompileError, match="multiple of 64"):
        int4(32)
