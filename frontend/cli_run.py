"""`weft run`: an artifact on its example inputs."""

from __future__ import annotations

from pathlib import Path

import click

from ..ir.errors import RunError
from ..runtime.artifact import Artifact
from .cli_common import FOLDER, SEED, console, diagnosed


@click.command()
@click.argument("folder", type=FOLDER)
@click.option("--steps", default=5, show_default=True, help="Number of steps.")
@click.option("--lr", type=float, default=None, help="Learning rate; default: that of the example.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Seed of random numbers.")
@click.option(
    "--trace", type=FOLDER, default=None, help="Write a Perfetto trace of the last step."
)
@click.option("--save", type=FOLDER, default=None, help="Write checkpoints into this folder.")
@click.option("--save-every", type=click.IntRange(min=1), default=1, show_default=True,
              help="Steps between two checkpoints.")  # fmt: skip
@click.option("--resume", is_flag=True, help="Continue from the latest checkpoint of --save, if any.")
@click.option("--async-save", is_flag=True, help="Write checkpoints while the next steps run.")
@click.option("--curve", type=FOLDER, default=None, metavar="FILE",
              help="Write the scalar results of each step into this file, as lines of JSON.")  # fmt: skip
@diagnosed
def run(
    folder: Path, steps: int, lr: float | None, seed: int, trace: Path | None, save: Path | None,
    save_every: int, resume: bool, async_save: bool, curve: Path | None,
) -> None:  # fmt: skip
    """Run an artifact on its example inputs, under torchrun or starting the processes itself."""
    from .run import Saving, run_artifact  # torch takes seconds to load, help needs none

    if save is None and (resume or async_save):
        raise RunError("W1001", "--resume and --async-save need --save DIR")
    artifact = Artifact.open(folder)
    run_artifact(artifact, steps=steps, lr=lr, seed=seed, trace=trace, console=console,
                 saving=Saving(save, save_every, resume, async_save, curve))  # fmt: skip


__all__ = ["run"]
