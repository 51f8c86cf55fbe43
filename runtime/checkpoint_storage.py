"""Storage of checkpoints for torch.distributed.checkpoint: plain files, no pickles.

    dcp.save(state, storage_writer=Writer("ckpt", step=12))
    dcp.load(state, storage_reader=Reader("ckpt"))          # also DTensors and whole tensors

A checkpoint is written into a temporary folder, which the coordinator renames once all ranks have
put their files on the disk; only then does `latest` name it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    SavePlan,
    SavePlanner,
    WriteItem,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from ..ir.errors import RunError
from ..ir.types import DTYPES
from .checkpoint_format import (
    INDEX,
    LATEST,
    BlockReader,
    BlockWriter,
    FileEntry,
    Index,
    Shard,
    Stored,
    boxes,
    checkpoint_name,
    complete_checkpoints,
    damaged,
    data_header,
    find_checkpoint,
    no_checkpoint,
    read_index,
)
from .checkpoint_lock import FolderLock
from .context import TORCH_DTYPES

_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
#: prefix of the folder that a checkpoint is written into
_TEMPORARY = ".writing-"


@dataclass(frozen=True)
class _Written:
    """Where a rank wrote an item."""

    file: FileEntry
    begin: int
    sizes: tuple[int, ...]


class Writer(StorageWriter):
    """Writes one checkpoint into a folder of checkpoints.

    Args:
        path: the folder of checkpoints; made when it does not exist.
        step: number of steps taken so far.
        roles: what each tensor is to the program (`param`, `buffer`, `state`).
        keep: how many complete checkpoints to leave in the folder.
        extra: what else to keep in the index, as JSON.
        lock: held by the caller over several saves; by default taken for this one.

    Raises RunError W1106 when another job writes to the folder, OSError when a disk is full.
    """

    def __init__(
        self,
        path: str | Path,
        step: int,
        *,
        roles: Mapping[str, str] | None = None,
        keep: int = 2,
        extra: Mapping[str, Any] | None = None,
        lock: FolderLock | None = None,
    ) -> None:
        self.root, self.step, self.keep = Path(path), step, keep
        self.extra = dict(extra or {})
        self.roles = dict(roles or {})
        self.lock = lock or FolderLock(self.root)
        self._own_lock = lock is None
        self.temporary = self.root / f"{_TEMPORARY}{checkpoint_name(step)}"

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """A writer is made for one checkpoint; there is nothing to reset."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Paths are passed to the constructor."""
        return False

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Take the lock, remove what an interrupted save left, make the temporary folder."""
        if not is_coordinator:
            return
        self.lock.acquire()
        for left in self.root.glob(f"{_TEMPORARY}*"):
            shutil.rmtree(left)
        self.temporary.mkdir()

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Nothing to add."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Name each rank's file."""
        return [
            replace(plan, storage_data=f"part-{number:05d}.safetensors")
            for number, plan in enumerate(plans)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's items into its file. Raises OSError."""
        future: Future[list[WriteResult]] = Future()
        future.set_result(self._write(plan, planner) if plan.items else [])
        return future

    def _write(self, plan: SavePlan, planner: SavePlanner) -> list[WriteResult]:
        shards = [_described(item) for item in plan.items]
        header = data_header(shards)
        begins, position = [], len(header)
        for _, dtype, _, sizes in shards:
            begins.append(position)
            position += prod(sizes) * DTYPES[dtype]
        out = BlockWriter(self.temporary / str(plan.storage_data))
        try:
            out.write(header)
            for item in plan.items:
                tensor = planner.resolve_data(item)
                assert isinstance(tensor, Tensor)
                out.write(_bytes_of(tensor))
            entry = out.finish()
        except BaseException:
            out.abandon()
            raise
        assert entry.bytes == position, "a shard does not have the size that was planned"
        return [
            WriteResult(item.index, prod(sizes) * DTYPES[dtype], _Written(entry, begin, sizes))
            for item, begin, (_, dtype, _, sizes) in zip(plan.items, begins, shards, strict=True)
        ]

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the index, move the checkpoint into place, name it in `latest`."""
        files: dict[str, FileEntry] = {}
        shards: dict[str, list[Shard]] = {}
        for result in (result for part in results for result in part):
            written, offsets = result.storage_data, tuple(result.index.offset or ())
            files[written.file.name] = written.file
            shard = Shard(written.file.name, written.begin, offsets, written.sizes)
            shards.setdefault(result.index.fqn, []).append(shard)
        tensors = {}
        for name, meta in metadata.state_dict_metadata.items():
            assert isinstance(meta, TensorStorageMetadata)
            tensors[name] = Stored(
                _NAMES[meta.properties.dtype], tuple(meta.size), self.roles.get(name, "param"),
                tuple(shards.get(name, ())),
            )  # fmt: skip
        _write_text(self.temporary / INDEX, Index(self.step, tensors, files, self.extra).text())
        _sync(self.temporary)
        self._publish()
        if self._own_lock:
            self.lock.release()

    def _publish(self) -> None:
        attempt = 0
        while (final := self.root / checkpoint_name(self.step, attempt)).exists():
            attempt += 1
        self.temporary.rename(final)
        _sync(self.root)
        latest = self.root / f".{LATEST}.tmp"
        _write_text(latest, final.name + "\n")
        latest.replace(self.root / LATEST)
        _sync(self.root)
        for old in complete_checkpoints(self.root)[: -self.keep]:
            if old != final:
                shutil.rmtree(old)

    def discard(self) -> None:
        """Remove what a failed save wrote: a full disk gets its space back."""
        if self.lock.held:
            shutil.rmtree(self.temporary, ignore_errors=True)
        if self._own_lock:
            self.lock.release()


def _described(item: WriteItem) -> tuple[str, str, tuple[int, ...], tuple[int, ...]]:
    """(name, dtype, offsets, sizes) of an item."""
    data = item.tensor_data
    if data is None:
        raise RunError(
            "W1105", f"{item.index.fqn!r} is not a tensor", hint="a checkpoint holds tensors only"
        )
    offsets = tuple(item.index.offset or data.chunk.offsets)
    return item.index.fqn, _NAMES[data.properties.dtype], offsets, tuple(data.chunk.sizes)


def _bytes_of(tensor: Tensor) -> memoryview:
    plain = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return memoryview(plain.numpy())  # type: ignore[arg-type]  # a Buffer from Python 3.12 on


def _write_text(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def _sync(folder: Path) -> None:
    """Put the names in a folder on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Reader(StorageReader):
    """Reads one checkpoint, only the blocks that a rank needs.

    Args:
        path: a checkpoint, or a folder of checkpoints, whose latest is read.

    Attributes:
        folder: the checkpoint.
        index: what it holds.
        bytes_read: bytes of data files that this rank has read.

    Raises RunError W1101, W1103, W1104.
    """

    def __init__(self, path: str | Path) -> None:
        found = find_checkpoint(path)
        if found is None:
            raise no_checkpoint(path)
        self.folder = found
        self.index = read_index(found)
        self.bytes_read = 0

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """A reader is made for one checkpoint; there is nothing to reset."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Paths are passed to the constructor."""
        return False

    @cached_property
    def _shards(self) -> dict[MetadataIndex, tuple[Shard, str]]:
        return {
            MetadataIndex(name, shard.offsets): (shard, stored.dtype)
            for name, stored in self.index.tensors.items()
            for shard in stored.shards
        }

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """What the checkpoint holds, in torch's terms."""
        return Metadata(
            {
                name: TensorStorageMetadata(
                    TensorProperties(TORCH_DTYPES[stored.dtype]),
                    torch.Size(stored.shape),
                    [
                        ChunkStorageMetadata(torch.Size(s.offsets), torch.Size(s.sizes))
                        for s in stored.shards
                    ],
                )
                for name, stored in self.index.tensors.items()
            }
        )

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Nothing to prepare."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Nothing to add."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Nothing to add."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read and verify the items, in the order of the files. Raises RunError W1103."""
        found = [(*self._shards[item.storage_index], item) for item in plan.items]
        found.sort(key=lambda entry: (entry[0].file, entry[0].begin))
        stream: BlockReader | None = None
        for shard, dtype, item in found:
            if stream is None or stream.entry.name != shard.file:
                self._end(stream)
                if shard.file not in self.index.files:
                    raise damaged(self.folder / shard.file, "the index does not list it")
                stream = BlockReader(self.folder / shard.file, self.index.files[shard.file])
            target = planner.resolve_tensor(item)
            _copy(stream, shard, dtype, item.storage_offsets, item.lengths, target)
            planner.commit_tensor(item, target)
        self._end(stream)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _end(self, stream: BlockReader | None) -> None:
        if stream is not None:
            self.bytes_read += stream.bytes_read
            stream.close()


def _copy(
    stream: BlockReader,
    shard: Shard,
    dtype: str,
    offsets: torch.Size,
    lengths: torch.Size,
    target: Tensor,
) -> None:
    """Copy a part of a stored shard to a tensor of the size of that part."""
    item = DTYPES[dtype]
    strides = [prod(shard.sizes[dim + 1 :]) for dim in range(len(shard.sizes))]
    for at, many in boxes(shard.sizes, offsets, lengths, item):
        first = sum(o * s for o, s in zip(at, strides, strict=True))
        last = first + sum((n - 1) * s for n, s in zip(many, strides, strict=True))
        data = stream.read(shard.begin + first * item, shard.begin + (last + 1) * item)
        flat = torch.frombuffer(data, dtype=torch.uint8).view(TORCH_DTYPES[dtype])
        place = target
        for dim, (begin, size) in enumerate(zip(at, many, strict=True)):
            place = place.narrow(dim, begin - offsets[dim], size)
        place.copy_(flat.as_strided(many, strides))


__all__ = ["Reader", "Writer"]
