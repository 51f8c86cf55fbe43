"""What the ranks of the checkpoint tests run: `checkpoint_worker.py save|load FOLDER OUT`.

Four ranks train, save twice (the second time while they go on training) and train on; other ranks load
that and train on too. Each rank writes OUT.<rank>.json, rank 0 the whole state as OUT.safetensors.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tests.runtime.schedules import TRAIN_STEP
from torch import Tensor

from weft.ir.errors import RunError
from weft.ir.parser import parse_module
from weft.runtime.checkpoint import Checkpoints
from weft.runtime.launch import World, init_from_env
from weft.runtime.program import Program

#: the same step for two ranks, with other splits
OTHER = TRAIN_STEP.replace("mesh [dp=2, tp=2]", "mesh [dp=2, tp=1]")


def steps(program: Program, first: int, count: int) -> list[float]:
    """Losses of some steps; each has its own batch."""
    losses = []
    for step in range(first, first + count):
        x = torch.randn(7, 5, generator=torch.Generator().manual_seed(step))
        losses.append(float(program.step(x, lr=0.1)[0]))
    return losses


def written(program: Program, out: str, world: World) -> dict[str, Tensor]:
    state = program.state_dict()
    if world.rank == 0:
        save_file(state, f"{out}.safetensors")
    return state


def save(folder: str, out: str, world: World) -> dict[str, object]:
    program = Program(parse_module(TRAIN_STEP), timeout_s=60)
    program.load_state({"w": torch.randn(5, 6, generator=torch.Generator().manual_seed(9))})
    with Checkpoints(program) as checkpoints:
        losses = steps(program, 0, 2)
        checkpoints.save(folder, 2)
        losses += steps(program, 2, 2)
        checkpoints.save(folder, 4, asynchronous=True)
        written(program, out, world)
        losses += steps(program, 4, 3)
        checkpoints.wait()
        back = checkpoints.load(folder)  # and on the same plan the curve is the same
        again = steps(program, 4, 3)
    return {"losses": losses, "again": again, "back": back}


def load(folder: str, out: str, world: World) -> dict[str, object]:
    program = Program(parse_module(OTHER), timeout_s=60)
    with Checkpoints(program) as checkpoints:
        step = checkpoints.load(folder)
        written(program, out, world)
        read = checkpoints.bytes_read
        code = ""
        if world.rank == 1:  # damage that only one rank can see ends all of them
            checkpoints.layout.types["missing"] = program.state_types["w"]
        try:
            checkpoints.load(folder)
        except RunError as error:
            code = error.code
        checkpoints.layout.types.pop("missing", None)
        return {"step": step, "losses": steps(program, step, 3), "read": read, "code": code}


def main(task: str, folder: str, out: str) -> None:
    torch.set_num_threads(1)
    with init_from_env(timeout_s=60) as world:
        report = {"save": save, "load": load}[task](folder, out, world)
        Path(f"{out}.{world.rank}.json").write_text(json.dumps(report), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
