"""What a step really allocates, and a step large enough for that to be told from the rest."""

from __future__ import annotations

import torch
from tests.runtime.schedules import TRAIN_STEP
from torch import Tensor

from weft.ir.module import Module
from weft.ir.parser import parse_module
from weft.runtime.executor import Executor


def large_step() -> tuple[Module, list[Tensor]]:
    """The train step on one rank, whose tensors outweigh everything else, and its inputs."""
    text = TRAIN_STEP.replace("dp=2, tp=2", "dp=1, tp=1")
    for old, new in (("5, 6", "500, 600"), ("7, 5", "700, 500"), ("7, 6", "700, 600")):
        text = text.replace(f"[{old}]", f"[{new}]")
    return parse_module(text), [torch.randn(700, 500), torch.tensor(0.1, dtype=torch.float64)]


def allocated(executor: Executor, inputs: list[Tensor]) -> int:
    """The largest number of bytes that one step has allocated at a time."""
    with torch.profiler.profile(profile_memory=True) as profile:
        executor.run(inputs)
    live = peak = 0
    for event in profile.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak
