"""`weft run`: an artifact on its example inputs."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from rich.console import Console

from ..ir.errors import RunError
from ..runtime.artifact import Artifact
from ..runtime.executable import Executable, world_mismatch
from ..runtime.launch import launch
from .describe import human_bytes


def under_torchrun() -> bool:
    """Did torchrun start this process?"""
    return "WORLD_SIZE" in os.environ and "RANK" in os.environ


def run_artifact(
    artifact: Artifact,
    *,
    steps: int,
    lr: float | None,
    seed: int,
    trace: Path | None,
    console: Console,
) -> None:
    """Run steps and print their results on rank 0; start the ranks first where nobody has.

    Raises RunError W0801 for another world size, W0804 without example inputs.
    """
    ranks = int(artifact.info["ranks"])
    if ranks > 1 and not under_torchrun():
        arguments = ["-m", "weft", "run", str(artifact.path), "--steps", str(steps)]
        arguments += ["--seed", str(seed)]
        arguments += [] if lr is None else ["--lr", str(lr)]
        arguments += [] if trace is None else ["--trace", str(trace)]
        launch(arguments, ranks)
        return
    if under_torchrun() and int(os.environ["WORLD_SIZE"]) != ranks:
        raise world_mismatch(artifact.path, ranks, int(os.environ["WORLD_SIZE"]))
    with Executable(artifact) as exe:
        _run(exe, steps, lr, seed, trace, console)


def _run(
    exe: Executable, steps: int, lr: float | None, seed: int, trace: Path | None, console: Console
) -> None:
    inputs = exe.example_inputs()
    roles = [str(a.get("role", "")) for a in exe.artifact.module().entry.param_attrs]
    if "input" in roles and not inputs:
        raise RunError(
            "W0804",
            f"{exe.artifact.path} holds no example inputs",
            reason="the program was traced without data",
            hint='load it with weft.load("...") and pass your own to step()',
        )
    exe.load_weights()
    for step in range(steps):
        last = step == steps - 1
        if trace is not None and last:
            with exe.program.tracing(trace):
                results = exe.step(*inputs, lr=lr, seed=seed + step)
        else:
            results = exe.step(*inputs, lr=lr, seed=seed + step)
        if exe.rank == 0:
            shown = ", ".join(
                f"{float(r):.6f}" if r.numel() == 1 else f"{list(r.shape)}" for r in results
            )
            console.print(f"step {step}  {shown}", markup=False)
    memory = exe.program.memory()
    line = f"rank {exe.rank}: state {human_bytes(memory.state_bytes)}, "
    line += f"peak resident memory {human_bytes(memory.peak_bytes)}"
    console.print(line, markup=False)
    sys.stdout.flush()
