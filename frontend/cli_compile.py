"""`weft compile`: plan a program and write an artifact."""

from __future__ import annotations

from pathlib import Path

import click

from .cli_common import FOLDER, console, diagnosed
from .options import OPTIONS


@click.command("compile")
@click.argument("target")
@click.option("--cluster", default="", help="HOSTSxDEVICES:KIND, or a TOML file. Default: one cpu.")
@click.option(
    "--train", default="", help="Build the train step with this optimizer: adamw, adam, sgd."
)
@click.option("-o", "--output", type=FOLDER, default=Path("out"), help="Artifact folder.")
@click.option("--mesh", default="", help="Use this mesh, e.g. 2x2, instead of searching for one.")
@click.option("--stages", default=1, show_default=True, help="Pipeline stages.")
@click.option("--micro", default=1, show_default=True, help="Micro-batches that a batch is cut into.")
@click.option("--order", default="1f1b", show_default=True, help="1f1b, gpipe or interleaved.")
@click.option("--chunks", default=1, show_default=True, help="Parts of the program on each stage.")
@click.option("--meshes", default="", help="The mesh of each stage, e.g. 2x2+4.")
@click.option("--budget", default="", help="Search stages and micro-batches as well, so long: 10s.")
@click.option("--calibration", default="", help="File of `weft calibrate` to price plans with.")
@click.option("--device-file", default="", help="TOML file with a newer device's datasheet numbers.")
@click.option("--no-verify-each", is_flag=True, help="Skip the verifier after each pass.")
@diagnosed
def compile_command(
    target: str, cluster: str, train: str, output: Path, mesh: str, stages: int, micro: int,
    order: str, chunks: int, meshes: str, budget: str, calibration: str, device_file: str,
    no_verify_each: bool,
) -> None:
    """Plan TARGET (module:factory) ahead of time and write an artifact; no device is needed.

    The factory takes no arguments and returns (program, args, kwargs): a module or a train-step
    function `(model, optimizer, *batch) -> loss`, and its example inputs.
    """
    from .api import plan_target  # torch takes seconds to load, help needs none
    from .artifact import check_target
    from .load_target import load_target

    options = OPTIONS.with_({
        "verify_each": OPTIONS.verify_each and not no_verify_each,
        "calibration": calibration or OPTIONS.calibration,
        "stages": stages, "micro": micro, "order": order, "chunks": chunks,
        "meshes": meshes, "budget": budget,
    })  # fmt: skip
    if device_file:
        cluster = f"{cluster or '1x1:h100'}@{device_file}"
    check_target(output)
    plan = plan_target(
        load_target(target), cluster=cluster or "1x1:cpu", train=train, mesh=mesh, options=options
    )
    plan.save(output)
    console.print(plan.summary(), markup=False)
    console.print(f"artifact  {output}")


__all__ = ["compile_command"]
