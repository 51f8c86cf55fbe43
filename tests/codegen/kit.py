"""What the kernel tests share: programs to fuse, and float64 references."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from weft.codegen.source import KernelSource, generate
from weft.ir.builder import Builder
from weft.ir.module import Function, Location, Module, Value
from weft.ir.types import FLOATS, TensorType
from weft.passes.fuse import fuse
from weft.runtime.interpreter import run_function

TORCH = {
    "f64": torch.float64, "f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16,
    "i64": torch.int64, "i32": torch.int32, "bool": torch.bool, "f8e4m3": torch.float8_e4m3fn,
    "f8e5m2": torch.float8_e5m2, "i8": torch.int8, "u8": torch.uint8, "i16": torch.int16,
}  # fmt: skip
#: rounding of one result to its dtype, relative: half a unit in the last place
ROUNDING = {"f32": 2.0**-24, "bf16": 2.0**-8, "f16": 2.0**-11, "f64": 2.0**-53, "f8e4m3": 2.0**-4}
#: allowed error of the arithmetic itself, relative to the largest result or, where terms of about
#: size 1 cancel, to this size: f32 sums of a row
SIZE = 0.1
ARITHMETIC = {"f64": 1e-10}
DEFAULT_ARITHMETIC = 1e-5


def program(make: Callable[[Builder], Sequence[Value]], path: str = "model.layers.0") -> Module:
    """A logical module whose entry is built by `make`; its ops come from one module path."""
    b = Builder()
    results = make(b)
    function = b.function("main", results)
    loc = Location(path, "model.py", 7)
    ops = tuple(replace(op, loc=loc) for op in function.ops)
    return Module("logical", (function.with_(ops=ops),))


def only_kernel(module: Module) -> Function:
    """The kernel of a program that fuses into exactly one."""
    fused = fuse(module, optimizers=True)
    left = [op.name for op in fused.entry.ops]
    assert left == ["call"], f"ops outside of the kernel: {left}"
    (kernel,) = fused.functions[1:]
    return kernel


def wide(function: Function) -> Function:
    """The function with every float type replaced by f64."""

    def value(v: Value) -> Value:
        dtype = "f64" if v.type.dtype in FLOATS else v.type.dtype
        return Value(v.name, replace(v.type, dtype=dtype))

    return function.with_(
        params=tuple(map(value, function.params)),
        results=tuple(map(value, function.results)),
        ops=tuple(
            op.with_(operands=tuple(map(value, op.operands)), results=tuple(map(value, op.results)))
            for op in function.ops
        ),
    )


def reference(function: Function, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The function's results in float64."""
    function = wide(function)
    operands = [x.double() if x.is_floating_point() else x for x in inputs]
    return run_function(Module("logical", (function,)), function, operands)


def samples(function: Function, seed: int = 0) -> list[Tensor]:
    """Random inputs: floats are normal, integers are small and not negative."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for value in function.params:
        shape, dtype = value.type.shape, TORCH[value.type.dtype]
        if value.type.dtype in FLOATS:
            out.append(torch.randn(shape, generator=generator).to(dtype))
        else:
            high = 2 if value.type.dtype == "bool" else 9
            out.append(torch.randint(0, high, shape, generator=generator).to(dtype))
    return out


def load(source: KernelSource, folder: Path) -> ModuleType:
    """Write a kernel's file and import it."""
    path = folder / f"{source.name}.py"
    path.write_text(source.text)
    spec = importlib.util.spec_from_file_location(source.name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check_close(got: Tensor, expected: Tensor, type: TensorType) -> None:
    """Compare a kernel's result with its float64 reference, element by element."""
    assert tuple(got.shape) == tuple(expected.shape)
    assert got.dtype == TORCH[type.dtype]
    if type.dtype not in FLOATS:
        assert torch.equal(got, expected.to(got.dtype))
        return
    actual, expected = got.double(), expected.double()
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual.isinf(), expected.isinf())
    finite = expected.isfinite()
    actual, expected = actual[finite], expected[finite]
    if not expected.numel():
        return
    arithmetic = ARITHMETIC.get(type.dtype, DEFAULT_ARITHMETIC)
    scale = max(float(expected.abs().max()), SIZE)
    allowed = ROUNDING[type.dtype] * expected.abs() + arithmetic * scale
    worst = ((actual - expected).abs() - allowed).max()
    assert worst <= 0, f"error {(actual - expected).abs().max():.3g} in {type}"


def run_and_compare(
    function: Function, inputs: Sequence[Tensor], folder: Path, *, persistent: int = 8192
) -> KernelSource:
    """Run a kernel on inputs and compare every result with the float64 reference."""
    source = generate(function, persistent=persistent)
    results = load(source, folder).launch(*inputs)
    assert len(results) == len(function.results)
    for got, expected, value in zip(
        results, reference(function, inputs), function.results, strict=True
    ):
        check_close(got, expected, value.type)
    return source
