"""Writes the kernels of a plan: sources, binaries for its devices, and a manifest."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..costmodel.datasheet import find_datasheet
from ..ir.errors import CompileError
from ..ir.module import Function, Module, Op
from ..passes.regions import OPTIMIZERS
from ..runtime.kernel_manifest import FORMAT
from ..runtime.updates import update_name
from .compile import Binary, available, compile_kernels
from .contraction import contraction_of, contraction_source
from .source import KernelSource, generate
from .tune import candidates
from .update import update_source

MANIFEST = "manifest.json"
#: device kind -> target; NVIDIA's table of compute capabilities (CUDA C++ programming guide, 5.1),
#: LLVM's table of AMD processors
TARGETS = {
    "v100": "cuda:70", "a100": "cuda:80", "l40s": "cuda:89", "h100": "cuda:90", "h200": "cuda:90",
    "b200": "cuda:100", "b300": "cuda:103", "mi250": "hip:gfx90a", "mi300x": "hip:gfx942",
}  # fmt: skip


def kernel_functions(module: Module) -> list[Function]:
    """The kernel functions of a module."""
    return [function for function in module.functions if "kernel" in function.attrs]


def emit_kernels(
    module: Module, out_dir: str | Path, device: str, *, cache: Path | None = None,
    tune: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Write `NAME.py` for each kernel of a module, `NAME.cubin` or `.hsaco` where the device has a
    target.

    A plan for CPUs runs ATen, its sources are there to be read. A kernel that cannot be generated
    or compiled runs ATen as well: its entry has `fallback` and a `reason`.

    Args:
        module: at the spmd or schedule level, after `fuse`.
        out_dir: the folder of kernels; made if it is not there.
        device: device kind, a key of `TARGETS`; kinds without an entry get sources alone.
        cache: folder of binaries made before.
        tune: compile several configurations of each row kernel and take the one that `tune.py`
            ranks first; the best few are in its entry, as `candidates`.

    Returns the manifest, which is also written, last, as `manifest.json`: `format`, `device`,
    `target` and `kernels`, a list of entries. Each file appears under its name only when complete.
    """
    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    target = TARGETS.get(device, "")
    made = [_source(function, module, target) for function in kernel_functions(module)]
    if tune and target.startswith("cuda") and available():
        made = [_tuned(entry, source, module, device, cache) for entry, source in made]
    made += [_update(name, op) for name, op in updates_of(module).items()]
    sources = {source.name: source for _, source in made if source is not None}
    binaries: dict[str, Binary | CompileError] = {}
    if target and available():
        binaries = dict(zip(sources, compile_kernels([*sources.values()], target, cache), strict=True))
    entries = [
        entry if source is None else entry | _written(source, binaries.get(source.name), folder, target)
        for entry, source in made
    ]
    manifest = {"format": FORMAT, "device": device, "target": target, "kernels": entries}
    text = json.dumps(manifest, indent=1) + "\n"
    _write(folder / MANIFEST, text.encode())
    return manifest


def fallbacks(manifest: dict[str, Any]) -> Sequence[str]:
    """One line for each kernel of a manifest that runs ATen although its device has kernels."""
    return [
        f"{entry['name']}: {entry['reason']}" for entry in manifest["kernels"] if entry["fallback"]
    ]


def _source(
    function: Function, module: Module, target: str
) -> tuple[dict[str, Any], KernelSource | None]:
    """The entry of a kernel in the manifest, and its source; None where it has none."""
    name = str(function.attrs["kernel"])
    entry: dict[str, Any] = {"name": name, "function": function.name, "fallback": "", "reason": ""}
    try:
        if contraction_of(function) is not None:
            return entry, contraction_source(function, module.mesh, target)
        return entry, generate(function, module.mesh)
    except CompileError as error:
        return entry | _fallen(error), None


def _tuned(
    entry: dict[str, Any], source: KernelSource | None, module: Module, device: str,
    cache: Path | None,
) -> tuple[dict[str, Any], KernelSource | None]:  # fmt: skip
    """A kernel in its best configuration."""
    function = module.function(entry["function"])
    if source is None or contraction_of(function) is not None:
        return entry, source
    found = candidates(function, module.mesh, TARGETS[device], find_datasheet(device), cache=cache)
    if not found:
        return entry, source
    return entry | {"candidates": [c.described() for c in found]}, found[0].source


def updates_of(module: Module) -> dict[str, Op]:
    """The kinds of optimizer updates outside of kernels by the names of their kernels."""
    return {
        update_name(op): op
        for function in module.functions
        if "kernel" not in function.attrs
        for op in function.ops
        if op.name in OPTIMIZERS
    }


def _update(name: str, op: Op) -> tuple[dict[str, Any], KernelSource | None]:
    entry: dict[str, Any] = {"name": name, "function": "", "fallback": "", "reason": ""}
    try:
        return entry, update_source(op)
    except CompileError as error:
        return entry | _fallen(error), None


def _fallen(error: CompileError) -> dict[str, Any]:
    return {"fallback": "aten", "reason": f"[{error.code}] {error.message}: {error.reason}"}


def _written(
    source: KernelSource, binary: Binary | CompileError | None, folder: Path, target: str
) -> dict[str, Any]:
    """Write a source and its binary; what the manifest says of them."""
    _write(folder / f"{source.name}.py", source.text.encode())
    if binary is None:
        return _described(source)
    if isinstance(binary, CompileError):
        return _described(source) | _fallen(binary)
    backend, _, arch = target.partition(":")
    name = f"{source.name}.{'cubin' if backend == 'cuda' else 'hsaco'}"
    _write(folder / name, binary.cubin)
    return _described(source) | {
        "binary": name,
        "binary_sha256": hashlib.sha256(binary.cubin).hexdigest(),
        "backend": backend,
        "arch": arch,
        "entry": binary.entry,
        "parameters": [list(pair) for pair in binary.parameters],
        # Triton adds pointers of its own (scratch, profile): how many is read from the binary
        "hidden_pointers": len(binary.parameters) - len(source.signature),
        "threads": binary.threads,
        "cuda": binary.cuda,
        "scratch_bytes": binary.scratch_bytes,
        **asdict(binary.resources),
    }


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


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content)
    os.replace(temporary, path)
