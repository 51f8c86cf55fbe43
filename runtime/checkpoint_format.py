"""The files of a checkpoint: their layout, their hashes, and reading only parts of them.

    DIR/latest                        name of the newest complete checkpoint
    DIR/step-00000012/index.json      tensors, their shards, files and hashes
    DIR/step-00000012/part-00000.safetensors    the shards that one rank wrote

A data file is plain safetensors, with each shard under its name and offsets. Hashes are taken over
blocks of a file, so that a part can be verified without reading the rest. Nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from ..ir.errors import RunError
from ..ir.types import DTYPES

#: raised when the layout of the folder or the meaning of a file changes
FORMAT = 1
INDEX = "index.json"
LATEST = "latest"
#: what a folder holds that torch.distributed.checkpoint wrote itself
TORCH_METADATA = ".metadata"
#: bytes that one hash covers, and the least that is read: 1 TB has 16 MB of hashes
BLOCK_BYTES = 1 << 20
#: bytes read and held at once
READ_BYTES = 16 << 20
#: dtypes by their names in safetensors' header
STORED_DTYPES: dict[str, str] = {
    "f64": "F64", "f32": "F32", "f16": "F16", "bf16": "BF16", "f8e4m3": "F8_E4M3",
    "f8e5m2": "F8_E5M2", "i64": "I64", "i32": "I32", "i16": "I16", "i8": "I8", "u8": "U8",
    "bool": "BOOL",
}  # fmt: skip
_NAME = re.compile(r"step-(\d{8,})(-\d+)?")


@dataclass(frozen=True)
class FileEntry:
    """A data file: its name, size, and the hash of each of its blocks."""

    name: str
    bytes: int
    blocks: tuple[str, ...]


@dataclass(frozen=True)
class Shard:
    """A stored part of a tensor: `sizes` from `offsets` on, row-major at byte `begin` of a file."""

    file: str
    begin: int
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Stored:
    """A stored tensor: its type, what it is to the program, and its parts."""

    dtype: str
    shape: tuple[int, ...]
    role: str
    shards: tuple[Shard, ...]


@dataclass(frozen=True)
class Index:
    """What a checkpoint holds. `extra` is whatever else was saved with it, as JSON."""

    step: int
    tensors: dict[str, Stored]
    files: dict[str, FileEntry]
    extra: dict[str, Any] = field(default_factory=dict)

    def text(self) -> str:
        """As JSON, with a hash of itself."""
        info = {
            "format": FORMAT,
            "step": self.step,
            "block_bytes": BLOCK_BYTES,
            "tensors": {name: asdict(stored) for name, stored in self.tensors.items()},
            "files": [asdict(entry) for entry in self.files.values()],
            "extra": self.extra,
        }
        info["hash"] = _hash_of(json.loads(json.dumps(info)))
        return json.dumps(info)  # without a last newline: each byte counts


def _hash_of(info: dict[str, Any]) -> str:
    rest = {key: value for key, value in info.items() if key != "hash"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def block_hash(block: bytes | memoryview) -> str:
    """Hash of a block, 16 bytes in hex."""
    return hashlib.blake2b(block, digest_size=16).hexdigest()


def checkpoint_name(step: int, attempt: int = 0) -> str:
    """Name of the folder for a step; `attempt` > 0 where the name is taken."""
    return f"step-{step:08d}" + (f"-{attempt}" if attempt else "")


def complete_checkpoints(root: Path) -> list[Path]:
    """The complete checkpoints in a folder, oldest first."""
    found = [p for p in root.glob("step-*") if _NAME.fullmatch(p.name) and (p / INDEX).is_file()]
    return sorted(found, key=lambda path: ((path / INDEX).stat().st_mtime_ns, path.name))


def find_checkpoint(path: str | Path) -> Path | None:
    """The checkpoint that a path means: itself, or the one that its `latest` names.

    None when there is no checkpoint. Raises RunError W1103 when `latest` names none.
    """
    root = Path(path)
    if (root / INDEX).is_file() or (root / TORCH_METADATA).is_file():
        return root
    latest = root / LATEST
    if not latest.is_file():
        return None
    name = latest.read_text(encoding="utf-8", errors="replace").strip()
    if not _NAME.fullmatch(name) or not (root / name / INDEX).is_file():
        raise damaged(latest, f"there is no checkpoint {name[:40]!r}")
    return root / name


def read_index(folder: Path) -> Index:
    """Read and verify the index of a checkpoint. Raises RunError W1101, W1103, W1104."""
    path = folder / INDEX
    if not path.is_file():
        raise no_checkpoint(folder)
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise damaged(path, str(error)) from None
    if not isinstance(info, dict) or "format" not in info:
        raise damaged(path, "it has no `format`")
    if info["format"] != FORMAT:
        raise RunError(
            "W1104", f"{folder} has checkpoint format {info['format']}, this weft reads {FORMAT}",
            hint="load it with the version that wrote it",
        )  # fmt: skip
    if info.get("hash") != _hash_of(info):
        raise damaged(path, "its hash differs")
    files = {f["name"]: FileEntry(f["name"], f["bytes"], tuple(f["blocks"])) for f in info["files"]}
    tensors = {
        name: Stored(
            stored["dtype"], tuple(stored["shape"]), stored["role"],
            tuple(Shard(s["file"], s["begin"], tuple(s["offsets"]), tuple(s["sizes"]))
                  for s in stored["shards"]),
        )
        for name, stored in info["tensors"].items()
    }  # fmt: skip
    return Index(info["step"], tensors, files, info.get("extra", {}))


def no_checkpoint(path: str | Path) -> RunError:
    """The diagnostic W1101."""
    return RunError(
        "W1101", f"{path} holds no complete checkpoint",
        reason=f"it has neither {LATEST} nor {INDEX}, nor {TORCH_METADATA} of torch's own",
        hint="write one with exe.save(DIR, step) or `weft run OUT --save DIR`",
    )  # fmt: skip


def damaged(path: Path, reason: str) -> RunError:
    """The diagnostic W1103 for a file, with the other checkpoints that could be loaded."""
    folder = path.parent
    root = folder.parent if _NAME.fullmatch(folder.name) else folder
    others = [str(p) for p in reversed(complete_checkpoints(root)) if p != folder]
    hint = f"load another one: {', '.join(others[:3])}" if others else "copy the checkpoint again"
    return RunError("W1103", f"{path} was modified or truncated", reason=reason, hint=hint)


# -- data files ---------------------------------------------------------------------------------


def data_header(
    shards: Sequence[tuple[str, str, tuple[int, ...], tuple[int, ...]]],
    metadata: dict[str, str] | None = None,
) -> bytes:
    """safetensors' header for shards (name, dtype, offsets, sizes), which follow it in order."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    position = 0
    for name, dtype, offsets, sizes in shards:
        size = prod(sizes) * DTYPES[dtype]
        key = name + "@" + ",".join(map(str, offsets)) if any(offsets) else name
        header[key] = {
            "dtype": STORED_DTYPES[dtype], "shape": list(sizes),
            "data_offsets": [position, position + size],
        }  # fmt: skip
        position += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format asks for data on a multiple of 8
    return len(text).to_bytes(8, "little") + text


class BlockWriter:
    """Writes a file from front to back and hashes its blocks."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stream: BinaryIO = path.open("wb")
        self._blocks: list[str] = []
        self._open = hashlib.blake2b(digest_size=16)
        self._filled = 0
        self.bytes = 0

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes. Raises OSError."""
        self._stream.write(data)
        self.bytes += len(data)
        view = memoryview(data)
        while len(view):
            part = view[: BLOCK_BYTES - self._filled]
            self._open.update(part)
            self._filled += len(part)
            view = view[len(part) :]
            if self._filled == BLOCK_BYTES:
                self._end_block()

    def _end_block(self) -> None:
        self._blocks.append(self._open.hexdigest())
        self._open, self._filled = hashlib.blake2b(digest_size=16), 0

    def finish(self) -> FileEntry:
        """Put everything on the disk. Raises OSError."""
        if self._filled:
            self._end_block()
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        return FileEntry(self.path.name, self.bytes, tuple(self._blocks))

    def abandon(self) -> None:
        """Close the file after an error."""
        try:
            self._stream.close()
        except OSError:
            pass  # what is still buffered does not fit either; the first error was raised


class BlockReader:
    """Reads ranges of a file and verifies the blocks that they touch.

    Attributes:
        bytes_read: bytes read from the disk so far.

    Raises RunError W1103.
    """

    def __init__(self, path: Path, entry: FileEntry) -> None:
        self.path, self.entry = path, entry
        self.bytes_read = 0
        self._last: tuple[int, bytes] = (-1, b"")  # neighbouring small tensors share a block
        if not path.is_file():
            raise damaged(path, "it is missing")
        size = path.stat().st_size
        if size != entry.bytes:
            raise damaged(path, f"it has {size} bytes, {entry.bytes} were written")
        self._stream = path.open("rb")

    def read(self, begin: int, end: int) -> bytearray:
        """The bytes from `begin` to `end`."""
        out = bytearray()
        for number in range(begin // BLOCK_BYTES, -(-end // BLOCK_BYTES)):
            start = number * BLOCK_BYTES
            block = memoryview(self._block(number))
            out += block[max(begin - start, 0) : end - start]
        return out

    def _block(self, number: int) -> bytes:
        if self._last[0] == number:
            return self._last[1]
        self._stream.seek(number * BLOCK_BYTES)
        block = self._stream.read(BLOCK_BYTES)
        self.bytes_read += len(block)
        if number >= len(self.entry.blocks) or block_hash(block) != self.entry.blocks[number]:
            raise damaged(self.path, f"the hash of block {number} differs")
        self._last = number, block
        return block

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


Box = tuple[tuple[int, ...], tuple[int, ...]]


def boxes(
    sizes: Sequence[int], offsets: Sequence[int], lengths: Sequence[int], itemsize: int
) -> Iterator[Box]:
    """Cut a part of a row-major array into boxes (offsets, lengths) to be read one by one.

    From its first to its last byte a box spans at most `READ_BYTES`, and holds no gap of more than a
    block where it can be avoided.
    """
    return _boxes(tuple(sizes), tuple(offsets), tuple(lengths), itemsize, 0)


def _boxes(
    sizes: tuple[int, ...], offsets: tuple[int, ...], lengths: tuple[int, ...], item: int, dim: int
) -> Iterator[Box]:
    if dim == len(sizes):
        return iter([(offsets, lengths)])
    stride = prod(sizes[dim + 1 :]) * item
    if lengths[dim] * stride <= BLOCK_BYTES:
        return iter([(offsets, lengths)])
    partial = lengths[dim + 1 :] != sizes[dim + 1 :]
    alone = stride > READ_BYTES or (partial and stride >= BLOCK_BYTES)
    rows = 1 if alone else max(1, READ_BYTES // stride)
    parts = []
    for start in range(0, lengths[dim], rows):
        at = (*offsets[:dim], offsets[dim] + start, *offsets[dim + 1 :])
        many = (*lengths[:dim], min(rows, lengths[dim] - start), *lengths[dim + 1 :])
        parts.append((at, many))
    if not alone:
        return iter(parts)
    return chain.from_iterable(_boxes(sizes, at, many, item, dim + 1) for at, many in parts)


__all__ = [
    "BLOCK_BYTES", "BlockReader", "BlockWriter", "FORMAT", "FileEntry", "INDEX", "Index", "LATEST",
    "TORCH_METADATA", "STORED_DTYPES", "Shard", "Stored", "block_hash", "boxes", "checkpoint_name",
    "complete_checkpoints", "damaged", "data_header", "find_checkpoint", "no_checkpoint",
    "read_index",
]  # fmt: skip
