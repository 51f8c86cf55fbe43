"""`weft run`: an artifact on its example inputs."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from ..ir.errors import RunError
from ..runtime.artifact import Artifact
from ..runtime.executable import Executable, world_mismatch
from ..runtime.launch import launch
from ..runtime.stage_map import ranks_of
from .curve import Curve
from .describe import human_bytes
from .options import OPTIONS

log = logging.getLogger("weft.run")
#: no host has more devices, and each rank is a process
MOST_LOCAL_RANKS = 256


def under_torchrun() -> bool:
    """Did torchrun start this process?"""
    return "WORLD_SIZE" in os.environ and "RANK" in os.environ


@dataclass(frozen=True)
class Saving:
    """Checkpoints of a run.

    Attributes:
        folder: where they are; None for none.
        every: steps between two; there is one after the last step too.
        resume: continue from the latest one, if there is one.
        asynchronous: write them while the next steps run.
        curve: file of each step's scalar results; None for none.
    """

    folder: Path | None = None
    every: int = 1
    resume: bool = False
    asynchronous: bool = False
    curve: Path | None = None

    def flags(self) -> list[str]:
        """The flags of `weft run` that say the same."""
        flags = [] if self.curve is None else ["--curve", str(self.curve)]
        if self.folder is None:
            return flags
        flags += ["--save", str(self.folder), "--save-every", str(self.every)]
        flags += ["--resume"] if self.resume else []
        return flags + (["--async-save"] if self.asynchronous else [])


def run_artifact(
    artifact: Artifact,
    *,
    steps: int,
    lr: float | None,
    seed: int,
    trace: Path | None,
    console: Console,
    saving: Saving = Saving(),
) -> None:
    """Run steps and print their results on rank 0; start the ranks first where nobody has.

    Raises RunError W0801 for another world size, W0804 without example inputs, W11xx for
    checkpoints.
    """
    ranks = _ranks(artifact)
    if ranks > 1 and not under_torchrun():
        arguments = ["-m", "weft", "run", str(artifact.path), "--steps", str(steps)]
        arguments += ["--seed", str(seed)]
        arguments += [] if lr is None else ["--lr", str(lr)]
        arguments += [] if trace is None else ["--trace", str(trace)]
        log.info("starting %d ranks of %s", ranks, artifact.path)
        launch(arguments + saving.flags(), ranks)
        return
    if under_torchrun() and int(os.environ["WORLD_SIZE"]) != ranks:
        raise world_mismatch(artifact.path, ranks, int(os.environ["WORLD_SIZE"]))
    with Executable(
        artifact, check_finite=OPTIONS.trace_nan, cpu_backend=OPTIONS.cpu_backend
    ) as exe:
        _run(exe, steps, lr, seed, trace, console, saving)


def _ranks(artifact: Artifact) -> int:
    """Ranks of the plan, by its schedule. Raises RunError W0701 where the manifest has others."""
    ranks = ranks_of(artifact.schedules()).size
    if ranks != artifact.info["ranks"]:
        raise RunError(
            "W0701", f"{artifact.path} says {artifact.info['ranks']} ranks, its schedule has {ranks}",
            reason="plan.json and the last dump do not belong together",
            hint="copy the folder again, or compile again",
        )  # fmt: skip
    if ranks > MOST_LOCAL_RANKS and not under_torchrun():
        raise RunError(
            "W0801", f"{artifact.path} is a plan for {ranks} ranks, too many for one host",
            reason=f"weft run starts at most {MOST_LOCAL_RANKS}",
            hint=f"start it on every host: torchrun --nnodes ... -m weft run {artifact.path}",
        )  # fmt: skip
    return ranks


def _run(
    exe: Executable,
    steps: int,
    lr: float | None,
    seed: int,
    trace: Path | None,
    console: Console,
    saving: Saving,
) -> None:
    log.info("rank %d of %s", exe.rank, exe.artifact.info["mesh"])
    inputs = exe.example_inputs()
    if exe.program.map.inputs and not inputs:
        raise RunError(
            "W0804",
            f"{exe.artifact.path} holds no example inputs",
            reason="the program was traced without data",
            hint='load it with weft.load("...") and pass your own to step()',
        )
    start = _start(exe, saving, console)
    curve = Curve(saving.curve, start) if saving.curve is not None and exe.rank == 0 else None
    for step in range(start, steps):
        last = step == steps - 1
        if trace is not None and last:
            with _written(trace), exe.program.tracing(trace):
                results = exe.step(*inputs, lr=lr, seed=seed + step)
        else:
            results = exe.step(*inputs, lr=lr, seed=seed + step)
        log.debug("rank %d: step %d done", exe.rank, step)
        if curve is not None:
            curve.add(step, results)
        if exe.rank == 0:
            shown = ", ".join(
                f"{float(r):.6f}" if r.numel() == 1 else f"{list(r.shape)}" for r in results
            )
            console.print(f"step {step}  {shown}", markup=False)
            sys.stdout.flush()
        if saving.folder is not None and (last or (step + 1) % saving.every == 0):
            exe.save(saving.folder, step + 1, asynchronous=saving.asynchronous)
    memory = exe.program.memory()
    line = f"rank {exe.rank}: state {human_bytes(memory.state_bytes)}, "
    line += f"peak resident memory {human_bytes(memory.peak_bytes)}"
    console.print(line, markup=False)
    sys.stdout.flush()


@contextmanager
def _written(path: Path) -> Iterator[None]:
    """Raises RunError W1001 where the trace cannot be written."""
    try:
        yield
    except OSError as error:
        raise RunError(
            "W1001", f"the trace cannot be written to {path}",
            reason=str(error.strerror or error), hint="make room, or choose another --trace",
        ) from None  # fmt: skip


def _start(exe: Executable, saving: Saving, console: Console) -> int:
    """Load the latest checkpoint, or the artifact's weights; the number of steps taken."""
    if saving.resume and saving.folder is not None and exe.checkpoints.exists(saving.folder):
        start = exe.load(saving.folder)
        line = f"resumed after {start} steps from {saving.folder}"
    else:
        exe.load_weights()
        start, line = 0, f"no checkpoint in {saving.folder} yet: from the start"
    if saving.resume and exe.rank == 0:
        console.print(line, markup=False)
    return start
