"""The manifest of a folder of kernels, and where an artifact keeps such folders. Without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..ir.errors import RunError

#: version of the layout of `manifest.json`
FORMAT = 2


def kernel_folder(path: Path, stages: int, stage: int) -> Path:
    """Where an artifact keeps the kernels of a stage."""
    return path / "kernels" / f"stage{stage}" if stages > 1 else path / "kernels"


def kernel_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder of kernels; one without kernels where there is none.

    Raises RunError W0702 for a folder of another version.
    """
    path = folder / "manifest.json"
    if not path.is_file():
        return {"kernels": []}
    manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if manifest.get("format") != FORMAT:
        raise RunError("W0702", f"{path} has format {manifest.get('format')}, this weft reads {FORMAT}",
                       hint="compile the plan again")  # fmt: skip
    return manifest
