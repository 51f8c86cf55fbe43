"""`weft opt`: passes on a dump by hand."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

import click
from rich.table import Table

from ..ir.errors import RunError
from ..ir.parser import parse_module
from ..ir.text import print_module
from ..passes.manager import PassManager, write_whole
from ..passes.pipeline import parse_pipeline
from .cli_common import console, diagnosed
from .pass_table import ALL_PASSES


@click.command()
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
@diagnosed
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
    try:
        write_whole(output, result)
    except (OSError, ValueError) as error:
        raise RunError(
            "W1001", f"{output} cannot be written", reason=str(error),
            hint="make room, or choose another -o",
        ) from None  # fmt: skip


def _list_passes(context: click.Context) -> NoReturn:
    table = Table("pass", "summary", "levels")
    for name, cls in ALL_PASSES.items():
        table.add_row(name, cls.summary, ", ".join(cls.levels))
    console.print(table)
    context.exit()


__all__ = ["opt"]
