"""`weft calibrate`: measure this machine for plans that run on it."""

from __future__ import annotations

from pathlib import Path

import click
import torch
from rich.console import Console
from rich.table import Table

from ..costmodel.calibration import MOST_SAMPLES
from ..costmodel.datasheet import read_device_file
from ..ir.errors import CompileError
from .calibrate import calibrate, store
from .cli_common import diagnosed

console = Console(highlight=False)


@click.command("calibrate")
@click.option(
    "--out", type=click.Path(path_type=Path), help="File to write. Default: in the cache."
)
@click.option("--device", default="", help="cpu or cuda. Default: cuda where there is one.")
@click.option("--samples", default=MOST_SAMPLES, type=click.IntRange(0, MOST_SAMPLES),
              help="Kernels to measure.")  # fmt: skip
@click.option(
    "--seconds", default=120.0, type=click.FloatRange(1, 3600), help="No kernel begins later."
)
@click.option(
    "--device-file", type=click.Path(path_type=Path), help="TOML file with datasheet numbers."
)
@diagnosed
def calibrate_command(
    out: Path | None, device: str, samples: int, seconds: float, device_file: Path | None
) -> None:
    """Measure this machine: rates, the cost of a launch, and at most 64 kernels; three minutes.

    Plans are priced with it by --calibration FILE, or by `1x4:cpu@FILE` as the cluster.
    """
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda") or (name == "cuda" and not torch.cuda.is_available()):
        raise CompileError(
            "W1001", f"--device {name} is not here", reason="it is cpu, or cuda on a machine with one",
            hint="weft doctor says what is here",
        )  # fmt: skip
    sheet = read_device_file(device_file) if device_file else None
    with console.status("measuring") as status:
        found = calibrate(torch.device(name), samples, seconds, status.update, sheet)
    path = store(found, out)
    table = Table("rate", "measured")
    for rate, value in found.rates.items():
        table.add_row(rate, f"{value:.3g}")
    console.print(table)
    console.print(f"{len(found.samples)} kernels of {found.kind} in {path}", soft_wrap=True)
