"""What the four ranks of `test_ecosystem.py` run: `ecosystem_worker.py OUT`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tests.runtime.schedules import TRAIN_STEP
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

import weft
from weft.ir.errors import CompileError
from weft.ir.parser import parse_module
from weft.runtime.launch import init_from_env
from weft.runtime.program import Program


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> Tensor:
    loss = model(x).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss


def make() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 7))  # 10 and 7 are uneven
    return model, torch.optim.AdamW(model.parameters(), lr=0.01)


def report() -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    compiled = weft.compile(step, mesh=mesh, progress=False)
    ours, theirs, out = make(), make(), dict[str, Any]()
    torch.manual_seed(1)
    batches = [torch.randn(9, 6) for _ in range(3)]
    out["losses"] = [(compiled(*ours, x).item(), step(*theirs, x).item()) for x in batches]
    out["mesh"] = str(compiled.plan.mesh.axes)
    comm = compiled.step.plan and compiled.step._current.running.comm
    out["same groups"] = all(comm.group(n) is mesh.get_group(n) for n in ("dp", "tp"))
    whole, parts = compiled.state_dict(), compiled.state_dict(dtensor=True)
    out["dtensors"] = sum(isinstance(t, DTensor) for t in parts.values()) == len(whole)
    out["same mesh"] = all(t.device_mesh is mesh for t in parts.values())
    out["equal"] = all(torch.equal(t.full_tensor(), whole[n]) for n, t in parts.items())
    program = Program(parse_module(TRAIN_STEP))  # 5 rows on 2 ranks, and no DeviceMesh given
    program.load_state({"w": torch.randn(5, 6, generator=torch.Generator().manual_seed(0))})
    program.step(torch.ones(7, 5), lr=0.1)
    whole, parts = program.state_dict(), program.state_dict(dtensor=True)
    out["placements"] = {n: str(t.placements) for n, t in parts.items()}
    out["equal shards"] = all(torch.equal(t.full_tensor(), whole[n]) for n, t in parts.items())
    half = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))["a"]
    try:
        weft.compile(step, mesh=half, progress=False)(*make(), batches[0])
    except CompileError as error:
        out["part"] = error.code
    return out


def main(path: str) -> None:
    torch.set_num_threads(1)
    with init_from_env(timeout_s=60):
        Path(f"{path}.{dist.get_rank()}.json").write_text(json.dumps(report()))


if __name__ == "__main__":
    main(*sys.argv[1:])
