"""One writer for a folder of checkpoints.

A lock of the kernel (flock) goes away with its process, however that ends, so a killed job never has
to be unlocked by hand.
"""

from __future__ import annotations

import fcntl
import os
import socket
import time
from pathlib import Path

from ..ir.errors import RunError

#: how long a job that is just ending may still hold the folder: torchrun's SIGTERM is quick
WAIT_S = 5.0


class FolderLock:
    """The right of this process to write to a folder; taken by `acquire`, kept until `release`."""

    def __init__(self, folder: Path, *, wait_s: float = WAIT_S) -> None:
        self.folder, self.wait_s = folder, wait_s
        self._handle: int | None = None

    @property
    def held(self) -> bool:
        """Does this process hold it?"""
        return self._handle is not None

    def acquire(self) -> None:
        """Take the lock, unless it is held already. Raises RunError W1106, OSError."""
        if self.held:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        deadline = time.monotonic() + self.wait_s
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    owner = os.pread(handle, 200, 0).decode(errors="replace").strip()
                    os.close(handle)
                    raise self._taken(owner) from None
                time.sleep(0.1)
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        self._handle = handle

    def _taken(self, owner: str) -> RunError:
        return RunError(
            "W1106", f"another job writes checkpoints to {self.folder}",
            reason=f"{owner or 'another process'} holds the folder",
            hint="give each job a folder of its own, or end the other one",
        )  # fmt: skip

    def release(self) -> None:
        """Give the lock back; nothing happens without it."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


__all__ = ["FolderLock"]
