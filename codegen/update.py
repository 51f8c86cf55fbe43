"""One launch for the optimizer updates of many parameters, in place.

The kernel's operands are in a table: a row for each chunk of each parameter, with the addresses of
the parameter, its gradient and its states, the parameter's size, and where the chunk begins. What is
computed at an element comes from the same expressions as in other kernels. Every element is read
and written by one thread, which reads all it needs before it writes, so nothing races.
"""

from __future__ import annotations

from dataclasses import replace

from ..ir.module import Function, Op, Value
from ..ir.ops.optimizer import OVERWRITES
from ..ir.text import print_op
from ..ir.types import TensorType
from ..runtime.updates import update_name
from .kernel import build
from .layout import layout
from .printer import TL, Body
from .source import KernelSource

#: elements of a step of a program's loop, and of a program: 7e9 parameters need a table of 5 MB
_BLOCK, _CHUNK = 1024, 1 << 16
_WARPS = 4
_COLUMNS = ("param", "grad", "state1", "state2")

_TEXT = '''"""Kernel {name}: updates many parameters in place.

Computes for each of them
    {op}
"""

import torch
import triton
import triton.language as tl

BLOCK_N = {block}
CHUNK = {chunk}
NUM_WARPS = {warps}
TABLES = {{}}


@triton.jit
def kernel(table_ptr, step_ptr, lr_ptr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr):
    line = table_ptr + tl.program_id(0) * {width}
{pointers}
    n_cols = tl.load(line + {count})
    first = tl.load(line + {count} + 1)
    for start in range(0, CHUNK, BLOCK_N):
        col = first + start + tl.arange(0, BLOCK_N)
        in_cols = col < n_cols
{body}


def table(columns):
    """The table of lists of tensors: one line for each chunk."""
    sizes = torch.tensor([x.numel() for x in columns[0]], dtype=torch.int64)
    addresses = [[x.data_ptr() for x in column] for column in columns]
    lines = torch.stack([*torch.tensor(addresses, dtype=torch.int64), sizes], 1)
    chunks = (sizes + CHUNK - 1) // CHUNK
    lines = lines.repeat_interleave(chunks, 0)
    number = torch.arange(len(lines)) - (chunks.cumsum(0) - chunks).repeat_interleave(chunks)
    return torch.cat([lines, (number * CHUNK)[:, None]], 1)


def launch({columns}, step, lr):
    """Update lists of parameters and states in place, given lists of gradients.

    Raises ValueError for tensors that are not contiguous from a multiple of 16 bytes on.
    """
    device = param[0].device
    grad = [x.contiguous() for x in grad]
    grad = [x.clone() if x.data_ptr() % 16 else x for x in grad]
    columns = ({columns},)
    if any(x.data_ptr() % 16 or not x.is_contiguous() for column in columns for x in column):
        raise ValueError("a parameter or state is not contiguous, or not aligned")
    key = tuple((x.data_ptr(), x.numel()) for column in columns for x in column)
    if key not in TABLES:
        if len(TABLES) >= 64:
            TABLES.clear()
        TABLES[key] = table(columns).to(device)
    lines = TABLES[key]
    step, lr = (x.to(device, torch.float64) for x in (step, lr))
    if len(lines):
        kernel[(len(lines),)](
            lines, step, lr, BLOCK_N=BLOCK_N, CHUNK=CHUNK, num_warps=NUM_WARPS,
        )
    return ()
'''


def update_source(op: Op) -> KernelSource:
    """The kernel of updates like `op`: `launch(params, grads, *states, step, lr)` takes lists.

    Its name is `update_name(op)`. Raises CompileError W0901.
    """
    count = len(op.operands) - 2
    names = (*_COLUMNS[:count], "step", "lr")
    columns = [TensorType(value.type.dtype, (_CHUNK,)) for value in op.operands[:count]]
    types = [*columns, *(value.type.placed(None) for value in op.operands[count:])]
    operands = tuple(Value(name, type) for name, type in zip(names, types, strict=True))
    places = OVERWRITES[op.name]
    results = tuple(Value(f"new_{names[i]}", columns[i]) for i in places)
    attrs = {key: value for key, value in op.attrs.items() if key != "inplace"}
    alone = replace(op, operands=operands, results=results, attrs=attrs, split={})
    name = update_name(op)
    kernel = build(Function(name, operands, (alone,), results, attrs={"kernel": name}))
    head, *body = Body(kernel, layout(kernel)).print()[1:]
    assert head.startswith("in_cols")  # the loop says where the columns are
    pointers = [
        f"    {column}_ptr = tl.multiple_of(tl.load(line + {i}), 16)"
        f".to(tl.pointer_type({TL[type.dtype]}))"
        for i, (column, type) in enumerate(zip(names, columns, strict=False))
    ]
    pointers += [f"    new_{names[i]}_ptr = {names[i]}_ptr" for i in places]
    text = _TEXT.format(
        name=name, op=print_op(alone), block=_BLOCK, chunk=_CHUNK, warps=_WARPS, width=count + 2,
        count=count, pointers="\n".join(pointers), body="\n".join(f"        {x}" for x in body),
        columns=", ".join(names[:count]),
    )  # fmt: skip
    signature = {"table_ptr": "*i64", "step_ptr": "*fp64", "lr_ptr": "*fp64"}
    moved = sum(value.type.bytes for value in (*op.operands, *op.results))
    return KernelSource(name, text, signature, {"BLOCK_N": _BLOCK, "CHUNK": _CHUNK}, (), _WARPS,
                        "update", moved, moved)  # fmt: skip
