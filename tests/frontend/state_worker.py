"""What the ranks of test_state_ranks.py run: train, save, and go on elsewhere.

`state_worker.py OUT TASK ...`; each rank writes OUT.<rank>.json: for each task its numbers. Tasks of
one world leave checkpoints in the folder of OUT for those of the next.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from tests.frontend.rank_worker import RANKS, batch, differ, net, random_plan, report_of, step
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

import weft

Report = dict[str, Any]
FOLDER = Path(sys.argv[1]).parent if len(sys.argv) > 1 else Path()
RANK = int(os.environ.get("RANK", "0"))


def started(seed: int, dropout: float = 0.5) -> tuple[Any, Any, Any]:
    model = net(dropout)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    torch.manual_seed(7)
    return weft.compile(step, pipeline=random_plan(seed)), model, optimizer


def losses(compiled: Any, model: Any, optimizer: Any, steps: range) -> list[float]:
    return [float(compiled(model, optimizer, *batch(number))) for number in steps]


def equal(state: dict[str, Tensor], path: Path) -> bool:
    wanted = torch.load(path)
    return state.keys() == wanted.keys() and all(
        torch.equal(state[name], tensor) for name, tensor in wanted.items()
    )


def saves() -> Report:
    """Two steps, an asynchronous save, two more; the same state through torch's own writer."""
    compiled, model, optimizer = started(RANKS)
    losses(compiled, model, optimizer, range(2))
    state = compiled.state_dict()
    if RANK == 0:
        torch.save(state, FOLDER / "state.pt")
    compiled.save(FOLDER / "weft", 2, asynchronous=True, extra={"note": "two"})
    dcp.save(
        {"model": compiled.model_state_dict(dtensor=True),
         "optim": compiled.optimizer_state_dict(dtensor=True)},
        checkpoint_id=FOLDER / "dcp",
    )  # fmt: skip
    compiled.save_pretrained(FOLDER / "hf")
    rest = losses(compiled, model, optimizer, range(2, 4))
    compiled.wait()
    written = sum(p.stat().st_size for p in (FOLDER / "weft").glob("step-*/part-*"))
    needed = sum(t.numel() * t.element_size() for t in state.values())
    return {"losses": rest, "written": written, "needed": needed}


def resumes() -> Report:
    """Another plan on another number of ranks goes on, asked before its first call."""
    compiled, model, optimizer = started(10 + RANKS)
    torch.manual_seed(1234)  # the checkpoint knows where the stream was
    start = compiled.resume(FOLDER / "weft")
    rest = losses(compiled, model, optimizer, range(start, start + 2))
    compiled.load(FOLDER / "weft")
    same = equal(compiled.state_dict(), FOLDER / "state.pt")
    return {"start": start, "losses": rest, "same": same, "note": compiled.extra["note"],
            "read": compiled.bytes_read}  # fmt: skip


def loads_dcp() -> Report:
    """Torch's own files that a plan wrote, into another plan, in torch's and in weft's way."""
    compiled, model, optimizer = started(20 + RANKS)
    losses(compiled, model, optimizer, range(1))
    compiled.load(FOLDER / "dcp")
    directly = equal(compiled.state_dict(), FOLDER / "state.pt")
    losses(compiled, model, optimizer, range(1))
    state = {"model": compiled.model_state_dict(dtensor=True),
             "optim": compiled.optimizer_state_dict(dtensor=True)}  # fmt: skip
    dcp.load(state, checkpoint_id=FOLDER / "dcp")
    compiled.load_model_state_dict(state["model"])
    compiled.load_optimizer_state_dict(state["optim"])
    return {"directly": directly, "dicts": equal(compiled.state_dict(), FOLDER / "state.pt")}


def fsdp_saves() -> Report:
    """An FSDP2 program without weft: two steps, torch's own save, two more."""
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo")
    model = net(0.0)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for number in range(2):
        step(model, optimizer, *batch(number))
    state = {"model": get_model_state_dict(model),
             "optim": get_optimizer_state_dict(model, optimizer)}  # fmt: skip
    dcp.save(state, checkpoint_id=FOLDER / "fsdp")
    rest = [float(step(model, optimizer, *batch(number)).detach()) for number in range(2, 4)]
    return {"losses": rest}


def loads_fsdp() -> Report:
    """A plan goes on where the FSDP2 program was."""
    compiled, model, optimizer = started(30 + RANKS, dropout=0.0)
    start = compiled.resume(FOLDER / "fsdp")
    return {"start": start, "losses": losses(compiled, model, optimizer, range(start, start + 2))}


def fsdp_loads() -> Report:
    """An FSDP2 program takes what a plan wrote."""
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo")
    model = net(0.5)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    state = {"model": get_model_state_dict(model),
             "optim": get_optimizer_state_dict(model, optimizer)}  # fmt: skip
    dcp.load(state, checkpoint_id=FOLDER / "dcp")
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optim"])
    wanted = torch.load(FOLDER / "state.pt")
    held = {n: p.full_tensor() for n, p in model.named_parameters()}
    moments = {
        f"{kind}/{name}": kept[kind].full_tensor()
        for name, kept in get_optimizer_state_dict(model, optimizer)["state"].items()
        for kind in ("exp_avg", "exp_avg_sq")
    }
    found = {**held, **moments}
    return {"differ": max(differ(found[n], wanted[n]) for n in found), "tensors": len(found)}


def evaluates() -> Report:
    """A compiled evaluation sees the weights of the compiled step, sharded or not."""
    compiled, model, optimizer = started(40 + RANKS, dropout=0.0)
    other = net(0.0)
    plain = torch.optim.AdamW(other.parameters(), lr=0.01)
    evaluation = weft.compile(lambda model, x: model(x).softmax(-1))
    worst = 0.0
    for number in range(3):
        worst = max(worst, differ(compiled(model, optimizer, *batch(number)),
                                  step(other, plain, *batch(number))))  # fmt: skip
        model.eval(), other.eval()
        with torch.no_grad():
            x, _ = batch(9)
            worst = max(worst, differ(evaluation(model, x), other(x).softmax(-1)))
        model.train(), other.train()
    with torch.no_grad():  # and the step sees what is written into the model
        model.first.weight.mul_(0.5)
        other.first.weight.mul_(0.5)
    worst = max(worst, differ(compiled(model, optimizer, *batch(5)), step(other, plain, *batch(5))))
    return {"differ": worst}


TASKS = {task.__name__: task for task in (
    saves, resumes, loads_dcp, fsdp_saves, loads_fsdp, fsdp_loads, evaluates,
)}  # fmt: skip

if __name__ == "__main__":
    report_of(TASKS, *sys.argv[1:])
    # who began the group ends it: gloo's threads may not outlive the interpreter
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
