"""Kernels in Triton's interpreter against float64 references. Needs TRITON_INTERPRET=1."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.codegen.kit import only_kernel, run_and_compare, samples
from tests.codegen.programs import PROGRAMS

#: ragged sizes: neither rows nor columns fill a tile
ROWS, COLUMNS = (2, 5), 38


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_kernel_equals_the_float64_reference(name: str, dtype: str, tmp_path: Path) -> None:
    function = only_kernel(PROGRAMS[name](dtype, ROWS, COLUMNS))
    run_and_compare(function, samples(function), tmp_path)


@pytest.mark.parametrize("name", ["residual_rms_norm", "layer_norm", "masked_softmax",
                                  "log_softmax_pair", "cross_entropy"])  # fmt: skip
def test_looped_kernel_equals_the_reference(name: str, tmp_path: Path) -> None:
    function = only_kernel(PROGRAMS[name]("f32", (3,), 150))
    source = run_and_compare(function, samples(function), tmp_path, persistent=64)
    assert source.kind == "looped"
