"""What the verifier accepts runs: the reference semantics give the declared shapes and dtypes.

The examples of all ops are changed at random in their attributes and types. Most changes are
refused; an op that passes must run.
"""

from __future__ import annotations

from dataclasses import replace
from random import Random

import torch
from tests.runtime.examples import CASES

from weft.ir.errors import CompileError
from weft.ir.module import Attr, Function, Module, Op, Value
from weft.ir.types import TensorType
from weft.ir.verify import verify
from weft.runtime.context import TORCH_DTYPES
from weft.runtime.interpreter import evaluate

#: changes for each example
CHANGES = 25
#: the CPU kernels of PyTorch that want equal floats where the op table takes any, or no bools
NARROWER_KERNELS = ("layer_norm", "layer_norm_backward", "cumsum")


def changed_attr(value: Attr, rng: Random) -> Attr:
    match value:
        case bool():
            return not value
        case int():
            return value + rng.choice((-2, -1, 1, 2, 7))
        case tuple() if value:
            items, at = list(value), rng.randrange(len(value))
            items[at : at + 1] = rng.choice(
                ([], [items[at]] * 2, [changed_attr(items[at], rng)])
            )
            return tuple(items)
    return value


def changed_type(type: TensorType, rng: Random) -> TensorType:
    shape = list(type.shape)
    match rng.randrange(4):
        case 0:
            return replace(type, dtype=rng.choice(("f32", "f64", "i64", "bool")))
        case 1 if shape:
            shape[rng.randrange(len(shape))] = rng.choice((1, 2, 3, 5))
        case 2 if shape:
            del shape[rng.randrange(len(shape))]
        case _:
            shape.insert(rng.randint(0, len(shape)), rng.choice((1, 2)))
    return TensorType(type.dtype, tuple(shape))


def change(op: Op, rng: Random) -> Op:
    match rng.randrange(3):
        case 0 if op.attrs:
            name = rng.choice(list(op.attrs))
            return op.with_(attrs={**op.attrs, name: changed_attr(op.attrs[name], rng)})
        case 1 if op.operands:
            old = rng.choice(op.operands)
            new = Value(old.name, changed_type(old.type, rng))
            return op.with_(operands=tuple(new if v == old else v for v in op.operands))
        case _:
            old = rng.choice(op.results)
            new = Value(old.name, changed_type(old.type, rng))
            return op.with_(results=tuple(new if v == old else v for v in op.results))


def module_of(op: Op) -> Module:
    params = tuple(dict.fromkeys(op.operands))
    return Module("logical", (Function("main", params, (op,), op.results),))


def example_of(type: TensorType) -> torch.Tensor:
    """Zeros for integers: they are valid indices."""
    dtype = TORCH_DTYPES[type.dtype]
    if dtype.is_floating_point:
        return torch.rand(type.shape).to(dtype)
    return torch.zeros(type.shape, dtype=dtype)


def test_ops_that_the_verifier_accepts_run_and_give_their_types() -> None:
    rng = Random(0)
    refused = accepted = 0
    for case in CASES:
        for _ in range(CHANGES):
            op = change(case.op, rng)
            module = module_of(op)
            try:
                verify(module)
            except CompileError:
                refused += 1
                continue
            if op.name in NARROWER_KERNELS:
                continue
            accepted += 1
            results = evaluate(module, [example_of(v.type) for v in module.entry.params])
            for tensor, value in zip(results, op.results, strict=True):
                assert tuple(tensor.shape) == value.type.shape, op
                assert tensor.dtype == TORCH_DTYPES[value.type.dtype], op
    assert accepted > 200 and refused > 2000
