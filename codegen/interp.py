"""Makes Triton's CPU interpreter numerically faithful, so that it can check kernels without a GPU.

Under `TRITON_INTERPRET=1` Triton (3.6 to 3.8) keeps bf16 and fp8 values as raw bits in unsigned
integers. Its arithmetic, comparisons and `dot` then act on the bits as on integers, its cast from
f32 to bf16 truncates instead of rounding to nearest even, its cast to fp8 loses a carry, and there
are no bf16 constants. Before 3.8, `range` of a kernel argument fails with numpy 2.4. `install`
replaces those parts by ones that go through torch's conversions. Without it, results are silently
wrong.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

#: the largest finite e4m3 value: the device's conversion saturates (PTX ISA, cvt.satfinite)
_E4M3_MAX = 448.0


def enabled() -> bool:
    """Does this process run kernels in the interpreter?"""
    return os.environ.get("TRITON_INTERPRET") == "1"


def install() -> bool:
    """Repair the interpreter, once; False, and nothing is done, where it is not in use.

    Call it before the first kernel runs. Raises ImportError without Triton.
    """
    if not enabled():
        return False
    import triton.language as tl
    from triton.runtime import interpreter

    if not getattr(interpreter, "_weft_repaired", False):
        _Repair(interpreter, tl).apply()
        interpreter._weft_repaired = True
    return True


class _Repair:
    """The replacements, as closures over the interpreter's module."""

    def __init__(self, interpreter: Any, tl: Any) -> None:
        self.interpreter, self.tl = interpreter, tl
        self.narrow = {
            tl.bfloat16: torch.bfloat16,
            tl.float8e4nv: torch.float8_e4m3fn,
            tl.float8e5: torch.float8_e5m2,
        }

    def apply(self) -> None:
        builder = self.interpreter.InterpreterBuilder
        original_binary, original_unary = builder.binary_op, builder.unary_op

        def cast_impl(builder_: Any, source: Any, target: Any) -> Any:
            return self.cast(source, target)

        def create_fp_to_fp(builder_: Any, source: Any, target: Any, rounding: Any) -> Any:
            return self.cast(source, target)

        def binary_op(builder_: Any, left: Any, right: Any, function: Callable[..., Any]) -> Any:
            if left.dtype.scalar not in self.narrow:
                return original_binary(builder_, left, right, function)
            return self.wrap(function(self.wide(left), self.wide(right)), left.dtype.scalar)

        def unary_op(builder_: Any, operand: Any, function: Callable[..., Any]) -> Any:
            if operand.dtype.scalar not in self.narrow:
                return original_unary(builder_, operand, function)
            return self.wrap(function(self.wide(operand)), operand.dtype.scalar)

        def create_fma(builder_: Any, x: Any, y: Any, z: Any) -> Any:
            return self.wrap(self.wide(x) * self.wide(y) + self.wide(z), z.dtype.scalar)

        def create_dot(builder_: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
            left, right = self.wide(a), self.wide(b)
            accumulate: type[Any] = np.int32 if left.dtype.kind in "iu" else np.float32
            if left.dtype == np.float64:
                accumulate = np.float64
            product = np.matmul(left.astype(accumulate), right.astype(accumulate))
            return self.wrap(product + self.wide(d), d.dtype.scalar)

        def get_bf16(builder_: Any, value: float) -> Any:
            return self.wrap(np.array([value], np.float32), self.tl.bfloat16)

        for function in (cast_impl, create_fp_to_fp, binary_op, unary_op, create_fma, create_dot,
                         get_bf16):  # fmt: skip
            setattr(builder, function.__name__, function)
        self._patch_index()

    def _patch_index(self) -> None:
        """`range(n)` of a tensor that holds one number, whatever its number of dims."""
        original = self.interpreter._patch_lang_tensor

        def index(tensor: Any) -> int:
            return int(np.asarray(tensor.handle.data).item())

        def patched(tensor: Any, *scope: Any) -> None:
            original(tensor, *scope)
            if scope and hasattr(scope[-1], "set_attr"):
                scope[-1].set_attr(tensor, "__index__", index)
            else:
                tensor.__index__ = index

        self.interpreter._patch_lang_tensor = patched

    def wide(self, handle: Any) -> np.ndarray[Any, Any]:
        """The numbers that a handle holds; f32 for the narrow floats."""
        dtype = handle.dtype.scalar
        data: np.ndarray[Any, Any] = handle.data
        if dtype not in self.narrow:
            return data
        bits = torch.int16 if dtype.primitive_bitwidth == 16 else torch.uint8
        raw = torch.from_numpy(np.array(data)).view(bits)
        return raw.view(self.narrow[dtype]).to(torch.float32).numpy()

    def wrap(self, numbers: np.ndarray[Any, Any], dtype: Any) -> Any:
        """A handle of numbers in a Triton dtype, rounded to nearest even."""
        handle = self.interpreter.TensorHandle
        if numbers.dtype == bool and dtype in self.narrow:
            return handle(numbers, self.tl.int1)  # a comparison
        if dtype not in self.narrow:
            return handle(numbers.astype(self.interpreter._get_np_dtype(dtype)), dtype)
        tensor = torch.from_numpy(np.array(numbers, dtype=np.float32))
        if dtype == self.tl.float8e4nv:
            tensor = torch.where(tensor.isnan(), tensor, tensor.clamp(-_E4M3_MAX, _E4M3_MAX))
        narrow = tensor.to(self.narrow[dtype])
        if dtype.primitive_bitwidth == 16:
            return handle(narrow.view(torch.int16).numpy().view(np.uint16), dtype)
        return handle(narrow.view(torch.uint8).numpy(), dtype)

    def cast(self, source: Any, target: Any) -> Any:
        """A handle in another dtype."""
        return self.wrap(self.wide(source), target.scalar)
