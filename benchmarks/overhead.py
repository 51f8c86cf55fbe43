"""Time that the executor adds to each action, against the same calls of torch by hand; time and
memory of whole train steps, against eager and torch.compile.

    python benchmarks/overhead.py [--quick] [--json FILE]
"""

from __future__ import annotations

import statistics
import sys
import time
import timeit
from collections.abc import Callable
from contextlib import ExitStack
from tempfile import TemporaryDirectory
from unittest.mock import patch

import torch
from rows import Row, arguments, finish, show
from step_rows import step_rows
from torch import Tensor

from weft.ir.builder import Builder
from weft.ir.module import Function, Module, Op, Value
from weft.ir.types import B, Mesh, P, Placement, S, TensorType
from weft.passes.schedule import Schedule
from weft.runtime.comm import Comm
from weft.runtime.executor import Executor

#: the contract: Python time per action (design.md, issue 1 of 5)
TARGET_US = 8.0
LAYERS = 60


def block(width: int) -> tuple[Module, Callable[..., Tensor], int]:
    """A chain of small ops of the kinds that a transformer has, as a schedule and as plain torch.

    Returns the schedule, the function, and how many ops each has.
    """
    build = Builder()
    x = build.param(TensorType("f32", (4, width)), "x", role="input")
    w = build.param(TensorType("f32", (width, width)), "w", role="param", name="w")
    value = x
    for _ in range(LAYERS):
        mean = build.op("mul", [build.op("reduce_sum", [value], {"dims": (1,), "keepdim": True}),
                                build.constant(1 / width, TensorType("f32", ()))])  # fmt: skip
        centred = build.op("sub", [value, mean])
        heads = build.op("reshape", [centred], types=[TensorType("f32", (4, 2, width // 2))])
        turned = build.op("permute", [heads], {"dims": (1, 0, 2)})
        back = build.op("permute", [turned], {"dims": (1, 0, 2)})
        flat = build.op("reshape", [back], types=[TensorType("f32", (4, width))])
        product = build.op("einsum", [flat, w], {"spec": "b k, k n -> b n"})
        value = build.op("add", [value, build.op("silu", [product])])
    entry = build.function("main", [value], result_attrs=[{"role": "output"}])
    placed = _everywhere(entry)
    module = Schedule().run(Module("spmd", (placed,), Mesh()))
    actions = sum(op.name not in ("free", "constant") for op in module.entry.ops)

    scale = torch.tensor(1 / width)

    def plain(x: Tensor, w: Tensor) -> Tensor:
        value = x
        for _ in range(LAYERS):
            mean = value.sum((1,), keepdim=True) * scale
            heads = (value - mean).reshape(4, 2, width // 2)
            flat = heads.permute(1, 0, 2).permute(1, 0, 2).reshape(4, width)
            value = value + torch.nn.functional.silu(torch.mm(flat, w))
        return value

    return module, plain, actions


def _everywhere(function: Function) -> Function:
    """The function with the empty placement of a mesh without axes."""

    def placed(value: Value) -> Value:
        return Value(value.name, value.type.placed(()))

    def op(old: Op) -> Op:
        return old.with_(operands=tuple(map(placed, old.operands)),
                         results=tuple(map(placed, old.results)))  # fmt: skip

    return function.with_(params=tuple(map(placed, function.params)), ops=tuple(map(op, function.ops)),
                          results=tuple(map(placed, function.results)))  # fmt: skip


def time_us(run: Callable[[], object], repeats: int) -> float:
    """The median time of a call."""
    for _ in range(3):
        run()
    samples = []
    for _ in range(repeats):
        start = time.perf_counter_ns()
        run()
        samples.append((time.perf_counter_ns() - start) / 1e3)
    return statistics.median(samples)


def overhead_rows(repeats: int) -> list[Row]:
    """Microseconds per action that the executor adds to the same ATen calls."""
    module, plain, actions = block(8)
    executor = Executor(module)
    x, w = torch.randn(4, 8), torch.randn(8, 8)
    executor.state[0] = w
    (got,) = executor.run([x])
    torch.testing.assert_close(got, plain(x, w))
    with torch.no_grad():
        direct = min(time_us(lambda: plain(x, w), repeats) for _ in range(3))
    ours = min(time_us(lambda: executor.run([x]), repeats) for _ in range(3))
    added = (ours - direct) / actions
    return [
        Row("executor, added per action", added, "us", TARGET_US, "the same calls of torch"),
        Row("executor, per action in all", ours / actions, "us"),
        Row("torch alone, per action", direct / actions, "us"),
    ]


class _Done:
    """A transfer that is done at once."""

    def wait(self) -> None:
        """Nothing to wait for."""


def transfer_rows(repeats: int) -> list[Row]:
    """Microseconds of Python around a transfer, the transfer itself being replaced by nothing."""
    mesh = Mesh((("x", 2),))
    patches = {
        "weft.runtime.groups.check_world": None, "weft.runtime.groups.dist.new_group": mesh,
        "weft.runtime.transfers.dist.all_reduce": _Done(),
        "weft.runtime.transfers.dist.all_to_all_single": _Done(),
        "weft.runtime.transfers._gather_single": _Done(),
    }  # fmt: skip
    x = torch.ones(8, 8)
    kinds: list[tuple[str, Placement, Placement, dict[str, int], Tensor, Callable[[], object]]] = [
        ("all_reduce", P(), B, {}, x, x.clone),
        ("all_gather", S(0), B, {"dim": 0}, x[:4], lambda: x.new_empty(64).view(8, 8)),
        ("reduce_scatter", P(), S(0), {"dim": 0}, x,
         lambda: x.new_empty(64).view(2, 4, 8).sum(0)),
    ]  # fmt: skip
    rows = []
    with ExitStack() as stack:
        for name, value in patches.items():
            stack.enter_context(patch(name, lambda *a, value=value, **k: value))
        comm = Comm(mesh, 0)
        for name, before, after, attrs, operand, alone in kinds:
            types = (TensorType("f32", (8, 8), (p,)) for p in (before, after))
            a, b = (Value(n, type) for n, type in zip("xy", types, strict=True))
            action = comm.action(Op(name, (a,), (b,), {"axis": "x", **attrs}))
            added = best_us(lambda: action(operand), repeats) - best_us(alone, repeats)
            rows.append(
                Row(f"{name}, Python added", added, "us", TARGET_US, "its tensor ops alone")
            )
    return rows


def best_us(run: Callable[[], object], repeats: int) -> float:
    """The time of a call in the fastest of many short batches: what a busy machine cannot add to."""
    return min(timeit.repeat(run, number=200, repeat=repeats)) / 200 * 1e6


def main() -> int:
    """Measure, print, write; 1 when a target is missed."""
    options = arguments(__doc__, "fewer repetitions, one model, no compilers").parse_args()
    torch.set_num_threads(1)
    rows = overhead_rows(50 if options.quick else 400) + transfer_rows(60)
    with TemporaryDirectory() as cache:  # of Inductor, so that first steps do compile
        with patch.dict("os.environ", TORCHINDUCTOR_CACHE_DIR=cache):
            rows += step_rows(options.quick)
    show(rows)
    return finish(rows, options.json)


if __name__ == "__main__":
    sys.exit(main())
