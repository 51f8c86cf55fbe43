"""Reading an artifact folder: versions, hashes, levels. A machine that only runs plans needs no more.

Nothing is executed and nothing is unpickled while an artifact is read.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from ..ir.errors import RunError
from ..ir.module import Module
from ..ir.parser import parse_module

#: raised when the layout of the folder or the meaning of a file changes
FORMAT = 1
PLAN = "plan.json"


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        for block in iter(lambda: stream.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def content_hash(files: dict[str, str]) -> str:
    """One hash for a set of files: of their sorted names and hashes."""
    text = "\n".join(f"{files[name]}  {name}" for name in sorted(files))
    return hashlib.sha256(text.encode()).hexdigest()


def plan_hash(info: dict[str, Any]) -> str:
    """Hash of everything in plan.json but the hash itself: a flipped digit there shows too."""
    rest = {key: value for key, value in info.items() if key != "plan_hash"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Artifact:
    """A verified artifact folder.

    Attributes:
        path: the folder.
        info: the content of plan.json.
    """

    path: Path
    info: dict[str, Any]

    @staticmethod
    def open(path: str | Path) -> Artifact:
        """Open and verify a folder. Raises RunError W0701 or W0702."""
        folder = Path(path)
        plan = folder / PLAN
        if not plan.is_file():
            raise RunError(
                "W0701",
                f"{folder} is not an artifact folder",
                reason=f"it holds no {PLAN}",
                hint="write one with `weft compile module:factory -o DIR`",
            )
        try:
            info = json.loads(plan.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise RunError(
                "W0701", f"{plan} cannot be read", reason=str(error), hint=_AGAIN
            ) from None
        if not isinstance(info, dict) or "format" not in info:
            raise RunError("W0701", f"{plan} is not a plan", reason="no `format`", hint=_AGAIN)
        if info["format"] != FORMAT:
            raise RunError(
                "W0702",
                f"{folder} has artifact format {info['format']}, this weft reads {FORMAT}",
                reason=f"it was written by weft {info.get('weft', '?')}",
                hint="compile it again with this version, or run it with the one that wrote it",
            )
        if info.get("plan_hash") != plan_hash(info):
            raise RunError("W0701", f"{plan} was modified", reason="its hash differs", hint=_AGAIN)
        artifact = Artifact(folder, info)
        artifact._check_files()
        return artifact

    def _check_files(self) -> None:
        for name, expected in self.info["files"].items():
            path = self.path / name
            if not path.is_file():
                raise RunError("W0701", f"{path} is missing", hint=_AGAIN)
            if file_hash(path) != expected:
                raise RunError(
                    "W0701",
                    f"{path} was modified or truncated",
                    reason=f"its SHA-256 is not {expected[:16]}... of {PLAN}",
                    hint=_AGAIN,
                )

    @property
    def dumps(self) -> list[Path]:
        """The dumps of all passes, in order."""
        return [self.path / name for name in self.info["dumps"]]

    def module(self, dump: str | Path | None = None) -> Module:
        """The module of one dump; the last one, the schedule, by default."""
        path = Path(dump) if dump is not None else self.dumps[-1]
        return parse_module(path.read_text(encoding="utf-8"), str(path))

    def tensors(self, name: str) -> dict[str, Any]:
        """The tensors of `weights` or `inputs` by name; empty when the artifact holds none."""
        path = self.path / f"{name}.safetensors"
        if not path.is_file():
            return {}
        return dict(load_file(path))


_AGAIN = "copy the folder again, or compile again"
