"""Reading an artifact folder: versions, hashes, levels. A machine that only runs plans needs no more.

Nothing is executed and nothing is unpickled while an artifact is read.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError

from ..ir.errors import RunError
from ..ir.module import Module
from ..ir.parser import parse_module
from ..ir.verify import verify

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
        """Open and verify a folder. Raises RunError W0701 or W0702, W1001 for what is no path."""
        if not isinstance(path, (str, os.PathLike)) or "\0" in str(path):
            raise RunError(
                "W1001", "the artifact must be the path of a folder",
                reason=f"it is of type {type(path).__name__}", hint='for example "out"',
            )  # fmt: skip
        folder = Path(path)
        plan = folder / PLAN
        if not _is_file(plan):
            raise RunError(
                "W0701",
                f"{folder} is not an artifact folder",
                reason=f"it holds no {PLAN}",
                hint="write one with `weft compile module:factory -o DIR`",
            )
        try:
            info = json.loads(plan.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise RunError(
                "W0701", f"{plan} cannot be read", reason=str(error)[:200], hint=_AGAIN
            ) from None
        if not isinstance(info, dict) or "format" not in info:
            raise RunError("W0701", f"{plan} is not a plan", reason="no `format`", hint=_AGAIN)
        if info["format"] != FORMAT:
            raise RunError(
                "W0702",
                f"{folder} has artifact format {str(info['format'])[:20]}, this weft reads {FORMAT}",
                reason=f"it was written by weft {str(info.get('weft', '?'))[:40]}",
                hint="compile it again with this version, or run it with the one that wrote it",
            )
        try:
            changed = info.get("plan_hash") != plan_hash(info)
        except RecursionError:  # written with fewer frames on the stack than it is read with
            changed = True
        if changed:
            raise RunError("W0701", f"{plan} was modified", reason="its hash differs", hint=_AGAIN)
        _check_fields(plan, info)
        artifact = Artifact(folder, info)
        artifact._check_files()
        return artifact

    def _check_files(self) -> None:
        for name, expected in self.info["files"].items():
            path = self.path / name
            if not _is_file(path):
                raise RunError("W0701", f"{path} is missing", reason=f"{PLAN} lists it", hint=_AGAIN)
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
        """The module of one dump; the last one, the schedule, by default.

        Raises RunError W0701 where it cannot be read, CompileError where it is no valid program.
        """
        path = Path(dump) if dump is not None else self.dumps[-1]
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RunError("W0701", f"{path} cannot be read", reason=str(error), hint=_AGAIN) from None
        module = parse_module(text, str(path))
        if not module.functions:
            raise RunError("W0701", f"{path} holds no program", reason="no function", hint=_AGAIN)
        verify(module)
        return module

    def schedules(self) -> list[Module]:
        """The schedules that ranks run: one, or one for each pipeline stage."""
        last = self.module()
        stages = last.attrs.get("stages", 1)
        if not isinstance(stages, int) or not 1 <= stages <= len(self.dumps):
            raise RunError("W0701", f"{self.dumps[-1]} is one of {stages!r} stages",
                           reason="the others are not there", hint=_AGAIN)  # fmt: skip
        return [*(self.module(dump) for dump in self.dumps[-stages:-1]), last]

    def tensors(self, name: str) -> dict[str, Any]:
        """The tensors of `weights` or `inputs` by name; empty when the artifact holds none."""
        from safetensors.torch import load_file  # torch takes a second, and looking needs none

        path = self.path / f"{name}.safetensors"
        if path.name not in self.info["files"]:
            return {}
        try:
            return dict(load_file(path))
        except (OSError, SafetensorError, ValueError, LookupError) as error:
            raise RunError(
                "W0701", f"{path} does not hold tensors", reason=str(error)[:200], hint=_AGAIN
            ) from None


_AGAIN = "copy the folder again, or compile again"
#: field of plan.json -> its type
_FIELDS: dict[str, type | tuple[type, ...]] = {
    "weft": str, "torch": str, "target": str, "cluster": str, "mesh": str, "ranks": int,
    "predicted": dict, "dumps": list, "made_by": list, "meta": dict, "files": dict,
}  # fmt: skip
_PREDICTED = ("step_us", "memory_bytes")


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that is too long or that no file can have
        return False


def _check_fields(plan: Path, info: dict[str, Any]) -> None:
    """Raise RunError W0701 where a field is missing, of another type, or names a file outside."""

    def wrong(what: str) -> RunError:
        return RunError("W0701", f"{plan} is not a plan", reason=what, hint=_AGAIN)

    for name, kind in _FIELDS.items():
        if not isinstance(info.get(name), kind) or isinstance(info[name], bool):
            raise wrong(f"{name!r} is missing or of another type")
    if not info["dumps"] or len(info["dumps"]) != len(info["made_by"]):
        raise wrong("each dump needs the pass that made it")
    texts = [*info["dumps"], *info["made_by"], *info["files"].values()]
    if not all(isinstance(text, str) for text in texts):
        raise wrong("names and hashes must be texts")
    for name in info["files"]:
        parts = PurePosixPath(name).parts
        if name.startswith("/") or ".." in parts or not parts or "\0" in name:
            raise wrong(f"{name[:80]!r} is not a file of the folder")
    for name in info["dumps"]:
        if name not in info["files"]:
            raise wrong(f"the dump {name[:80]!r} is not among its files")
    if not all(isinstance(info["predicted"].get(k), (int, float)) for k in _PREDICTED):
        raise wrong("the prediction has no time or memory")
