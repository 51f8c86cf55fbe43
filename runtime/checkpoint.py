"""Saving and loading a program's state: sharded, from any plan to any other, bit for bit.

    checkpoints = Checkpoints(program)
    checkpoints.save("ckpt", step=12)           # all ranks; each writes what it owns
    step = checkpoints.load("ckpt")             # all ranks; each reads what it holds

Names are the user's; optimizer states are `exp_avg/<parameter>` and so on. Neither the mesh, nor the
placements, nor the number of ranks have to be those of the save.
"""

from __future__ import annotations

import json
import os
import warnings
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException

from ..ir.errors import RunError
from ..ir.types import TensorType
from .checkpoint_format import INDEX, Stored, find_checkpoint, no_checkpoint
from .checkpoint_lock import FolderLock
from .checkpoint_plan import Layout, ShardLoadPlanner, ShardSavePlanner
from .checkpoint_storage import Reader, Writer
from .checkpoint_torch import TorchReader
from .wrapper import HOIST_BYTES

T = TypeVar("T")
#: lines of a difference that are shown
_SHOWN = 8


class Sharded(Protocol):
    """What has a state in parts: a running program, or tensors that all ranks hold whole."""

    @property
    def comm(self) -> Any:
        """Where this rank is: `distributed`, `mesh`, `coord`."""

    @property
    def state_types(self) -> Mapping[str, TensorType]:
        """Placed types by name, in the same order on all ranks."""

    @property
    def state_roles(self) -> Mapping[str, str]:
        """`param`, `buffer` or `state`."""

    @property
    def elsewhere(self) -> frozenset[str]:
        """Names that the ranks of another pipeline stage write."""

    def state_dict(self, full: bool = True, copy: bool = True) -> dict[str, Tensor]:
        """This rank's parts with full=False."""

    def set_shards(self, shards: Mapping[str, Tensor]) -> None:
        """Take this rank's parts by name."""


class Checkpoints:
    """Saves and loads one program. All ranks make the same calls in the same order.

    Args:
        program: the plan on this rank.

    Attributes:
        bytes_read: bytes of data files that this rank read in its last `load`.
        extra: what the caller kept with the checkpoint that was loaded last.
    """

    def __init__(self, program: Sharded) -> None:
        self.bind(program)
        self.bytes_read = 0
        self.extra: dict[str, Any] = {}
        self._group: dist.ProcessGroup | None = None
        self._locks: dict[Path, FolderLock] = {}
        self._pending: Future[None] | None = None

    def bind(self, program: Sharded) -> None:
        """Go on with another plan of the same program; locks and unfinished saves stay."""
        self.program, comm = program, program.comm
        self.distributed = comm.distributed and dist.get_world_size() > 1
        self.layout = Layout(program.state_types, comm.mesh, comm.coord, program.elsewhere)

    # -- saving -------------------------------------------------------------------------------

    def save(
        self,
        path: str | Path,
        step: int,
        *,
        asynchronous: bool = False,
        keep: int = 2,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        """Write a checkpoint into the folder `path`; the last good one stays until it is complete.

        Args:
            step: number of steps taken; `load` returns it.
            asynchronous: copy the shards to host memory and return; files are written while the
                program goes on. Errors are raised by the next `save`, `wait` or `close`.
            keep: how many complete checkpoints to leave in the folder, at least 1.
            extra: what else to keep, as JSON; after `load` it is the attribute `extra`.

        Raises RunError W1105 when it could not be written (the last good one is untouched), W1106
        when another job writes to the folder.
        """
        if step < 0 or keep < 1:
            raise RunError("W1105", f"step {step} and keep {keep}", reason="step >= 0, keep >= 1")
        extra = _plain(extra or {})
        self.wait()
        self._join()
        local = self.program.state_dict(full=False, copy=False)
        owned = {name: local[name].detach() for name in self.layout.owned()}
        root = Path(path).absolute()
        lock = self._locks.setdefault(root, FolderLock(root))
        roles = self.program.state_roles
        writer = Writer(root, step, roles=roles, keep=keep, extra=extra, lock=lock)
        if not asynchronous:
            self._write(writer, owned)
            return
        owned = {name: shard.to("cpu", copy=True) for name, shard in owned.items()}
        self._pending = _in_thread(lambda: self._write(writer, owned))

    def _write(self, writer: Writer, owned: dict[str, Tensor]) -> None:
        try:
            with self._alone():
                state_dict_saver.save(
                    owned, storage_writer=writer, planner=ShardSavePlanner(self.layout),
                    process_group=self._group, no_dist=not self.distributed,
                )  # fmt: skip
        except CheckpointException as error:
            writer.discard()
            raise _diagnosed(error, f"the checkpoint of step {writer.step}", writer.root) from None

    def wait(self) -> None:
        """Wait for an asynchronous save. Raises what it ended in."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    # -- loading ------------------------------------------------------------------------------

    def load(
        self, path: str | Path, *, strict: bool = True, order: Sequence[str] = ()
    ) -> int:
        """Read this rank's shards from a checkpoint, in place; return its step.

        A plan without optimizer states takes parameters and buffers from any checkpoint.

        Args:
            path: a checkpoint, or a folder of checkpoints, whose latest is read; or what
                torch.distributed.checkpoint itself wrote, whose step is the optimizer's.
            order: names of the optimizer's parameters in its order: checkpoints of
                `optimizer.state_dict()` number them.
            strict: refuse names that are missing or unknown; otherwise what is missing stays as it
                is. Shapes and dtypes must always agree.

        Raises RunError W1101, W1102, W1104 with nothing changed, and W1103 for damaged files: the
        state is then undefined until another checkpoint is loaded.
        """
        self.wait()
        self._join()
        reader = self._together(lambda: self._opened(path, strict, order))
        wanted = self._targets(reader.index.tensors)
        try:
            with self._alone():
                state_dict_loader.load(
                    wanted, storage_reader=reader, planner=ShardLoadPlanner(self.layout),
                    process_group=self._group, no_dist=not self.distributed,
                )  # fmt: skip
        except CheckpointException as error:
            raise _diagnosed(error, f"checkpoint {reader.folder}", reader.folder) from None
        self.program.set_shards(wanted)
        self.bytes_read, self.extra = reader.bytes_read, reader.index.extra
        return reader.index.step

    def _targets(self, names: Container[str]) -> dict[str, Tensor]:
        """Tensors to load into: the state's own where nothing else can share their memory.

        After a step a state may be one of the plan's constants, or the same tensor as another.
        """
        local = self.program.state_dict(full=False, copy=False)
        users = Counter(shard.untyped_storage().data_ptr() for shard in local.values())
        out = {}
        for name, shard in local.items():
            alone = users[shard.untyped_storage().data_ptr()] == 1 and shard.is_contiguous()
            large = shard.numel() * shard.element_size() > HOIST_BYTES
            if name in names:
                out[name] = shard if alone and large else torch.empty_like(
                    shard, memory_format=torch.contiguous_format
                )  # fmt: skip
        return out

    def _opened(
        self, path: str | Path, strict: bool, order: Sequence[str]
    ) -> Reader | TorchReader:
        reader = open_checkpoint(path, list(self.layout.types), order)
        roles = self.program.state_roles
        stored = reader.index.tensors
        if isinstance(reader, TorchReader):
            # an eager checkpoint has buffers that the program never reads
            stored = {n: s for n, s in stored.items() if n in roles or s.role == "state"}
        compare(self.layout.types, roles, stored, strict, reader.folder)
        return reader

    def exists(self, path: str | Path) -> bool:
        """Is there a checkpoint to load? All ranks must call. Raises RunError W1103."""
        self._join()
        return self._together(lambda: find_checkpoint(path) is not None)

    # -- ranks --------------------------------------------------------------------------------

    def _join(self) -> None:
        """Make the ranks' own group: its messages never mix with those of a step."""
        if self.distributed and self._group is None:
            self._group = dist.new_group(backend="gloo")

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Without torch's warning that a program on one rank saves for itself."""
        with warnings.catch_warnings():
            if not self.distributed:
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            yield

    def _together(self, act: Callable[[], T]) -> T:
        """Run `act` on all ranks; when it fails on one, all raise its diagnostic."""
        result: list[T] = []
        error: RunError | None = None
        try:
            result.append(act())
        except RunError as found:
            error = found
        if self.distributed:
            errors: list[RunError | None] = [None] * dist.get_world_size()
            dist.all_gather_object(errors, error, group=self._group)
            error = error or next((other for other in errors if other is not None), None)
        if error is not None:
            raise error
        return result[0]

    def close(self) -> None:
        """Wait for an asynchronous save and give the folders back."""
        try:
            self.wait()
        finally:
            for lock in self._locks.values():
                lock.release()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is not None:
            self._pending = None  # other ranks may be gone: an unfinished save stays temporary
        self.close()


def open_checkpoint(
    path: str | Path, names: Sequence[str] = ("step",), order: Sequence[str] = ()
) -> Reader | TorchReader:
    """A checkpoint of either format. Raises RunError W1101, W1103, W1104."""
    found = find_checkpoint(path)
    if found is None:
        raise no_checkpoint(path)
    if (found / INDEX).is_file():
        return Reader(found)
    return TorchReader(found, names, order)


def _plain(extra: Mapping[str, Any]) -> dict[str, Any]:
    """What will be read back. Raises RunError W1105 for what is not JSON."""
    try:
        found: dict[str, Any] = json.loads(json.dumps(dict(extra)))
    except (TypeError, ValueError) as error:
        raise RunError(
            "W1105", "`extra` cannot be kept in a checkpoint", reason=str(error),
            hint="pass numbers, text, lists and dicts; tensors belong into the state",
        ) from None  # fmt: skip
    return found


def _in_thread(act: Callable[[], None]) -> Future[None]:
    """Run `act` in a thread that does not keep the process alive."""
    future: Future[None] = Future()

    def run() -> None:
        try:
            act()
        except BaseException as error:  # handed to whoever waits, interrupts included
            future.set_exception(error)
        else:
            future.set_result(None)

    Thread(target=run, name="weft-save", daemon=True).start()
    return future


def _diagnosed(error: CheckpointException, what: str, folder: Path) -> BaseException:
    """The diagnostic for the failures of all ranks."""
    causes = {rank: failure[0] for rank, failure in sorted(error.failures.items())}
    rank, first = next(iter(causes.items()))
    for cause in causes.values():
        if isinstance(cause, RunError):
            return cause
    if not isinstance(first, OSError):
        return first
    reason = os.strerror(first.errno) if first.errno else str(first)
    return RunError(
        "W1105", f"{what} could not be written or read in {folder}",
        reason=f"rank {rank}: {reason}" + (f" ({first.filename})" if first.filename else ""),
        hint="make room or choose another folder; the last complete checkpoint is untouched",
    )  # fmt: skip


def compare(
    types: Mapping[str, TensorType],
    roles: Mapping[str, str],
    stored: Mapping[str, Stored],
    strict: bool,
    folder: Path,
) -> None:
    """Compare a plan's state with a checkpoint's by name, shape and dtype. Raises RunError W1102."""
    trains = "state" in roles.values()
    lines = []
    for name, type in types.items():
        here = TensorType(type.dtype, type.shape)
        if name not in stored:
            lines += [f"{name}: {here} in the plan, not in the checkpoint"] if strict else []
            continue
        there = TensorType(stored[name].dtype, stored[name].shape)
        if there != here:
            lines.append(f"{name}: {here} in the plan, {there} in the checkpoint")
    if strict:
        lines += [
            f"{name}: {TensorType(entry.dtype, entry.shape)} in the checkpoint, not in the plan"
            for name, entry in stored.items()
            if name not in types and (trains or entry.role != "state")
        ]
    if lines:
        more = [f"and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
        raise RunError(
            "W1102", f"{folder} is a checkpoint of another program",
            reason="\n       ".join([f"{len(lines)} differences", *lines[:_SHOWN], *more]),
            hint="load a checkpoint of the program that was compiled"
            + ("; strict=False leaves what is missing as it is" if strict else ""),
        )  # fmt: skip


__all__ = ["Checkpoints", "Sharded", "compare", "open_checkpoint"]
