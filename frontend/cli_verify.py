"""`weft verify`: every level on the same inputs."""

from __future__ import annotations

import sys
from pathlib import Path

import click
from rich.table import Table

from ..runtime.artifact import Artifact
from .cli_common import FOLDER, SEED, console, diagnosed


@click.command()
@click.argument("folder", type=FOLDER)
@click.option("--seed", type=SEED, default=0, show_default=True, help="Seed of the random inputs.")
@diagnosed
def verify(folder: Path, seed: int) -> None:
    """Run every dump on the same inputs in one process and compare; exit 0 only if all agree."""
    from .verify import TOLERANCE, verify_dumps  # torch takes seconds to load, help needs none

    artifact = Artifact.open(folder)
    given = {**artifact.tensors("weights"), **artifact.tensors("inputs")}
    dumps = [(path.stem, artifact.module(path)) for path in artifact.dumps]
    table = Table("dump", "level", "against", "largest relative error", "")
    worst, good = 0.0, True
    for check in verify_dumps(dumps, given, seed):
        worst, good = max(worst, check.error), good and check.holds
        error = f"{check.error:.1e}" if check.against else "reference"
        table.add_row(
            check.name, check.level, check.against, error, "ok" if check.holds else "FAILS"
        )
    console.print(table)
    console.print(f"largest relative error {worst:.1e} (float64, tolerance {TOLERANCE:.0e})")
    if not good:
        sys.exit(1)


__all__ = ["verify"]
