"""The command line. Each command is one call into the library; the tables are rich's."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, NoReturn

import click
from rich.console import Console
from rich.table import Table

from ..ir.errors import RunError, WeftError
from ..ir.parser import parse_module
from ..ir.text import print_module
from ..passes.manager import PassManager
from ..passes.pipeline import parse_pipeline
from ..runtime.artifact import Artifact
from . import cli_inspect, cli_simulate
from .api import plan_target
from .artifact import check_target
from .doctor import diagnose
from .driver import ALL_PASSES
from .load_target import load_target
from .logs import configure
from .options import OPTIONS
from .run import Saving, run_artifact
from .verify import TOLERANCE, verify_dumps

console = Console(highlight=False)
_FOLDER = click.Path(path_type=Path)
_SEED = click.IntRange(0, 2**62)


def _diagnosed(command: Callable[..., Any]) -> Callable[..., Any]:
    """Print a diagnostic instead of a traceback; exit with 2. Other exceptions keep theirs."""

    @wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except WeftError as error:
            fail(error)

    return wrapped


def fail(error: WeftError) -> NoReturn:
    """Print a diagnostic on standard error, with all frames if they are asked for, and exit."""
    if OPTIONS.full_tracebacks:
        traceback.print_exception(error)
    Console(stderr=True, highlight=False).print(error.render(), markup=False, soft_wrap=True)
    sys.exit(2)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="weft")
@_diagnosed
def main() -> None:
    """Weave a one-device PyTorch program across a cluster.

    \b
    weft compile pkg.mod:factory --cluster 2x8:h100 --train adamw -o out/
    weft run out/         weft inspect out/         weft verify out/
    """
    configure(OPTIONS.logs)


@main.command("compile")
@click.argument("target")
@click.option("--cluster", default="", help="HOSTSxDEVICES:KIND, or a TOML file. Default: one cpu.")
@click.option(
    "--train", default="", help="Build the train step with this optimizer: adamw, adam, sgd."
)
@click.option("-o", "--output", type=_FOLDER, default=Path("out"), help="Artifact folder.")
@click.option("--mesh", default="", help="Use this mesh, e.g. 2x2, instead of searching for one.")
@click.option("--no-verify-each", is_flag=True, help="Skip the verifier after each pass.")
@_diagnosed
def compile_command(
    target: str, cluster: str, train: str, output: Path, mesh: str, no_verify_each: bool
) -> None:
    """Plan TARGET (module:factory) ahead of time and write an artifact; no device is needed.

    The factory takes no arguments and returns (program, args, kwargs): a module or a train-step
    function `(model, optimizer, *batch) -> loss`, and its example inputs.
    """
    options = OPTIONS.with_({"verify_each": OPTIONS.verify_each and not no_verify_each})
    check_target(output)
    plan = plan_target(
        load_target(target), cluster=cluster or "1x1:cpu", train=train, mesh=mesh, options=options
    )
    plan.save(output)
    console.print(plan.summary(), markup=False)
    console.print(f"artifact  {output}")


@main.command()
@click.argument("folder", type=_FOLDER)
@click.option("--steps", default=5, show_default=True, help="Number of steps.")
@click.option("--lr", type=float, default=None, help="Learning rate; default: that of the example.")
@click.option("--seed", type=_SEED, default=0, show_default=True, help="Seed of random numbers.")
@click.option(
    "--trace", type=_FOLDER, default=None, help="Write a Perfetto trace of the last step."
)
@click.option("--save", type=_FOLDER, default=None, help="Write checkpoints into this folder.")
@click.option("--save-every", type=click.IntRange(min=1), default=1, show_default=True,
              help="Steps between two checkpoints.")  # fmt: skip
@click.option("--resume", is_flag=True, help="Continue from the latest checkpoint of --save, if any.")
@click.option("--async-save", is_flag=True, help="Write checkpoints while the next steps run.")
@click.option("--curve", type=_FOLDER, default=None, metavar="FILE",
              help="Write the scalar results of each step into this file, as lines of JSON.")  # fmt: skip
@_diagnosed
def run(
    folder: Path, steps: int, lr: float | None, seed: int, trace: Path | None, save: Path | None,
    save_every: int, resume: bool, async_save: bool, curve: Path | None,
) -> None:  # fmt: skip
    """Run an artifact on its example inputs, under torchrun or starting the processes itself."""
    if save is None and (resume or async_save):
        raise RunError("W1001", "--resume and --async-save need --save DIR")
    artifact = Artifact.open(folder)
    run_artifact(artifact, steps=steps, lr=lr, seed=seed, trace=trace, console=console,
                 saving=Saving(save, save_every, resume, async_save, curve))  # fmt: skip


@main.command()
@click.argument("folder", type=_FOLDER)
@click.option("--seed", type=_SEED, default=0, show_default=True, help="Seed of the random inputs.")
@_diagnosed
def verify(folder: Path, seed: int) -> None:
    """Run every dump on the same inputs in one process and compare; exit 0 only if all agree."""
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


@main.command()
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option(
    "--pass", "passes", multiple=True, metavar="NAME[opt=value]", help="Run a pass; repeat."
)
@click.option(
    "--pipeline", default="", help="A whole pipeline, as the first line of a dump has it."
)
@click.option(
    "--verify-each/--no-verify-each", default=True, help="Check the rules after each pass."
)
@click.option("--print-after", multiple=True, metavar="NAME", help="Print the module after a pass.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), default=None, help="Default: stdout."
)
@click.option("--list", is_flag=True, is_eager=True,
    expose_value=False, help="List the passes.",
              callback=lambda context, _, value: _list_passes(context) if value else None)  # fmt: skip
@_diagnosed
def opt(
    file: Path,
    passes: tuple[str, ...],
    pipeline: str,
    verify_each: bool,
    print_after: tuple[str, ...],
    output: Path | None,
) -> None:
    """Run passes on a dump by hand.

    Without --pass, the pipeline in the first line of FILE runs (`// weft opt: simplify,lower`), as
    reproducers have it.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RunError("W1001", f"{file} cannot be read", reason=str(error)) from None
    spec = ",".join(passes) or pipeline
    first = text.splitlines()[0] if text else ""
    if not spec and first.startswith("// weft opt:"):
        spec = first.removeprefix("// weft opt:").strip()
    manager = PassManager(parse_pipeline(spec, ALL_PASSES), verify_each=verify_each, print_after=print_after)
    result = print_module(manager.run(parse_module(text, str(file))))
    if output is None:
        click.echo(result, nl=False)
        return
    temporary = output.with_name(output.name + ".tmp")
    temporary.write_text(result, encoding="utf-8")
    os.replace(temporary, output)


def _list_passes(context: click.Context) -> NoReturn:
    table = Table("pass", "summary", "levels")
    for name, cls in ALL_PASSES.items():
        table.add_row(name, cls.summary, ", ".join(cls.levels))
    console.print(table)
    context.exit()


@main.command()
@_diagnosed
def doctor() -> None:
    """Say what this installation can do, and what is missing."""
    table = Table("", "", "", "")
    table.show_header = False
    for finding in diagnose(OPTIONS):
        mark = "ok" if finding.works else "-"
        table.add_row(mark, finding.what, finding.detail, finding.hint)
    console.print(table)


main.add_command(cli_inspect.inspect)
main.add_command(cli_simulate.simulate_command)

__all__ = ["main"]
