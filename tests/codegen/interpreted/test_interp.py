"""The repaired interpreter computes what a device does. Needs TRITON_INTERPRET=1."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from weft.codegen import interp

NARROW = [torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]


@triton.jit
def copy(x_ptr, y_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(y_ptr + at, tl.load(x_ptr + at).to(y_ptr.dtype.element_ty))


@triton.jit
def arithmetic(x_ptr, y_ptr, sum_ptr, less_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    x, y = tl.load(x_ptr + at), tl.load(y_ptr + at)
    tl.store(sum_ptr + at, x * y + x)
    tl.store(less_ptr + at, x < y)


@triton.jit
def product(x_ptr, y_ptr, z_ptr, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    z = tl.dot(tl.load(x_ptr + at), tl.load(y_ptr + at))
    tl.store(z_ptr + at, z)


@triton.jit
def count_up(n_ptr, y_ptr):
    total = 0
    for i in range(tl.load(n_ptr)):
        total += i
    tl.store(y_ptr, total)


def every_bf16() -> torch.Tensor:
    bits = torch.arange(-(2**15), 2**15).to(torch.int16)
    values = bits.view(torch.bfloat16).float()
    return values[values.isfinite()]


def padded(x: torch.Tensor) -> torch.Tensor:
    """Grown with zeros to a power of two: the length of a tl.arange."""
    size = triton.next_power_of_2(x.numel())
    return torch.cat([x, x.new_zeros(size - x.numel())])


def test_the_interpreter_is_in_use() -> None:
    assert interp.enabled() and interp.install()


@pytest.mark.parametrize("dtype", NARROW)
def test_narrowing_rounds_to_nearest_even(dtype: torch.dtype) -> None:
    """Every bf16 value, and numbers close to the middle between two of them."""
    exact = every_bf16()
    near = exact[::7]
    x = padded(torch.cat([exact, near * (1 + 2**-9), near * (1 + 2**-9 - 2**-20), near * 1.003]))
    if dtype != torch.bfloat16:
        x = x.clamp(-400, 400)
    y = torch.zeros(x.shape, dtype=dtype)
    copy[(1,)](x, y, x.numel())
    assert torch.equal(y.float(), x.to(dtype).float())


@pytest.mark.parametrize("dtype", NARROW)
def test_widening_is_exact(dtype: torch.dtype) -> None:
    x = padded(torch.randn(500)).to(dtype)
    y = torch.zeros(x.shape)
    copy[(1,)](x, y, x.numel())
    assert torch.equal(y, x.float())


def test_e4m3_saturates_as_the_device_does() -> None:
    x = torch.tensor([448.0, 460.0, 1e6, -1e6])
    y = torch.zeros(4, dtype=torch.float8_e4m3fn)
    copy[(1,)](x, y, 4)
    assert y.float().tolist() == [448.0, 448.0, 448.0, -448.0]


def test_bf16_arithmetic_acts_on_numbers() -> None:
    x, y = torch.randn(64).bfloat16(), torch.randn(64).bfloat16()
    total, less = torch.zeros(64).bfloat16(), torch.zeros(64, dtype=torch.bool)
    arithmetic[(1,)](x, y, total, less, 64)
    assert torch.equal(total, x * y + x)
    assert torch.equal(less, x < y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.int8])
def test_dot_equals_a_matrix_product(dtype: torch.dtype) -> None:
    x, y = (torch.randint(-4, 5, (16, 16)).to(dtype) for _ in range(2))
    z = torch.zeros(16, 16, dtype=torch.int32 if dtype == torch.int8 else torch.float32)
    product[(1,)](x, y, z, 16)
    assert torch.equal(z.double(), x.double() @ y.double())


def test_a_loop_may_end_at_a_loaded_number() -> None:
    total = torch.zeros(1, dtype=torch.int32)
    count_up[(1,)](torch.tensor([5], dtype=torch.int32), total)
    assert total.item() == 10
