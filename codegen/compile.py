"""Triton sources to device binaries, ahead of time and without a device.

A binary depends on the source, the argument types, the constants, the target and Triton's version,
and on nothing else: no paths, times or line numbers go in, so equal inputs give equal bytes. The
cache is addressed by a hash of these inputs.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

from ..ir.errors import CompileError
from ..runtime.cubin import BadCubin, read_cubin
from . import interp
from .binary import Resources, hip_resources, resources
from .source import KernelSource

log = logging.getLogger("weft.kernels")

#: raised when what is compiled, or how it is stored in the cache, changes
_FORMAT = 3
#: threads of a warp: on every CUDA device, on AMD's CDNA
_WARP = {"cuda": 32, "hip": 64}
#: kernels that are compiled at the same time; more only wait for each other's Python
_MOST_THREADS = 4
#: shared memory that one program may have: CUDA C++ programming guide, table of compute capabilities;
#: the LDS of CDNA3 (its ISA reference, 2.3)
SHARED_LIMITS = {
    "cuda:70": 98304, "cuda:75": 65536, "cuda:80": 166912, "cuda:86": 101376, "cuda:89": 101376,
    "cuda:90": 232448, "cuda:100": 232448, "cuda:103": 232448, "cuda:120": 101376,
    "hip:gfx90a": 65536, "hip:gfx942": 65536,
}  # fmt: skip
#: fields of a binary that the cache keeps as they are
_PLAIN = ("entry", "threads", "cuda", "scratch_bytes")


@dataclass(frozen=True)
class Binary:
    """A compiled kernel.

    Attributes:
        cubin: the bytes of its cubin (CUDA) or hsaco (HIP).
        entry: the name of its function.
        resources: what it needs.
        parameters: (offset, size) of each argument as the binary itself says, hidden ones included.
        threads: of a program.
        cuda: version of the toolkit that made a cubin, such as 12090 for 12.9; 0 for an hsaco.
        scratch_bytes: memory of a program, behind the first hidden pointer.
    """

    cubin: bytes
    entry: str
    resources: Resources
    parameters: tuple[tuple[int, int], ...]
    threads: int
    cuda: int
    scratch_bytes: int


def available() -> bool:
    """Can this installation compile kernels?"""
    return importlib.util.find_spec("triton") is not None and not interp.enabled()


def compile_kernel(source: KernelSource, target: str, cache: Path | None = None) -> Binary:
    """Compile a generated kernel; see `compile_cubin`."""
    (found,) = compile_kernels([source], target, cache)
    if isinstance(found, CompileError):
        raise found
    return found


def compile_kernels(
    sources: Sequence[KernelSource], target: str, cache: Path | None = None
) -> list[Binary | CompileError]:
    """Compile generated kernels at the same time; equal ones once. An error in a kernel's place is
    what `compile_cubin` would raise.

    LLVM and ptxas, which take most of the time, run beside the Python of other kernels.
    """
    jobs = [
        _Job(s.text, dict(s.signature), dict(s.constants), target, tuple(s.aligned), s.warps,
             s.stages)
        for s in sources
    ]  # fmt: skip
    return _compile_all(jobs, cache)


def compile_cubin(
    text: str,
    signature: Mapping[str, str],
    constants: Mapping[str, int],
    target: str = "cuda:90",
    *,
    aligned: Sequence[str] = (),
    warps: int = 4,
    stages: int = 0,
    cache: Path | None = None,
) -> Binary:
    """Compile the function `kernel` of a Triton source.

    Args:
        text: Python source that defines `kernel` with `@triton.jit`.
        signature: Triton type of each argument, in order, constants excluded. Pointers are taken
            to be 16-byte aligned, as torch's allocations are.
        constants: values of the `tl.constexpr` arguments.
        target: `cuda:<compute capability>`, such as `cuda:90`, or `hip:gfx942`.
        aligned: integer arguments that are multiples of 16.
        warps: warps of a program.
        stages: tiles of a loop that are on their way at the same time; 0 is Triton's default.
        cache: folder of binaries made before; None keeps nothing.

    Raises CompileError W0901.
    """
    job = _Job(text, dict(signature), dict(constants), target, tuple(aligned), warps, stages)
    (found,) = _compile_all([job], cache)
    if isinstance(found, CompileError):
        raise found
    return found


def _compile_all(jobs: Sequence[_Job], cache: Path | None) -> list[Binary | CompileError]:
    if not available():
        error = CompileError(
            "W0901", "kernels cannot be compiled here",
            reason="TRITON_INTERPRET=1 is set" if interp.enabled() else "Triton is not installed",
            hint="the plan runs ATen in their place",
        )  # fmt: skip
        return [error for _ in jobs]
    distinct = {job.key(): job for job in jobs}
    with TemporaryDirectory() as name, _settings(Path(name)), _parsing_in_turn():
        with ThreadPoolExecutor(min(_MOST_THREADS, max(1, len(distinct)))) as pool:
            made = pool.map(lambda key: _cached(key, distinct[key], cache, Path(name)), distinct)
            found = dict(zip(distinct, made, strict=True))
    return [found[job.key()] for job in jobs]


def _cached(entry: str, job: _Job, cache: Path | None, folder: Path) -> Binary | CompileError:
    kept = cache / "kernels" / entry[:2] / entry if cache is not None else None
    if kept is not None and (found := _read(kept)) is not None:
        return found
    own = folder / entry
    own.mkdir()
    try:
        binary = _compile(job, own)
    except CompileError as error:
        return error
    if kept is not None:
        _write(kept, binary)
    return binary


@dataclass(frozen=True)
class _Job:
    """Everything that a binary depends on, Triton's version aside."""

    text: str
    signature: dict[str, str]
    constants: dict[str, int]
    target: str
    aligned: tuple[str, ...]
    warps: int
    stages: int

    def key(self) -> str:
        """Name of the cache entry."""
        import triton

        # the order of the arguments matters, so this is a list of pairs and not an object
        signature, constants = list(self.signature.items()), list(self.constants.items())
        content = [_FORMAT, triton.__version__, self.text, signature, constants, self.target,
                   self.aligned, self.warps, self.stages]  # fmt: skip
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _read(folder: Path) -> Binary | None:
    """A cache entry; None where there is none or, with a warning, where it is damaged."""
    try:
        info = json.loads((folder / "info.json").read_text(encoding="utf-8"))
        cubin = (folder / "kernel.cubin").read_bytes()
        if hashlib.sha256(cubin).hexdigest() != info["sha256"]:
            raise ValueError("its hash differs")
        parameters = tuple((int(offset), int(size)) for offset, size in info["parameters"])
        plain = {key: info[key] for key in _PLAIN}
        return Binary(cubin, resources=Resources(**info["resources"]), parameters=parameters, **plain)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("the cached kernel %s is damaged and is made again: %s", folder, error)
        return None


def _write(folder: Path, binary: Binary) -> None:
    """Write an entry: each file is renamed into place, the one with the hash of the other last."""
    folder.mkdir(parents=True, exist_ok=True)
    info = {
        "sha256": hashlib.sha256(binary.cubin).hexdigest(),
        "resources": asdict(binary.resources),
        "parameters": binary.parameters,
        **{key: getattr(binary, key) for key in _PLAIN},
    }
    for name, content in (("kernel.cubin", binary.cubin), ("info.json", json.dumps(info).encode())):
        temporary = folder / f".{name}.{os.getpid()}.{threading.get_ident()}"
        temporary.write_bytes(content)
        os.replace(temporary, folder / name)


def _compile(job: _Job, folder: Path) -> Binary:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    backend, _, architecture = job.target.partition(":")
    known = architecture.isdigit() if backend == "cuda" else architecture.startswith("gfx9")
    if backend not in _WARP or not known:
        raise CompileError(
            "W0901", f"there is no code generator for {job.target}",
            hint="targets are cuda:70 and up, and hip:gfx942",
        )  # fmt: skip
    kinds = {**job.signature, **dict.fromkeys(job.constants, "constexpr")}
    attrs = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(kinds.items())
        if kind.startswith("*") or name in job.aligned
    }
    function = _load(job.text, folder).kernel
    try:
        ast = ASTSource(function, kinds, constexprs=dict(job.constants), attrs=attrs)
        named: int | str = int(architecture) if backend == "cuda" else architecture
        target = GPUTarget(backend, named, _WARP[backend])
        options = {"num_warps": job.warps}
        if job.stages:
            options["num_stages"] = job.stages
        compiled = triton.compile(ast, target=target, options=options)
    except (triton.TritonError, RuntimeError, ValueError, TypeError) as error:
        raise CompileError(
            "W0901", f"Triton cannot compile a kernel for {job.target}", reason=str(error),
            hint="the plan runs ATen in its place",
        ) from error  # fmt: skip
    return _binary(job, compiled, folder)


def _binary(job: _Job, compiled: Any, folder: Path) -> Binary:
    """What Triton made. Raises CompileError W0901 where the device has too little shared memory."""
    metadata = compiled.metadata
    shared, scratch = int(metadata.shared), int(metadata.global_scratch_size or 0)
    limit = SHARED_LIMITS.get(job.target)
    if limit is not None and shared > limit:
        raise CompileError(
            "W0901", f"a kernel needs more shared memory than {job.target} has",
            reason=f"{shared} bytes, of {limit}", hint="the plan runs ATen in its place",
        )  # fmt: skip
    if job.target.startswith("hip"):
        text = compiled.asm["amdgcn"]
        found = re.findall(r"\.offset:\s+(\d+)\s+\.size:\s+(\d+)", text)
        return Binary(
            compiled.asm["hsaco"], str(metadata.name), hip_resources(text, shared),
            tuple((int(offset), int(size)) for offset, size in found),
            job.warps * _WARP["hip"], 0, scratch,
        )  # fmt: skip
    cubin: bytes = compiled.asm["cubin"]
    try:
        info = read_cubin(cubin)
    except BadCubin as error:
        raise CompileError("W0901", "a kernel's binary cannot be read", reason=str(error),
                           hint="use a version of Triton that weft knows") from None  # fmt: skip
    return Binary(cubin, info.entry, resources(cubin, shared, folder, compiled.asm["ptx"]),
                  info.parameters, info.threads, info.cuda, scratch)  # fmt: skip


@contextmanager
def _settings(folder: Path) -> Iterator[None]:
    """Triton without line numbers (they hold paths), and with a cache that goes away."""
    changes = {"TRITON_DISABLE_LINE_INFO": "1", "TRITON_CACHE_DIR": str(folder / "triton")}
    before = {key: os.environ.get(key) for key in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


@contextmanager
def _parsing_in_turn() -> Iterator[None]:
    """Kernels are parsed one at a time: CPython 3.11 counts how deep `ast.parse` is for all threads
    together, and two at once can end in a SystemError (python/cpython#106905)."""
    from triton.runtime.jit import JITFunction

    original, turn = JITFunction.parse, threading.Lock()

    def parse(function: Any) -> Any:
        with turn:
            return original(function)

    JITFunction.parse = parse
    try:
        yield
    finally:
        JITFunction.parse = original


def _load(text: str, folder: Path) -> ModuleType:
    """Import a source from a file: Triton reads a kernel's text from there."""
    path = folder / "kernel_source.py"
    path.write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("kernel_source", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


__all__ = [
    "Binary", "Resources", "available", "compile_cubin", "compile_kernel", "compile_kernels",
]  # fmt: skip
