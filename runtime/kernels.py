"""Loading the kernels of an artifact: standalone Python files with a `launch` function each."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path

from ..ir.errors import RunError
from .wrapper import Kernel


def load_kernels(folder: str | Path) -> dict[str, Kernel]:
    """The kernels of a folder with a `manifest.json`, by name; those that fall back are left out.

    Only files whose hash is that of the manifest are run. Raises RunError W0701 for others.
    """
    folder = Path(folder)
    manifest = folder / "manifest.json"
    if not manifest.is_file():
        return {}
    found = {}
    for entry in json.loads(manifest.read_text(encoding="utf-8"))["kernels"]:
        if not entry["fallback"]:
            found[entry["name"]] = _load(folder / entry["source"], entry["source_sha256"])
    return found


def _load(path: Path, digest: str) -> Kernel:
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != digest:
        raise RunError(
            "W0701", f"{path} is missing or not what its manifest says",
            hint="compile again, or copy the artifact again",
        )  # fmt: skip
    spec = importlib.util.spec_from_file_location(f"weft_kernel_{digest[:16]}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    launch: Kernel = module.launch
    return launch
