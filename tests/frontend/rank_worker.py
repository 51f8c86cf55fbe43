"""What the ranks of test_compiled_ranks.py run: compiled programs against eager PyTorch.

`rank_worker.py OUT TASK ...`; each rank writes OUT.<rank>.json: for each task its numbers.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import weft
from weft.ir.errors import WeftError

RANKS = int(os.environ.get("WORLD_SIZE", "1"))
Report = dict[str, Any]


class Net(nn.Module):
    """Embedding, batch norm, dropout and a head that shares the embedding's weights."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.first, self.norm = nn.Linear(8, 12, bias=False), nn.BatchNorm1d(12)
        self.dropout = nn.Dropout(dropout)
        self.second = nn.Linear(12, 8)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.dropout(torch.tanh(self.norm(self.first(self.embedding(ids)))))
        out: Tensor = self.head(self.second(x))
        return out


def net(dropout: float = 0.0) -> Net:
    torch.manual_seed(0)
    return Net(dropout)


def batch(number: int) -> tuple[Tensor, Tensor]:
    """Seven rows: they divide by no world's size."""
    made = torch.Generator().manual_seed(number)
    return torch.randint(0, 20, (7,), generator=made), torch.randint(0, 20, (7,), generator=made)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Tensor:
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss


def random_plan(seed: int) -> str:
    """A pipeline whose placements nobody would choose."""
    mesh = "2x2" if RANKS == 4 else str(RANKS)
    place = f'random-place[seed={seed} mesh="{mesh}"]'
    return f"simplify,outline,differentiate,simplify,{place},lower,fuse,schedule"


#: the search decides, or nobody does
PLANS = {"searched": "", "random": random_plan(RANKS)}


def differ(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-3))


def train(dropout: float, pipeline: str, steps: int) -> tuple[Any, Any, Any, list[Tensor]]:
    model = net(dropout)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    compiled = weft.compile(step, pipeline=pipeline)
    torch.manual_seed(7)
    losses = [compiled(model, optimizer, *batch(number)) for number in range(steps)]
    return compiled, model, optimizer, losses


def steps() -> Report:
    """Losses, the whole state, and what `sync` writes into model and optimizer."""
    theirs = net()
    other = torch.optim.AdamW(theirs.parameters(), lr=0.01)
    wanted = [step(theirs, other, *batch(number)) for number in range(4)]
    report: Report = {}
    for name, pipeline in PLANS.items():
        compiled, model, optimizer, losses = train(0.0, pipeline, 4)
        state = compiled.state_dict()
        theirs_named = dict(theirs.named_parameters())
        held = [differ(state[key], value) for key, value in theirs_named.items()]
        compiled.sync()
        pairs = zip(model.state_dict().values(), theirs.state_dict().values(), strict=True)
        moments = [
            differ(optimizer.state[mine][key], value)
            for mine, (_, kept) in zip(model.parameters(), other.state.items(), strict=True)
            for key, value in kept.items()
        ]
        report[name] = {
            "loss": max(map(differ, losses, wanted)),
            "state_dict": max(held),
            "sync": max(differ(a, b) for a, b in pairs),
            "optimizer": max(moments),
            "ranks": compiled.plan.mesh.size,
        }
    return report


def dropout() -> Report:
    """The losses under dropout, which the test compares over plans and worlds."""
    return {name: [float(loss) for loss in train(0.5, pipeline, 3)[3]]
            for name, pipeline in PLANS.items()}  # fmt: skip


def module() -> Report:
    """A compiled instance inside a loop of the user's own, with gradients by autograd."""
    report: Report = {}
    for name, pipeline in PLANS.items():
        mine, theirs = net(), net()
        compiled = weft.compile(mine, pipeline=pipeline.replace("differentiate,simplify,", ""))
        x, y = batch(0)
        for model in (compiled, theirs):
            F.cross_entropy(model(x), y).backward()
        grads = zip(mine.parameters(), theirs.parameters(), strict=True)
        with torch.no_grad():
            plain = differ(compiled.eval()(x), theirs.eval()(x))
        report[name] = {
            "grad": max(differ(p.grad, q.grad) for p, q in grads),  # type: ignore[arg-type]
            "buffer": differ(mine.norm.running_mean, theirs.norm.running_mean),  # type: ignore[arg-type]
            "forward": plain,
        }
    return report


def class_and_function() -> Report:
    """A decorated class, a decorated function with nested inputs."""
    decorated = weft.compile(Net)
    torch.manual_seed(0)
    mine, theirs = decorated(), net()
    x, _ = batch(0)

    @weft.compile
    def function(pair: dict[str, Tensor], scale: float) -> dict[str, Any]:
        return {"sum": pair["a"] @ pair["b"] * scale, "twice": [pair["a"] * 2]}

    pair = {"a": torch.randn(5, 3), "b": torch.randn(3, 5)}
    made = function(pair, 2.0)
    return {
        "class": {"forward": differ(mine(x), theirs(x))},
        "function": {
            "sum": differ(made["sum"], pair["a"] @ pair["b"] * 2),
            "twice": differ(made["twice"][0], pair["a"] * 2),
        },
    }


def refused() -> Report:
    """A cluster that the world is not, told on every rank before anything waits."""
    compiled = weft.compile(net(), cluster="1x8:cpu")
    try:
        compiled(batch(0)[0])
    except WeftError as error:
        return {"error": str(error)}
    return {"error": ""}


TASKS: dict[str, Callable[[], Report]] = {
    task.__name__: task for task in (steps, dropout, module, class_and_function, refused)
}


def report_of(tasks: dict[str, Callable[[], Report]], out: str, *names: str) -> None:
    """Run tasks and write this rank's report."""
    reports = {name: tasks[name]() for name in names}
    rank = os.environ.get("RANK", "0")
    Path(f"{out}.{rank}.json").write_text(json.dumps(reports))


if __name__ == "__main__":
    report_of(TASKS, *sys.argv[1:])
