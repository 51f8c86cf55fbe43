"""Products for the skeleton tests, with their float64 references."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType

import torch
from tests.codegen.kit import TORCH
from torch import Tensor

from weft.codegen import formats
from weft.codegen.expr import Graph
from weft.codegen.formats import Format
from weft.codegen.gemm import Gemm, Result
from weft.codegen.hole import Tensor as HoleTensor
from weft.codegen.hole import leaf
from weft.codegen.pointwise import gelu, silu_backward

graph = Graph()
ACC = leaf(graph, "acc")
BIAS = HoleTensor("bias", "f32", rows=False)
RESIDUAL = HoleTensor("residual", "bf16")
RSTD = HoleTensor("rstd", "f32", column=False)
GAIN = HoleTensor("gain", "f32", rows=False)
GATE = HoleTensor("gate", "f32")
FORMATS = {"plain": formats.PLAIN, "int8": formats.INT8, "fp8": formats.FP8,
           "int4": formats.int4(64), "int4_256": formats.int4(256)}  # fmt: skip


def gelu_residual(name: str, m: int, n: int, k: int, dtype: str, **options: object) -> Gemm:
    """gelu(acc + bias) + residual, as the second product of an MLP's first half."""
    value = gelu(graph, ACC + BIAS.load(graph), "tanh") + RESIDUAL.load(graph)
    out = "f32" if dtype == "f32" else "bf16"
    base = Gemm(name, m, n, k, dtype, (Result("c", out, value),), (BIAS, RESIDUAL))
    return replace(base, **options)  # type: ignore[arg-type]


def gated(name: str, m: int, n: int, k: int) -> Gemm:
    """Two results: acc, and the gradient of silu at `gate` times it."""
    results = (Result("c", "bf16", ACC), Result("d", "f32", silu_backward(graph, ACC, GATE.load(graph))))
    return Gemm(name, m, n, k, "bf16", results, (GATE,))


def normed(name: str, m: int, n: int, k: int, dtype: str = "bf16") -> Gemm:
    """Rows of a are scaled, as by an rms norm whose statistics are known, and b is squared."""
    product = leaf(graph, "a") * RSTD.load(graph) * GAIN.load(graph)
    shifted = leaf(graph, "b") + 0.5  # not 0 at 0: what is outside must not count
    out = "f32" if dtype == "f32" else "bf16"
    return Gemm(name, m, n, k, dtype, (Result("c", out, ACC * 1.0),), (RSTD, GAIN),
                a_prologue=product + 1.0, b_prologue=shifted)  # fmt: skip


@dataclass(frozen=True)
class Weight:
    """A weight as it is stored: what `launch` takes, and the numbers it stands for, `[n, k]`."""

    operands: tuple[Tensor, ...]
    numbers: Tensor


def weight(format: Format, n: int, k: int, dtype: str, generator: torch.Generator) -> Weight:
    """A random weight in a format."""
    plain = torch.randn(n, k, generator=generator)
    if format.name == "plain":
        stored = plain.to(TORCH[dtype])
        return Weight((stored,), stored.double())
    if format.name == "int4":
        packed, scale, zero = formats.pack_int4(plain.to(TORCH[dtype]), format.group)
        numbers = formats.unpack_int4(packed, scale, zero, k, format.group).to(TORCH[dtype])
        return Weight((packed, scale, zero), numbers.double())
    values, scale = formats.quantize_rows(plain, format.storage)
    return Weight((values, scale), values.double() * scale.double()[:, None])


#: kept until the process ends
FOLDERS: list[TemporaryDirectory[str]] = []


@cache
def module_of(name: str, text: str) -> ModuleType:
    """A file of its own for each text: Triton reads it again when the kernel starts."""
    FOLDERS.append(TemporaryDirectory())
    path = Path(FOLDERS[-1].name) / f"{name}.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
