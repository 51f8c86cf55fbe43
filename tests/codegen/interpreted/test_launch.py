"""What `launch` does with unusual tensors, and random kernels. Needs TRITON_INTERPRET=1."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.codegen.kit import (
    check_close,
    load,
    only_kernel,
    program,
    reference,
    run_and_compare,
    samples,
)
from tests.codegen.programs import PROGRAMS, tensor
from tests.passes.programs import random_program

from weft.codegen.emit import kernel_functions
from weft.codegen.source import generate
from weft.ir.builder import Builder
from weft.ir.module import Value
from weft.passes.fuse import fuse


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([1, 8192]))
def test_kernels_of_random_programs_equal_their_reference(seed: int, persistent: int) -> None:
    with TemporaryDirectory() as folder:
        for function in kernel_functions(fuse(random_program(seed, 12).module)):
            inputs = samples(function, seed)
            run_and_compare(function, inputs, Path(folder), persistent=persistent)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_one_kernel_serves_shards_of_any_number_of_rows(data: st.DataObject) -> None:
    """The source is made for 2 x 5 rows; a rank may hold fewer or, without a split, none."""
    name = data.draw(
        st.sampled_from(["residual_rms_norm", "swiglu", "cross_entropy", "layer_norm"])
    )
    rows = (data.draw(st.integers(0, 3)), data.draw(st.integers(1, 6)))
    function = only_kernel(PROGRAMS[name]("f32", (2, 5), 20))
    inputs = [
        torch.randn(*rows, *value.type.shape[2:]) if value.type.dtype == "f32"
        else torch.randint(0, 9, rows)
        for value in function.params
        if len(value.type.shape) > 1
    ]  # fmt: skip
    vectors = iter(torch.randn(20) for _ in function.params)
    full = iter(inputs)
    inputs = [next(full if len(v.type.shape) > 1 else vectors) for v in function.params]
    with TemporaryDirectory() as folder:
        results = load(generate(function), Path(folder)).launch(*inputs)
    if 0 in rows:
        assert all(0 in result.shape for result in results)
        return
    for got, wanted, value in zip(
        results, reference(function, inputs), function.results, strict=True
    ):
        check_close(got, wanted, value.type)


@pytest.mark.parametrize("name", ["residual_rms_norm", "swiglu", "rope_backward", "masked_softmax"])
def test_operands_may_be_strided_views(name: str, tmp_path: Path) -> None:
    """Rows apart, transposed, broadcast: every layout that ATen may hand over."""
    function = only_kernel(PROGRAMS[name]("f32", (4, 6), 10))
    inputs = samples(function)

    def apart(x: torch.Tensor) -> torch.Tensor:
        return torch.stack([x, torch.zeros_like(x)], -2)[..., 0, :] if x.dim() > 1 else x

    def transposed(x: torch.Tensor) -> torch.Tensor:
        return x.transpose(0, -1).contiguous().transpose(0, -1)

    def repeated(x: torch.Tensor) -> torch.Tensor:
        return x[:1].expand(x.shape)

    launch = load(generate(function), tmp_path).launch
    for view in (apart, transposed, repeated):
        operands = [view(x) for x in inputs]
        wanted = reference(function, operands)
        for got, expected, value in zip(launch(*operands), wanted, function.results, strict=True):
            check_close(got, expected, value.type)
            assert got.is_contiguous()


def test_a_scalar_may_be_computed_beside_a_vector(tmp_path: Path) -> None:
    def make(b: Builder) -> list[Value]:
        x, s = b.param(tensor("f32", 3000), "x"), b.param(tensor("f32", 1), "s")
        s = b.one("exp", [s])
        return [s, b.one("mul", [x, s])]

    function = only_kernel(program(make))
    run_and_compare(function, samples(function), tmp_path)


@pytest.mark.parametrize("columns", [1024, 1025, 1200])
def test_columns_that_fill_tiles_exactly_and_do_not(columns: int, tmp_path: Path) -> None:
    for name in ("residual_rms_norm", "rope_backward"):
        function = only_kernel(PROGRAMS[name]("f32", (2, 2), columns + columns % 2))
        run_and_compare(function, samples(function), tmp_path, persistent=512)
