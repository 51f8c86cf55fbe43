"""What the ranks of the multi-process tests run: `rank_worker.py OUT TASK[=ARGUMENT] ...`.

Each rank writes OUT.<rank>.json: for each task its report, `{"failures": [...], ...}`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
from tests.runtime.schedules import FORWARD_BACKWARD, TRAIN_STEP, random_schedule
from torch import Generator, Tensor

from weft.ir.errors import RunError
from weft.ir.module import Attr, Op, Value
from weft.ir.parser import parse_module
from weft.ir.types import B, Mesh, P, Placement, S, TensorType, local_shape
from weft.runtime.collectives import run_collective
from weft.runtime.comm import Comm
from weft.runtime.context import TORCH_DTYPES
from weft.runtime.executor import Executor
from weft.runtime.interpreter import evaluate
from weft.runtime.launch import World, init_from_env
from weft.runtime.program import Program

MESHES = {
    2: [Mesh((("x", 2),)), Mesh((("x", 1), ("y", 2)))],
    4: [Mesh((("x", 4),)), Mesh((("x", 2), ("y", 2)))],
}
Report = dict[str, Any]


def close(got: Tensor, want: Tensor, what: str) -> None:
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9, msg=lambda m: f"{what}: {m}")


def programs(world: World, argument: str) -> Report:
    """Random programs under random placements equal the logical program."""
    failures, count = [], 0
    for seed, mesh in product(range(int(argument)), MESHES[world.size]):
        try:
            one_program(seed, mesh)
        except (AssertionError, RunError):
            failures.append(f"seed {seed} on {mesh.axes}: {traceback.format_exc()}")
        count += 1
    return {"failures": failures, "count": count}


def one_program(seed: int, mesh: Mesh) -> None:
    case = random_schedule(seed, mesh)
    want = evaluate(case.logical, case.inputs)
    names = [value.name for value in case.logical.entry.params]
    given = dict(zip(names, case.inputs, strict=True))
    executor = Executor(case.schedule)
    for slot, value in enumerate(executor.kept):
        executor.state[slot] = executor.place(given[value.name], value).clone()
    got = iter(executor.run([given[value.name] for value in executor.fed]))
    slots = {value.name: slot for slot, value in enumerate(executor.kept)}
    for number, attrs in enumerate(case.schedule.entry.result_attrs):
        if "updates" in attrs:
            slot = slots[str(attrs["updates"])]
            shard, type = executor.state[slot], executor.kept[slot].type
            close(executor.comm.gather(shard, type), want[number], f"state {attrs['updates']}")
        else:
            close(next(got), want[number], f"result {number}")


def transfers() -> list[tuple[Op, Mesh]]:
    """Every kind of transfer, on even, uneven and empty shards, nested splits, several dtypes."""
    cases: list[tuple[Op, Mesh]] = []

    def add(
        mesh: Mesh, name: str, shape: tuple[int, ...], before: list[Placement],
        after: list[Placement], dtype: str = "f32", **attrs: Attr,
    ) -> None:  # fmt: skip
        x = Value("x", TensorType(dtype, shape, tuple(before)))
        y = Value("y", TensorType(dtype, shape, tuple(after)))
        cases.append((Op(name, (x,), (y,), attrs), mesh))

    line, grid = MESHES[4]
    for shape, dim in product([(8, 3), (3, 8), (5, 7), (7, 2, 5)], (0, 1)):
        for dtype in ("f32", "bf16", "bool", "i64", "f8e4m3", "i16"):
            add(line, "all_gather", shape, [S(dim)], [B], dtype, axis="x", dim=dim)
            add(line, "all_to_all", shape, [S(dim)], [S(1 - dim)], dtype, axis="x", source=dim,
                target=1 - dim)  # fmt: skip
        for combine in ("sum", "max", "min"):
            add(line, "all_reduce", shape, [P(combine)], [B], axis="x", combine=combine)
            add(line, "reduce_scatter", shape, [P(combine)], [S(dim)], axis="x", dim=dim,
                combine=combine)  # fmt: skip
            add(line, "partial", shape, [S(dim)], [P(combine)], axis="x", combine=combine)
        add(line, "shard", shape, [B], [S(dim)], axis="x", dim=dim)
        add(line, "partial", shape, [B], [P("sum")], axis="x", combine="sum")
        add(line, "broadcast", shape, [B], [B], axis="x", root=2)
        add(line, "permute_ranks", shape, [S(dim)], [S(dim)], axis="x", shift=-1)
        add(line, "lse_combine", shape, [B], [B], axis="x")
        # a dim split over both axes: the inner one is gathered, scattered, exchanged
        add(grid, "all_gather", shape, [S(dim), S(dim)], [S(dim), B], axis="y", dim=dim)
        add(grid, "reduce_scatter", shape, [S(dim), P("sum")], [S(dim), S(dim)], axis="y", dim=dim)
        add(grid, "all_to_all", shape, [S(dim), S(dim)], [S(dim), S(1 - dim)], axis="y",
            source=dim, target=1 - dim)  # fmt: skip
        add(grid, "shard", shape, [S(dim), B], [S(dim), S(dim)], axis="y", dim=dim)
        add(grid, "all_reduce", shape, [P("sum"), S(dim)], [B, S(dim)], axis="x", combine="sum")
    add(line, "all_reduce", (), [P("sum")], [B], axis="x", combine="sum")
    add(line, "all_gather", (2, 3), [S(0)], [B], axis="x", dim=0)  # two ranks hold nothing
    return cases


def collectives(world: World, argument: str) -> Report:
    """Each transfer, at once and as a pair of start and wait, equals its meaning over all ranks."""
    failures, comms = [], {mesh.axes: Comm(mesh) for mesh in MESHES[4]}
    for number, (op, mesh) in enumerate(transfers()):
        values = rank_values(op, mesh, number)
        want = run_collective(op, values, mesh)[world.rank]
        for later in (False, True):
            comm = comms[mesh.axes]
            action = comm.action(op.with_(attrs={**op.attrs, "async": later}))
            mine = values[world.rank]
            if number % 2 and mine.dim() > 1:  # the same values in column-major order
                mine = mine.transpose(0, -1).contiguous().transpose(0, -1)
            out = action(mine)
            got = out.wait() if hasattr(out, "wait") else out
            same = got.dtype == want.dtype and got.shape == want.shape and got.is_contiguous()
            if not same or not torch.equal(got.double(), want.double()):
                failures.append(f"{op.name} {op.attrs} {op.operands[0].type}: {got} for {want}")
    return {"failures": failures, "count": number + 1}


def stages(world: World, argument: str) -> Report:
    """Two pipeline stages of two ranks: values go to the same coordinate of the other stage."""
    mesh = Mesh((("x", 2),))
    comm = Comm([mesh] * 2)
    stage = world.rank // 2
    value = Value("x", TensorType("f32", (3, 4), (S(0),)))
    peer = world.rank + 2 - 4 * stage
    failures = []
    for tag, later in enumerate((False, True)):
        attrs: dict[str, Attr] = {"tag": tag, "async": later}
        send = comm.action(Op("send", (value,), (value,), {**attrs, "to": 1 - stage}))
        recv = comm.action(Op("recv", (), (value,), {**attrs, "source": 1 - stage}))
        mine = torch.full((2 - world.rank % 2, 4), float(world.rank))
        # of two that send first each would wait for the other
        first, second = (send, recv) if stage == 0 or later else (recv, send)
        out = [act(mine) if act is send else act() for act in (first, second)]
        got = out[1] if first is send else out[0]
        if later:
            out[0].wait()
            got = out[1].wait()
        if not torch.equal(got, torch.full_like(mine, float(peer))):
            failures.append(f"{got} from {peer}")
    return {"failures": failures}


def rank_values(op: Op, mesh: Mesh, seed: int) -> list[Tensor]:
    """The operand of a transfer on each rank, small integers so that sums are exact."""
    g = Generator().manual_seed(seed)
    type = op.operands[0].type
    dtype = TORCH_DTYPES[type.dtype]
    shapes = [local_shape(type, mesh, coord) for coord in mesh.coords()]
    return [torch.randint(0, 8, shape, generator=g).to(dtype) for shape in shapes]


def train(world: World, argument: str) -> Report:
    """Three optimizer steps equal the logical evaluation; the trace names what ran."""
    module = parse_module(TRAIN_STEP)
    g = Generator().manual_seed(0)
    w, x = torch.randn(5, 6, generator=g), torch.randn(7, 5, generator=g)
    program = Program(module, timeout_s=30)
    program.load_state({"w": w})
    logical = [w, torch.zeros(5, 6), torch.zeros(5, 6), torch.zeros((), dtype=torch.float64)]
    failures, losses = [], []
    for step in range(3):
        lr = 0.1 / (step + 1)
        want = evaluate(module, [*logical, x, torch.tensor(lr, dtype=torch.float64)])
        with program.tracing(argument):
            (loss,) = program.step(x, lr=lr)
        losses.append(float(loss))
        logical = want[1:]
        torch.testing.assert_close(loss, want[0])
    got = program.state_dict()
    for name, tensor in zip(("w", "exp_avg/w", "exp_avg_sq/w", "step"), logical, strict=True):
        if not torch.allclose(got[name], tensor, rtol=1e-5, atol=1e-7):
            failures.append(f"{name}: {got[name]} for {tensor}")
    local = {name: list(t.shape) for name, t in program.state_dict(full=False).items()}
    memory = program.memory()
    return {"failures": failures, "losses": losses, "local": local, "state": memory.state_bytes,
            "planned": memory.planned_bytes, "peak": memory.peak_bytes}  # fmt: skip


def halves(world: World, argument: str) -> Report:
    """A program with tangents: outputs, then gradients for the tangents that come after."""
    module = parse_module(FORWARD_BACKWARD)
    g = Generator().manual_seed(0)
    w, x, dy = (torch.randn(*shape, generator=g) for shape in ((5, 6), (7, 5), (7, 6)))
    program = Program(module, timeout_s=30)
    program.load_state({"w": w})
    want = evaluate(module, [w, x, dy])
    for _ in range(2):
        (y,) = program.begin(x)
        torch.testing.assert_close(y, want[0])
        for got, expected in zip(program.finish(dy), want[1:], strict=True):
            torch.testing.assert_close(got, expected)
    return {"failures": [], "count": len(want)}


def expect(code: str, act: Callable[[], object]) -> Report:
    """The diagnostic that `act` must end in."""
    start = time.monotonic()
    try:
        act()
    except RunError as error:
        failures = [] if error.code == code else [f"expected {code}, got {error}"]
        return {"failures": failures, "message": str(error), "took": time.monotonic() - start}
    return {"failures": [f"no {code}"]}


def fewer(world: World, argument: str) -> Report:
    """A plan for four ranks in a world of two."""
    return expect("W0801", lambda: Program(parse_module(TRAIN_STEP)))


def differ(world: World, argument: str) -> Report:
    """One rank holds a plan with another combine."""
    text = TRAIN_STEP
    if world.rank == 3:
        text = text.replace('"dp", async = true', '"dp", combine = "max", async = true')
    return expect("W0802", lambda: Program(parse_module(text)))


def fail(world: World, argument: str) -> Report:
    """One rank's action raises: all ranks end with a diagnostic that names it."""
    program = Program(parse_module(TRAIN_STEP), timeout_s=3)
    program.load_state({"w": torch.ones(5, 6)})
    if world.rank == 1:  # a shard of a wrong size makes its first einsum raise
        program.executor.state[0] = torch.ones(4, 3)
    return expect("W0803", lambda: program.step(torch.ones(7, 5), lr=0.1))


def die(world: World, argument: str) -> Report:
    """One rank is killed in the middle of a step: the others say so, soon."""
    program = Program(parse_module(TRAIN_STEP), timeout_s=20)
    program.load_state({"w": torch.ones(5, 6)})
    program.step(torch.ones(7, 5), lr=0.1)
    if world.rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return expect("W0803", lambda: program.step(torch.ones(7, 5), lr=0.1))


TASKS: dict[str, Callable[[World, str], Report]] = {
    task.__name__: task
    for task in (programs, collectives, train, fewer, differ, fail, die, halves, stages)
}  # fmt: skip


def main(out: str, *tasks: str) -> None:
    torch.set_num_threads(1)
    with init_from_env(timeout_s=60) as world:
        reports = {}
        for task in tasks:
            name, _, argument = task.partition("=")
            reports[name] = TASKS[name](world, argument)
            Path(f"{out}.{world.rank}.json").write_text(json.dumps(reports), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
