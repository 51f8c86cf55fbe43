"""The two gates of every kernel: Triton's interpreter, and a binary for sm_90."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.codegen.kit import only_kernel, program
from tests.codegen.programs import PROGRAMS, ROW_SUMS, tensor
from tests.passes.programs import random_program

from weft.codegen.compile import Binary, available, compile_cubin, compile_kernel
from weft.codegen.emit import kernel_functions
from weft.codegen.source import KernelSource, generate
from weft.ir.builder import Builder
from weft.ir.errors import CompileError
from weft.ir.module import Value
from weft.passes.fuse import fuse
from weft.passes.space import ONE_ROW_COLUMNS, ROW_SUM_COLUMNS

FOLDER = Path(__file__).parent / "interpreted"
needs_triton = pytest.mark.skipif(not available(), reason="Triton is not installed")


@needs_triton
def test_kernels_pass_in_the_interpreter() -> None:
    """Runs the tests of `interpreted/` in a process of its own; see the conftest there."""
    environ = {**os.environ, "TRITON_INTERPRET": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(FOLDER)]
    run = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout and "skipped" not in run.stdout


def source_of(name: str, dtype: str = "bf16", columns: int = 2048) -> KernelSource:
    return generate(only_kernel(PROGRAMS[name](dtype, (8, 128), columns)))


@needs_triton
@pytest.mark.parametrize("columns", [128, 2048, 50304])
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_kernel_compiles_for_sm_90_without_spills(name: str, columns: int) -> None:
    if name in ROW_SUMS:
        columns = min(columns, ROW_SUM_COLUMNS)  # sums over rows keep the whole column
    if name == "mean_loss":
        columns = min(columns, ONE_ROW_COLUMNS)  # a longer row is no kernel's
    binary = compile_kernel(source_of(name, columns=columns), "cuda:90")
    assert binary.cubin[:4] == b"\x7fELF"
    assert binary.entry == "kernel"
    assert binary.resources.spill_bytes == 0
    assert 0 < binary.resources.registers <= 128


@needs_triton
def test_kernels_of_random_programs_compile() -> None:
    """Every dtype and kind of node that the random programs hold."""
    kinds = set()
    for seed in range(12):
        for function in kernel_functions(fuse(random_program(seed, 12).module))[:2]:
            source = generate(function, persistent=4 if seed % 2 else 8192)
            compile_kernel(source, "cuda:90")
            kinds.add(source.kind)
    assert kinds == {"flat", "tile", "persistent", "looped"}


@needs_triton
@pytest.mark.parametrize("storage", ["f8e4m3", "f8e5m2", "f16", "bool", "i8", "i64"])
def test_every_storage_dtype_compiles(storage: str) -> None:
    def make(b: Builder) -> list[Value]:
        x = b.param(tensor(storage, 16, 64), "x")
        wide = b.one("cast", [x], types=[tensor("f32", 16, 64)])
        y = b.one("softmax", [b.one("exp", [wide])])
        return [b.one("cast", [y], types=[tensor(storage, 16, 64)])]

    assert compile_kernel(generate(only_kernel(program(make))), "cuda:90").cubin


@needs_triton
@pytest.mark.parametrize("target", ["cuda:80", "cuda:100"])
def test_other_architectures_compile(target: str) -> None:
    assert compile_kernel(source_of("residual_rms_norm"), target).cubin


@needs_triton
def test_equal_sources_give_equal_bytes_in_any_folder(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    source = source_of("swiglu")
    first = compile_kernel(source, "cuda:90")
    monkeypatch.chdir(tmp_path)
    assert compile_kernel(source, "cuda:90") == first


@needs_triton
def test_the_cache_answers_for_the_same_input_only(tmp_path: Path) -> None:
    source = source_of("swiglu")
    first = compile_kernel(source, "cuda:90", tmp_path)
    (entry,) = tmp_path.glob("kernels/*/*/kernel.cubin")
    stamp = entry.stat().st_mtime_ns
    assert compile_kernel(source, "cuda:90", tmp_path) == first
    assert entry.stat().st_mtime_ns == stamp
    compile_kernel(source, "cuda:80", tmp_path)
    assert len(list(tmp_path.glob("kernels/*/*/kernel.cubin"))) == 2


@needs_triton
@pytest.mark.parametrize("damage", ["kernel.cubin", "info.json"])
def test_a_damaged_cache_entry_is_made_again(damage: str, tmp_path: Path) -> None:
    source = source_of("swiglu")
    first = compile_kernel(source, "cuda:90", tmp_path)
    (path,) = tmp_path.glob(f"kernels/*/*/{damage}")
    path.write_bytes(path.read_bytes()[:20])
    assert compile_kernel(source, "cuda:90", tmp_path) == first


def compile_text(text: str, target: str = "cuda:90") -> Binary:
    return compile_cubin(text, {"x_ptr": "*fp32"}, {}, target)


@needs_triton
def test_a_kernel_that_triton_refuses_is_a_diagnostic() -> None:
    text = (
        "import triton\nimport triton.language as tl\n\n\n@triton.jit\ndef kernel(x_ptr):\n"
        "    tl.store(x_ptr, missing)\n"
    )
    with pytest.raises(CompileError, match="missing") as caught:
        compile_text(text)
    assert caught.value.code == "W0901" and caught.value.hint


@needs_triton
def test_an_unknown_target_is_a_diagnostic() -> None:
    with pytest.raises(CompileError, match="W0901"):
        compile_text("kernel = None\n", "tpu:v5")
