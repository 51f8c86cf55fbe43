"""Writing an artifact folder, all of it or nothing.

Everything is written into a temporary folder beside the target and moved into place at the end, so
that an interrupted compile leaves either the old artifact or none.
"""

from __future__ import annotations

import fcntl
import gzip
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from ..ir.errors import CompileError
from ..runtime.artifact import FORMAT, PLAN, content_hash, file_hash, plan_hash


def check_target(target: Path) -> None:
    """Raise CompileError W1001 where an artifact cannot go, before any work is spent on it."""
    try:
        if target.exists() and not target.is_dir():
            raise CompileError(
                "W1001", f"{target} exists and is not a folder", hint="choose another -o"
            )
        if target.is_dir() and any(target.iterdir()) and not (target / PLAN).is_file():
            raise CompileError(
                "W1001",
                f"{target} exists and is not an artifact; it would be overwritten",
                hint="choose another -o, or remove the folder",
            )
        nearest = next(p for p in target.absolute().parents if p.exists())
    except (OSError, ValueError) as error:  # no file can have such a name, or it cannot be looked at
        raise _unwritable(Path(str(target)[:80]), error) from None
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise _unwritable(target, f"{nearest} is not a folder that can be written")


def _unwritable(target: Path, why: object) -> CompileError:
    return CompileError(
        "W1001", f"the artifact {target} cannot be written; nothing was left behind",
        reason=str(why), hint="choose another -o, with space for the model's weights",
    )  # fmt: skip


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other jobs from moving artifacts into a folder meanwhile; leaves no file behind."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _plan_of(target: Path) -> bytes | None:
    """The manifest of an artifact, by which another one is told from it."""
    try:
        return (target / PLAN).read_bytes()
    except FileNotFoundError:
        return None


class ArtifactWriter:
    """Collects files in a temporary folder; `commit` moves them to the target at once.

    Use as a context manager: leaving it without `commit` removes what was written. Raises
    CompileError W1001 where it cannot be written, or another job wrote another artifact meanwhile.
    """

    def __init__(self, target: str | Path) -> None:
        self.target = Path(target)
        try:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            with _alone(self.target.parent):
                check_target(self.target)
                self._found = _plan_of(self.target)
                prefix = f".{self.target.name}."
                self.folder = Path(tempfile.mkdtemp(prefix=prefix, dir=self.target.parent))
        except (OSError, ValueError) as error:
            raise _unwritable(Path(str(self.target)[:80]), error) from None

    def __enter__(self) -> ArtifactWriter:
        return self

    def __exit__(self, kind: object, error: BaseException | None, frames: object) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        if isinstance(error, (OSError, SafetensorError)):
            raise _unwritable(self.target, error) from error

    def text(self, name: str, text: str) -> None:
        """Write a text file."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")

    def gzipped(self, name: str, text: str) -> None:
        """Write a compressed text file; the same text gives the same bytes."""
        path = self.folder / name
        with path.open("wb") as raw, gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as stream:
            stream.write(text.encode())

    def tensors(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write tensors as safetensors, shared storage written out once per name."""
        plain = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
        path = self.folder / f"{name}.safetensors"
        save_file(plain, path)
        path.chmod(0o644)  # safetensors makes it private, the other files are not

    def commit(self, info: Mapping[str, Any]) -> None:
        """Write plan.json with the hashes of all files, and move the folder into place."""
        files = {
            str(path.relative_to(self.folder)): file_hash(path)
            for path in sorted(self.folder.rglob("*"))
            if path.is_file()
        }
        full = {"format": FORMAT, **info, "files": files, "content_hash": content_hash(files)}
        full["plan_hash"] = plan_hash(json.loads(json.dumps(full)))
        self.text(PLAN, json.dumps(full, indent=1) + "\n")
        os.chmod(self.folder, 0o755)  # mkdtemp makes it private
        with _alone(self.target.parent):
            there = _plan_of(self.target)
            if there in (self._found, None):
                check_target(self.target)
                self._swap()
            elif full["content_hash"].encode() not in there:
                raise CompileError(
                    "W1001", f"another job wrote to {self.target} while this one compiled",
                    reason="its artifact is another one, and is kept",
                    hint="give each job an -o of its own, or compile again",
                )  # fmt: skip

    def _swap(self) -> None:
        """Put the folder in the place of the target."""
        if not self.target.exists():
            self.folder.rename(self.target)
            return
        old = self.folder.with_name(self.folder.name + ".old")
        self.target.rename(old)
        try:
            self.folder.rename(self.target)
        except OSError:
            old.rename(self.target)
            raise
        shutil.rmtree(old)
