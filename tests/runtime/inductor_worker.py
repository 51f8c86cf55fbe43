"""What the ranks of test_inductor.py run: `inductor_worker.py OUT` writes OUT.<rank>."""

from __future__ import annotations

import os
import sys

import torch
from torch import Tensor, nn

import weft
from weft.runtime.segments import Segment


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> Tensor:
    loss: Tensor = (model(x) - x).square().mean()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    optimizer.zero_grad()
    return loss


def losses(run: object) -> tuple[list[float], nn.Module]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16, bias=False), nn.BatchNorm1d(16), nn.SiLU(), nn.Linear(16, 8))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    data = torch.Generator().manual_seed(1)
    batches = [torch.randn(7, 8, generator=data) for _ in range(3)]  # an uneven split
    assert callable(run)
    return [float(run(model, optimizer, x).detach()) for x in batches], model


def main() -> None:
    torch.set_num_threads(1)
    compiled = weft.compile(step, mesh="2", cpu_backend="inductor")
    ours, _ = losses(compiled)
    eager, model = losses(step)
    state = compiled.state_dict()
    entry = next(iter(compiled.step.compiler.entries.values()))
    pieces = entry.running.executor.wrapper.sections[0].pieces
    torch.save({
        "ours": [torch.tensor(ours), *(state[name] for name in model.state_dict() if name in state)],
        "eager": [torch.tensor(eager), *(t for n, t in model.state_dict().items() if n in state)],
        "compiled": sum(isinstance(piece, Segment) for piece in pieces),
    }, f"{sys.argv[1]}.{os.environ['RANK']}")  # fmt: skip


if __name__ == "__main__":
    main()
