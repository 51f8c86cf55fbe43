"""Kernels in Triton's interpreter against float64 references. Needs TRITON_INTERPRET=1."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.codegen.kit import only_kernel, program, run_and_compare, samples
from tests.codegen.programs import PROGRAMS, tensor

from weft.ir.builder import Builder
from weft.ir.module import Value

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


def test_gradients_of_the_norm_of_one_row_may_be_read_at_a_shift(tmp_path: Path) -> None:
    """Without rows, the gradient of the weight is no sum, and a pad may follow."""

    def make(b: Builder) -> list[Value]:
        dy, x = b.param(tensor("f32", 1, 6), "dy"), b.param(tensor("f32", 1, 6), "x")
        w, rstd = b.param(tensor("f32", 6), "w"), b.param(tensor("f32", 1, 1), "rstd")
        dx, dw = b.many("rms_norm_backward", [dy, x, w, rstd])
        padded = b.one("pad", [dw], {"low": (2,), "high": (1,), "value": 1.5})
        return [b.one("exp", [dx]), padded]

    function = only_kernel(program(make))
    run_and_compare(function, samples(function), tmp_path)
