"""The curve of a run: the scalar results of each step, exactly, in a file that survives a kill."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from torch import Tensor

from ..ir.errors import RunError


class Curve:
    """The scalar results of each step on the disk, exactly: a line of JSON for each step.

    A line is written before the step's checkpoint is, so that a checkpoint never lacks its curve;
    what a killed run wrote after its last checkpoint is cut off when the run is resumed.

    Raises RunError W1001 when the file cannot be written.
    """

    def __init__(self, path: Path, start: int) -> None:
        self.path = path
        kept = read_curve(path) if start else {}
        lines = [_curve_line(step, values) for step, values in kept.items() if step < start]
        temporary = path.parent / f"{path.name}.tmp"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text("".join(lines), encoding="utf-8")
            os.replace(temporary, path)
            self._stream = path.open("a", encoding="utf-8")
        except OSError as error:
            with suppress(OSError):
                temporary.unlink()
            raise self._unwritable(error) from None

    def add(self, step: int, results: Sequence[Tensor]) -> None:
        """Append a step."""
        values = [float(result) for result in results if result.numel() == 1]
        try:
            self._stream.write(_curve_line(step, values))
            self._stream.flush()
        except OSError as error:
            raise self._unwritable(error) from None

    def _unwritable(self, error: OSError) -> RunError:
        return RunError(
            "W1001", f"the curve cannot be written to {self.path}",
            reason=str(error.strerror or error), hint="make room, or choose another --curve",
        )  # fmt: skip


def _curve_line(step: int, values: Sequence[float]) -> str:
    return json.dumps({"step": step, "results": list(values)}) + "\n"


def read_curve(path: Path) -> dict[int, list[float]]:
    """Step -> scalar results of a file of `--curve`; a last line that was cut off is left out.

    Raises RunError W1001 for a file that is something else.
    """
    if not path.exists():
        return {}
    out: dict[int, list[float]] = {}
    try:
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            if line.endswith("\n"):
                row = json.loads(line)
                out[int(row["step"])] = [float(value) for value in row["results"]]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise RunError(
            "W1001", f"{path} is not a curve of weft run", reason=str(error).splitlines()[0],
            hint="choose another --curve",
        ) from None  # fmt: skip
    return out


__all__ = ["Curve", "read_curve"]
