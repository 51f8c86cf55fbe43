"""What the ranks of test_stages_ranks.py run: pipelines of several processes against eager PyTorch.

`stage_worker.py OUT TASK ...`; each rank writes OUT.<rank>.json: for each task its numbers.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from tests.frontend.rank_worker import RANKS, Report, differ, report_of
from torch import Tensor, nn
from torch.nn import functional as F

import weft


class Block(nn.Module):
    """A layer with a residual connection."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.norm, self.dropout = nn.LayerNorm(8), nn.Dropout(dropout)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.down(torch.tanh(self.up(self.norm(x)))))


class Net(nn.Module):
    """Four layers between an embedding and a head that shares its weights."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(4))
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)  # type: ignore[no-any-return]


def net(dropout: float = 0.0) -> tuple[Net, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Net(dropout)
    return model, torch.optim.AdamW(model.parameters(), lr=0.01)


def batch(number: int) -> tuple[Tensor, Tensor]:
    """Seven rows: micro-batches are uneven."""
    made = torch.Generator().manual_seed(number)
    return torch.randint(0, 20, (7, 5), generator=made), torch.randint(0, 20, (7, 5), generator=made)


def step(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor
) -> tuple[Tensor, Tensor]:
    optimizer.zero_grad()
    logits = model(x)
    loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss, logits


#: plans of this world: the options of `weft.compile`
PLANS: dict[str, dict[str, Any]] = {
    2: {"1f1b": {"stages": 2, "micro": 3}, "micro-batches alone": {"micro": 3}},
    4: {"gpipe": {"stages": 4, "micro": 2, "order": "gpipe"},
        "interleaved": {"stages": 2, "micro": 4, "order": "interleaved", "chunks": 2}},
    3: {"narrower": {"meshes": "2+1", "micro": 3}, "wider": {"meshes": "1+2", "micro": 2}},
}.get(RANKS, {})  # fmt: skip


def steps() -> Report:
    """Losses, outputs, the whole state, what `sync` writes, and a change of the model in between."""
    theirs, other = net()
    wanted = []
    for number in range(4):
        if number == 2:
            theirs.blocks[0].up.bias.data.fill_(0.5)
        wanted.append(step(theirs, other, *batch(number)))
    report: Report = {}
    for name, options in PLANS.items():
        model, optimizer = net()
        compiled = weft.compile(step, **options)
        results = []
        for number in range(4):
            if number == 2:
                with torch.no_grad():
                    model.blocks[0].up.bias.fill_(0.5)
            results.append(compiled(model, optimizer, *batch(number)))
        state = compiled.state_dict()
        held = max(differ(state[key], value) for key, value in theirs.named_parameters())
        compiled.update_model()
        behind = max(map(differ, model.parameters(), theirs.parameters()))
        compiled.sync()
        moments = [
            differ(optimizer.state[mine][key], value)
            for mine, (_, kept) in zip(model.parameters(), other.state.items(), strict=True)
            for key, value in kept.items()
        ]
        report[name] = {
            "loss": max(differ(a[0], b[0]) for a, b in zip(results, wanted, strict=True)),
            "logits": max(differ(a[1], b[1]) for a, b in zip(results, wanted, strict=True)),
            "state_dict": held, "update_model": behind, "optimizer": max(moments),
            "ranks": compiled.plan.ranks, "stages": len(compiled.plan.schedules),
        }  # fmt: skip
    return report


def dropout() -> Report:
    """Losses under dropout, which the test compares over plans and worlds."""
    report: Report = {}
    for name, options in [("whole", {}), ("1f1b", PLANS["1f1b"])]:
        model, optimizer = net(0.3)
        compiled = weft.compile(step, **options)
        torch.manual_seed(7)
        report[name] = [float(compiled(model, optimizer, *batch(n))[0]) for n in range(3)]
    return report


def resumed() -> Report:
    """Checkpoints go from one pipeline to another, and to a plan without stages."""
    folder = Path(os.environ["WEFT_TEST_FOLDER"])
    plans: list[dict[str, Any]] = list(PLANS.values()) if RANKS == 3 else [PLANS["1f1b"], {}]
    theirs, other = net()
    losses, wanted = [], []
    for number, options in enumerate(plans):
        model, optimizer = net()
        compiled = weft.compile(step, **options)
        start = compiled.resume(folder / "checkpoints")
        losses.append(float(compiled(model, optimizer, *batch(start))[0]))
        wanted.append(float(step(theirs, other, *batch(number))[0]))
        compiled.save(folder / "checkpoints", number + 1)
        compiled.close()
    return {"losses": losses, "wanted": wanted}


TASKS = {task.__name__: task for task in (steps, dropout, resumed)}

if __name__ == "__main__":
    report_of(TASKS, *sys.argv[1:])
