"""Writes the kernels of a plan: sources, binaries for its devices, and a manifest."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..ir.errors import CompileError
from ..ir.module import Function, Module
from .compile import available, compile_kernel
from .source import KernelSource, generate

#: version of the manifest's layout
FORMAT = 1
MANIFEST = "manifest.json"
#: device kind -> target; NVIDIA's table of compute capabilities (CUDA C++ programming guide, 5.1)
TARGETS = {
    "v100": "cuda:70", "a100": "cuda:80", "l40s": "cuda:89", "h100": "cuda:90", "h200": "cuda:90",
    "b200": "cuda:100",
}  # fmt: skip


def kernel_functions(module: Module) -> list[Function]:
    """The kernel functions of a module."""
    return [function for function in module.functions if "kernel" in function.attrs]


def emit_kernels(
    module: Module, out_dir: str | Path, device: str, *, cache: Path | None = None
) -> dict[str, Any]:
    """Write `NAME.py` for each kernel of a module, `NAME.cubin` where the device has a target.

    A plan for CPUs runs ATen, its sources are there to be read. A kernel that cannot be generated
    or compiled runs ATen as well: its entry has `fallback` and a `reason`.

    Args:
        module: at the spmd or schedule level, after `fuse`.
        out_dir: the folder of kernels; made if it is not there.
        device: device kind, a key of `TARGETS`; kinds without an entry get sources alone.
        cache: folder of binaries made before.

    Returns the manifest, which is also written, last, as `manifest.json`: `format`, `device`,
    `target` and `kernels`, a list of entries. Each file appears under its name only when complete.
    """
    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    target = TARGETS.get(device, "")
    entries = [_emit(function, module, folder, target, cache) for function in
               kernel_functions(module)]  # fmt: skip
    manifest = {"format": FORMAT, "device": device, "target": target, "kernels": entries}
    text = json.dumps(manifest, indent=1) + "\n"
    _write(folder / MANIFEST, text.encode())
    return manifest


def fallbacks(manifest: dict[str, Any]) -> Sequence[str]:
    """One line for each kernel of a manifest that runs ATen although its device has kernels."""
    return [
        f"{entry['name']}: {entry['reason']}" for entry in manifest["kernels"] if entry["fallback"]
    ]


def _emit(
    function: Function, module: Module, folder: Path, target: str, cache: Path | None
) -> dict[str, Any]:
    name = str(function.attrs["kernel"])
    entry: dict[str, Any] = {"name": name, "function": function.name, "fallback": "", "reason": ""}
    try:
        source = generate(function, module.mesh)
        _write(folder / f"{name}.py", source.text.encode())
        entry |= _described(source)
        if target and available():
            entry |= _compiled(source, folder, target, cache)
    except CompileError as error:
        entry |= {"fallback": "aten", "reason": f"[{error.code}] {error.message}: {error.reason}"}
    return entry


def _described(source: KernelSource) -> dict[str, Any]:
    return {
        "source": f"{source.name}.py",
        "source_sha256": hashlib.sha256(source.text.encode()).hexdigest(),
        "kind": source.kind,
        "signature": source.signature,
        "constants": source.constants,
        "multiple_of_16": list(source.aligned),
        "warps": source.warps,
        "bytes_moved": source.bytes_moved,
        "bytes_unfused": source.bytes_unfused,
    }


def _compiled(
    source: KernelSource, folder: Path, target: str, cache: Path | None
) -> dict[str, Any]:
    binary = compile_kernel(source, target, cache)
    _write(folder / f"{source.name}.cubin", binary.cubin)
    return {
        "binary": f"{source.name}.cubin",
        "binary_sha256": hashlib.sha256(binary.cubin).hexdigest(),
        "entry": binary.entry,
        **asdict(binary.resources),
    }


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content)
    os.replace(temporary, path)
