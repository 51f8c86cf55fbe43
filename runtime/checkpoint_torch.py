"""Reading what torch.distributed.checkpoint's own `FileSystemWriter` wrote.

Such checkpoints come from eager and FSDP2 programs: `dcp.save({"model": ..., "optim": ...})`. Their
`.metadata` is a pickle; here it is read by an unpickler that makes the classes of that file and
nothing else. Tensors are read with `torch.load(weights_only=True)`, and only those parts that overlap
with what a rank holds.

Names: `model.layers.0.weight` and `optim.state.layers.0.weight.exp_avg`, under any prefixes; also
`optim.state.3.exp_avg`, with the number of a parameter, as `optimizer.state_dict()` has it.
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    Metadata,
    StorageMeta,
    TensorStorageMetadata,
)

from .checkpoint_format import TORCH_METADATA, Index, Shard, Stored, damaged
from .context import TORCH_DTYPES

_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
#: what a `.metadata` file may be made of (torch.distributed.checkpoint.metadata)
_CLASSES = {
    ("torch.distributed.checkpoint.metadata", name)
    for name in (
        "Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata",
        "ChunkStorageMetadata", "TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING",
    )
} | {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"), ("torch.serialization", "_get_layout"), ("collections", "OrderedDict"),
    *((f"pathlib{local}", kind) for local in ("", "._local")
      for kind in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath", "Path")),
    *(("torch", str(dtype).removeprefix("torch.")) for dtype in vars(torch).values()
      if isinstance(dtype, torch.dtype)),
}  # fmt: skip
#: prefixes that wrappers put into names: torch.compile, DDP, activation checkpointing
_WRAPPERS = re.compile(r"(_orig_mod|module|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")


class _Unpickler(pickle.Unpickler):
    """Makes what a `.metadata` file consists of; refuses everything else."""

    def find_class(self, module: str, name: str) -> Any:
        """A class of the list above."""
        if (module, name) not in _CLASSES:
            raise pickle.UnpicklingError(f"it holds {module}.{name}")
        return super().find_class(module, name)


class TorchReader(FileSystemReader):
    """Reads a checkpoint of torch's own format under the names of a program.

    Args:
        folder: the folder with `.metadata`.
        names: the program's names; optimizer states are those of its parameters.
        order: names of the optimizer's parameters in its order, for states that are numbered.

    Attributes:
        index: what it holds, under the program's names where it has them. Its step is the
            optimizer's, 0 without one.
        bytes_read: bytes of data files that this rank has read.

    Raises RunError W1103.
    """

    def __init__(self, folder: Path, names: Iterable[str], order: Sequence[str] = ()) -> None:
        super().__init__(folder)
        self.folder = folder
        self.bytes_read = 0
        self._metadata = _renamed(_read(folder), list(names), order)
        tensors = {
            name: _stored(name, meta)
            for name, meta in self._metadata.state_dict_metadata.items()
            if isinstance(meta, TensorStorageMetadata)
        }
        self.index = Index(self._step(tensors), tensors, {})

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """What the checkpoint holds, under the program's names."""
        return self._metadata

    def _slice_file(self, file: Any, sinfo: Any) -> IO[bytes]:
        self.bytes_read += sinfo.length
        return super()._slice_file(file, sinfo)

    def _step(self, tensors: Mapping[str, Stored]) -> int:
        """The optimizer's number of steps; 0 without one."""
        if "step" not in tensors:
            return 0
        info = next(i for at, i in self._metadata.storage_data.items() if at.fqn == "step")
        data = (self.folder / info.relative_path).read_bytes()[info.offset :][: info.length]
        return int(torch.load(io.BytesIO(data), map_location="cpu", weights_only=True))


def _read(folder: Path) -> Metadata:
    path = folder / TORCH_METADATA
    try:
        with path.open("rb") as stream:
            found = _Unpickler(stream).load()
    except (pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError, KeyError,
            TypeError, ValueError) as error:  # what a damaged pickle raises  # fmt: skip
        raise damaged(path, str(error)) from None
    if not isinstance(found, Metadata) or not isinstance(found.storage_data, dict):
        raise damaged(path, "it is no metadata of torch.distributed.checkpoint")
    for info in found.storage_data.values():
        if Path(info.relative_path).name != info.relative_path:
            raise damaged(path, f"it names a file outside of the folder: {info.relative_path}")
        if not (folder / info.relative_path).is_file():
            raise damaged(folder / info.relative_path, "it is missing")
    found.storage_meta = found.storage_meta or StorageMeta()
    return found


def _stored(name: str, meta: TensorStorageMetadata) -> Stored:
    dtype = meta.properties.dtype
    kind = _NAMES.get(dtype, str(dtype).removeprefix("torch."))
    if name == "step":
        kind = "f64"  # torch counts in float32; the copy converts
    role = "state" if "/" in name or name == "step" else "param"
    shards = tuple(Shard("", 0, tuple(c.offsets), tuple(c.sizes)) for c in meta.chunks)
    return Stored(kind, tuple(meta.size), role, shards)


def _renamed(metadata: Metadata, names: list[str], order: Sequence[str]) -> Metadata:
    """The metadata under the program's names; entries that it does not know keep theirs."""
    new = _match([n for n, m in metadata.state_dict_metadata.items()
                  if isinstance(m, TensorStorageMetadata)], names, order)  # fmt: skip
    return replace(
        metadata,
        state_dict_metadata={new.get(n, n): m for n, m in metadata.state_dict_metadata.items()},
        storage_data={
            replace(at, fqn=new.get(at.fqn, at.fqn)): info
            for at, info in metadata.storage_data.items()
        },
        planner_data=None,
    )


def _match(stored: list[str], names: list[str], order: Sequence[str]) -> dict[str, str]:
    """The program's name for each stored name that has one."""
    plain = {name: _WRAPPERS.sub("", name) for name in stored}
    states = {name: plain[name].partition("state.")[2] for name in stored
              if re.search(r"(^|\.)state\.", plain[name])}  # fmt: skip
    weights = [name for name in stored if name not in states]
    out: dict[str, str] = {}
    wanted = [name for name in names if "/" not in name and name != "step"]
    prefix = _prefix([plain[name] for name in weights], wanted)
    known = set(names)
    for name in weights:
        rest = plain[name].removeprefix(prefix)
        if plain[name].startswith(prefix) and rest in known:
            out[name] = rest
    for name, rest in states.items():
        owner, _, kind = rest.rpartition(".")
        if owner.isdigit() and int(owner) < len(order):
            owner = order[int(owner)]
        if kind == "step":
            if "step" not in out.values():  # one counter serves all parameters
                out[name] = "step"
        elif owner in known:
            out[name] = f"{kind}/{owner}"
    return out


def _prefix(stored: list[str], names: list[str]) -> str:
    """The prefix under which most of the names are stored."""
    counts: dict[str, int] = {"": 0}
    wanted = set(names)
    for name in stored:
        parts = name.split(".")
        for cut in range(len(parts)):
            if ".".join(parts[cut:]) in wanted:
                head = ".".join(parts[:cut])
                counts[f"{head}." if head else ""] = counts.get(f"{head}." if head else "", 0) + 1
    return max(counts, key=lambda prefix: (counts[prefix], -len(prefix)))


__all__ = ["TorchReader"]
