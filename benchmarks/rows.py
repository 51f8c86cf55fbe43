"""What all benchmarks share: a measured row, its table for people, its JSON for programs."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.table import Table

Result = TypeVar("Result")


@dataclass(frozen=True)
class Row:
    """A measured figure, of which less is better.

    Attributes:
        unit: of `value` and `target`; empty for a ratio.
        target: the most that `value` may be; None where the figure only informs.
        reference: the peer or bound that it is compared with.
    """

    name: str
    value: float
    unit: str
    target: float | None = None
    reference: str = ""

    @property
    def holds(self) -> bool | None:
        """Is the target met? None without a target."""
        return None if self.target is None else bool(self.value <= self.target)

    def cells(self) -> tuple[str, ...]:
        """A line of the table."""
        target = "" if self.target is None else f"<= {self.target:.3g} {self.unit}"
        verdict = {None: "", True: "yes", False: "NO"}[self.holds]
        return self.name, f"{self.value:.3g} {self.unit}", target, verdict, self.reference


def arguments(doc: str | None, quick: str) -> argparse.ArgumentParser:
    """The options of every benchmark: `--quick` and `--json FILE`."""
    parser = argparse.ArgumentParser(description=(doc or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows as JSON")
    return parser


def show(rows: Sequence[Row]) -> None:
    """Print a table for people."""
    table = Table("measurement", "value", "target", "holds", "against")
    for row in rows:
        table.add_row(*row.cells())
    Console(width=130).print(table)


def finish(rows: Sequence[Row], file: Path | None) -> int:
    """Write the rows to a file, if one is asked for. Returns the exit status: 1 for a missed target."""
    if file is not None:
        found = [{**asdict(row), "holds": row.holds} for row in rows]
        file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return int(any(row.holds is False for row in rows))


def timed(run: Callable[[], Result]) -> tuple[float, Result]:
    """Seconds that a call takes on the clock, and what it returns."""
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result
