"""Hugging Face safetensors: parameters in and out, under the user's names.

    load_pretrained(program, "Qwen3-0.6B/")      # each rank reads its slices only
    save_pretrained(program, "out/")             # one tensor at a time, model.safetensors
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..ir.errors import RunError
from ..ir.types import DTYPES, TensorType, local_range
from .checkpoint_format import STORED_DTYPES, Stored, damaged, data_header, no_checkpoint
from .program import Program

SINGLE = "model.safetensors"
INDEX = SINGLE + ".index.json"
#: size of a file at which another one begins, as in transformers' save_pretrained
FILE_BYTES = 5_000_000_000
_NAMES = {stored: name for name, stored in STORED_DTYPES.items()}


def files_of(folder: Path) -> list[Path]:
    """The safetensors files of a model folder (or of a file). Raises RunError W1101, W1103."""
    if folder.is_file():
        return [folder]
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    index = folder / INDEX
    if not index.is_file():
        raise no_checkpoint(folder)
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise damaged(index, str(error)) from None
    paths = [folder / name for name in names if Path(name).name == name]
    missing = [str(path) for path in paths if not path.is_file()]
    if missing or len(paths) < len(names):
        raise damaged(index, f"it names files that are not there: {', '.join(missing) or names}")
    return paths


def stored_types(paths: list[Path]) -> dict[str, tuple[Path, Stored]]:
    """What safetensors files hold, by name. Raises RunError W1103."""
    found: dict[str, tuple[Path, Stored]] = {}
    for path in paths:
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():
                    part = file.get_slice(name)
                    dtype = _NAMES.get(part.get_dtype(), part.get_dtype())
                    found[name] = path, Stored(dtype, tuple(part.get_shape()), "param", ())
        except SafetensorError as error:
            raise damaged(path, str(error)) from None
    return found


def load_pretrained(program: Program, path: str | Path) -> None:
    """Load the parameters from a model folder or a safetensors file; buffers where it has them.

    Each rank reads its own slices. Optimizer states stay as they are. Names that the program does not
    have are ignored: a tied weight may be stored under another of its names.

    Raises RunError W1101, W1102 (with nothing changed), W1103.
    """
    from_files = stored_types(files_of(Path(path)))
    types, roles = program.state_types, program.state_roles
    lines = []
    for name, type in types.items():
        here = TensorType(type.dtype, type.shape)
        if name in from_files:
            entry = from_files[name][1]
            if (entry.dtype, entry.shape) != (here.dtype, here.shape):
                lines.append(f"{name}: {here} in the plan, {entry.dtype}{list(entry.shape)} in the file")
        elif roles[name] == "param":
            lines.append(f"{name}: {here} in the plan, not in the file")
    if lines:
        strangers = [name for name in from_files if name not in types]
        lines += [f"not in the plan: {', '.join(strangers[:4])}"] if strangers else []
        raise RunError(
            "W1102", f"{path} does not fit the plan", reason="\n       ".join(lines[:9]),
            hint="load the weights of the model that was compiled, in its dtype",
        )  # fmt: skip
    held = program.state_dict(full=False, copy=False)
    wanted = [name for name in held if name in from_files]
    program.set_shards(dict(_slices(program, {name: from_files[name][0] for name in wanted})))


def _slices(program: Program, paths: dict[str, Path]) -> Iterator[tuple[str, Tensor]]:
    """This rank's part of each tensor."""
    comm, device = program.comm, program.executor.device
    for path in sorted(set(paths.values())):
        with safe_open(path, "pt") as file:
            for name in (name for name, where in paths.items() if where == path):
                type = program.state_types[name]
                ranges = [
                    local_range(type, comm.mesh, comm.coord, dim) for dim in range(len(type.shape))
                ]
                part = file.get_slice(name)
                whole = not ranges
                tensor: Tensor = file.get_tensor(name) if whole else part[
                    tuple(slice(offset, offset + size) for offset, size in ranges)
                ]  # fmt: skip
                yield name, tensor.to(device, copy=True).contiguous()


def save_pretrained(program: Program, path: str | Path, *, file_bytes: int = FILE_BYTES) -> None:
    """Write parameters and buffers as a folder that `from_pretrained` reads; all ranks must call.

    Rank 0 writes, one whole tensor at a time. Files appear when they are complete.

    Raises RunError W1105, on all ranks.
    """
    folder = Path(path)
    types = {n: t for n, t in program.state_types.items() if program.state_roles[n] != "state"}
    files = _split(types, file_bytes)
    first = program.comm.rank == 0
    error = ""
    temporary = folder / ".writing-pretrained"
    lock = -1
    if first:
        try:
            lock = _begin(temporary)
        except OSError as found:
            error = str(found)
    for file, names in files.items():
        try:
            stream = (temporary / file).open("wb") if first and not error else None
        except OSError as found:
            stream, error = None, str(found)
        error = _write_file(program, stream, {n: types[n] for n in names}) or error
    if first and not error:
        try:
            _publish(temporary, folder, files, types)
        except OSError as found:
            error = str(found)
    if lock >= 0:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(lock)
    told = [error]
    if program.comm.distributed and dist.get_world_size() > 1:
        dist.broadcast_object_list(told, 0)
    if told[0]:
        raise RunError("W1105", f"the model could not be written to {folder}", reason=told[0],
                       hint="make room or choose another folder")  # fmt: skip


def _begin(temporary: Path) -> int:
    """Make the folder to write into; other jobs are kept out until the handle is closed.

    Raises OSError.
    """
    temporary.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(temporary.parent, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
    except BlockingIOError:
        os.close(lock)
        raise OSError("another job writes to the folder") from None
    except OSError:
        os.close(lock)
        raise
    return lock


def _write_file(
    program: Program, stream: BinaryIO | None, types: dict[str, TensorType]
) -> str:
    """Write a file where there is one; gather in any case, since other ranks do. What went wrong."""
    error = ""

    def write(data: Any) -> None:
        nonlocal error
        if stream is not None and not error:
            try:
                stream.write(data)
            except OSError as found:
                error = str(found)

    write(data_header([(n, t.dtype, (0,) * len(t.shape), t.shape) for n, t in types.items()],
                      {"format": "pt"}))  # fmt: skip
    for name in types:
        whole = program.whole(name)
        write(whole.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    if stream is not None:
        try:
            stream.flush()
            os.fsync(stream.fileno())
            stream.close()
        except OSError as found:
            error = error or str(found)
    return error


def _split(types: dict[str, TensorType], file_bytes: int) -> dict[str, list[str]]:
    """File names with the names of their tensors."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, type in types.items():
        need = prod(type.shape) * DTYPES[type.dtype]
        if groups[-1] and size + need > file_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += need
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {
        f"model-{number + 1:05d}-of-{len(groups):05d}.safetensors": names
        for number, names in enumerate(groups)
    }


def _publish(
    temporary: Path, folder: Path, files: dict[str, list[str]], types: dict[str, TensorType]
) -> None:
    """Move the files into place, the index last; all are written before the first is moved."""
    single = list(files) == [SINGLE]
    if not single:
        index = {
            "metadata": {"total_size": sum(type.bytes for type in types.values())},
            "weight_map": {name: file for file, names in files.items() for name in names},
        }
        (temporary / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    for file in files:
        (temporary / file).replace(folder / file)
    if single:
        (folder / INDEX).unlink(missing_ok=True)
        return
    (temporary / INDEX).replace(folder / INDEX)
    (folder / SINGLE).unlink(missing_ok=True)


__all__ = ["load_pretrained", "save_pretrained"]
