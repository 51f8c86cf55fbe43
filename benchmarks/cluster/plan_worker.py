"""On each rank: train steps of weft's plans and of hand-written ones, in turns.

    plan_worker.py OUT.json RANKS_PER_HOST NAME=FOLDER...   {name: {plan: [losses, seconds]}}

Seconds are those of a whole loop of steps over their number, on the slowest rank, the least over the
rounds; in a round each plan has its turn.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from rival_models import made
from rivals import rivals
from torch import Tensor

from weft.runtime.artifact import Artifact
from weft.runtime.comm import Comm
from weft.runtime.program import Program

_ROUNDS, _LOOP_S, _LOSSES = 3, 0.4, 3

#: one step, and the whole batch's loss
Step = Callable[[], Tensor]


def weft_step(name: str, folder: str) -> tuple[Step, Comm]:
    """The plan in a folder."""
    artifact = Artifact.open(folder)
    module = artifact.module()
    assert module.mesh is not None
    comm = Comm(module.mesh)
    program = Program(module, comm)
    program.load_state(artifact.tensors("weights"))
    rates, batch = artifact.info["meta"]["lr"], made(name)[2]
    return lambda: program.step(*batch, lr=rates)[0], comm


def mean_loss(step: Step, replicas: int) -> float:
    """The loss of the whole batch."""
    loss = step().detach().double().clone()
    if replicas > 1:  # the others of a replica have the same loss
        dist.all_reduce(loss)
        loss /= dist.get_world_size()
    return float(loss)


def loop_s(step: Step, count: int) -> float:
    """Seconds of a step on the slowest rank."""
    dist.barrier()
    start = time.perf_counter()
    for _ in range(count):
        step()
    dist.barrier()
    took = torch.tensor([(time.perf_counter() - start) / count], dtype=torch.float64)
    dist.all_reduce(took, dist.ReduceOp.MAX)
    return float(took)


def compared(name: str, folder: str, ranks: int) -> dict[str, tuple[list[float], float]]:
    """Losses of the first steps and seconds of a step, for each plan of a model."""
    ours, _comm = weft_step(name, folder)
    plans: dict[str, tuple[Step, int]] = {"weft": (ours, 1)}
    plans |= {rival: (made.step, made.replicas) for rival, made in rivals(name, ranks).items()}
    losses = {key: [mean_loss(step, replicas) for _ in range(_LOSSES)]
              for key, (step, replicas) in plans.items()}  # fmt: skip
    counts = {key: max(2, min(50, round(_LOOP_S / loop_s(step, 1))))
              for key, (step, _) in plans.items()}  # fmt: skip
    rounds = [{key: loop_s(step, counts[key]) for key, (step, _) in plans.items()}
              for _ in range(_ROUNDS)]  # fmt: skip
    return {key: (losses[key], min(one[key] for one in rounds)) for key in plans}


def main() -> None:
    """Measure all models."""
    out, ranks, *pairs = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {}
    for pair in pairs:
        name, _, folder = pair.partition("=")
        found[name] = compared(name, folder, int(ranks))
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
