"""`weft doctor`: what this installation can do."""

from __future__ import annotations

import click
from rich.table import Table

from .cli_common import console, diagnosed
from .options import OPTIONS


@click.command()
@diagnosed
def doctor() -> None:
    """Say what this installation can do, and what is missing."""
    from .doctor import diagnose  # torch takes seconds to load, help needs none

    table = Table("", "", "", "")
    table.show_header = False
    for finding in diagnose(OPTIONS):
        mark = "ok" if finding.works else "-"
        table.add_row(mark, finding.what, finding.detail, finding.hint)
    console.print(table)


__all__ = ["doctor"]
