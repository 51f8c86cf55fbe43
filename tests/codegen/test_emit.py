"""The folder of kernels that an artifact carries."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from tests.codegen.kit import program
from tests.codegen.programs import PROGRAMS, residual_rms_norm

from weft.codegen.compile import available
from weft.codegen.emit import emit_kernels, fallbacks
from weft.ir.builder import Builder
from weft.ir.module import Module, Value
from weft.ir.types import TensorType
from weft.passes.fuse import fuse

needs_triton = pytest.mark.skipif(not available(), reason="Triton is not installed")


def llama_kernels() -> Module:
    return fuse(residual_rms_norm("bf16", (4, 8), 256))


def test_a_cpu_plan_carries_sources_only(tmp_path: Path) -> None:
    manifest = emit_kernels(llama_kernels(), tmp_path / "kernels", "cpu")
    (entry,) = manifest["kernels"]
    names = sorted(path.name for path in (tmp_path / "kernels").iterdir())
    assert names == sorted(["manifest.json", f"{entry['name']}.py"])
    assert json.loads((tmp_path / "kernels" / "manifest.json").read_text()) == manifest
    text = (tmp_path / "kernels" / entry["source"]).read_bytes()
    assert hashlib.sha256(text).hexdigest() == entry["source_sha256"]
    assert fallbacks(manifest) == []


@needs_triton
def test_a_gpu_plan_carries_binaries_and_what_they_need(tmp_path: Path) -> None:
    manifest = emit_kernels(llama_kernels(), tmp_path, "h100", cache=tmp_path / "cache")
    (entry,) = manifest["kernels"]
    assert manifest["target"] == "cuda:90"
    cubin = (tmp_path / entry["binary"]).read_bytes()
    assert hashlib.sha256(cubin).hexdigest() == entry["binary_sha256"]
    assert entry["registers"] > 0 and entry["spill_bytes"] == 0
    assert emit_kernels(llama_kernels(), tmp_path / "again", "h100") == manifest


def test_a_kernel_that_cannot_be_made_falls_back_to_aten(tmp_path: Path) -> None:
    """A hand-written kernel function with a matrix product: no pointwise chain."""

    def make(b: Builder) -> list[Value]:
        x = b.param(TensorType("f32", (4, 4)), "x")
        return [b.one("einsum", [x, x], {"spec": "a b, b c -> a c"})]

    module = program(make)
    kernel = module.entry.with_(name="k", attrs={"kernel": "k"})
    manifest = emit_kernels(module.with_(functions=(module.entry, kernel)), tmp_path, "cpu")
    (entry,) = manifest["kernels"]
    assert entry["fallback"] == "aten"
    assert [line[:10] for line in fallbacks(manifest)] == ["k: [W0901]"]


def test_emitting_twice_gives_the_same_files(tmp_path: Path) -> None:
    for name in PROGRAMS:
        module = fuse(PROGRAMS[name]("f32", (4, 8), 64), optimizers=True)
        first = emit_kernels(module, tmp_path / "a", "cpu")
        assert emit_kernels(module, tmp_path / "b", "cpu") == first
    assert {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "b").iterdir()
    }
