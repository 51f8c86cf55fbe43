"""Updates of many parameters in one launch, in the interpreter. Needs TRITON_INTERPRET=1."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.codegen.kit import TORCH, check_close, load, reference, wide
from tests.codegen.programs import tensor
from torch import Tensor

from weft.codegen.update import update_source
from weft.ir.builder import Builder
from weft.ir.module import Function, Op
from weft.ir.ops.optimizer import OVERWRITES

#: below a block, over a chunk, empty, scalar
SIZES = [(3, 5), (1 << 16, 1), (70001,), (0, 4), ()]
ATTRS = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}


def update(name: str, dtypes: list[str], shape: tuple[int, ...]) -> tuple[Function, Op]:
    b = Builder()
    operands = [b.param(tensor(dtype, *shape), f"x{i}") for i, dtype in enumerate(dtypes)]
    operands += [b.param(tensor("f64"), "step"), b.param(tensor("f64"), "lr")]
    attrs = ATTRS if name.startswith("adam") else {"momentum": 0.9} if "mom" in name else {}
    results = b.many(name, operands, attrs)
    function = b.function("main", list(results))
    return function, function.ops[-1]


@pytest.mark.parametrize(
    ("name", "dtypes"),
    [("adamw_update", ["f32"] * 4), ("adamw_update", ["bf16", "bf16", "f32", "f32"]),
     ("adam_update", ["bf16"] * 4), ("momentum_update", ["f32"] * 3), ("sgd_update", ["f32"] * 2)],
)  # fmt: skip
def test_many_parameters_are_updated_in_place(name: str, dtypes: list[str], tmp_path: Path) -> None:
    torch.manual_seed(0)
    _, op = update(name, dtypes, (4,))
    launch = load(update_source(op), tmp_path).launch
    step, lr = torch.tensor(3.0, dtype=torch.float64), torch.tensor(0.01, dtype=torch.float64)
    columns: list[list[Tensor]] = [
        [torch.rand(shape).to(TORCH[dtype]) for shape in SIZES] for dtype in dtypes
    ]
    columns[1][0] = torch.rand(5, 3).to(columns[1][0].dtype).t()  # a gradient in another order
    for _ in range(2):  # the second time with the table of the first
        before = [[x.clone() for x in column] for column in columns]
        assert launch(*columns, step, lr) == ()
        for number, shape in enumerate(SIZES):
            function, _ = update(name, dtypes, shape)
            expected = reference(function, [column[number] for column in before] + [step, lr])
            for place, value, result in zip(
                OVERWRITES[name], wide(function).results, expected, strict=True
            ):
                type = tensor(dtypes[place], *value.type.shape)
                check_close(columns[place][number], result, type)


def test_states_that_are_not_contiguous_are_refused(tmp_path: Path) -> None:
    _, op = update("sgd_update", ["f32", "f32"], (4,))
    launch = load(update_source(op), tmp_path).launch
    one = torch.tensor(1.0, dtype=torch.float64)
    with pytest.raises(ValueError, match="contiguous"):
        launch([torch.rand(4, 5).t()], [torch.rand(5, 4)], one, one)
