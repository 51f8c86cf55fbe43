"""`weft doctor`: what this installation can do, and what is missing."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import psutil
import torch
import torch.distributed as dist

from .describe import human_bytes
from .options import Options


@dataclass(frozen=True)
class Finding:
    """One line of the diagnosis; `hint` says what to do where `works` is false."""

    what: str
    works: bool
    detail: str
    hint: str = ""


def _package(name: str, why: str) -> Finding:
    try:
        return Finding(name, True, version(name))
    except PackageNotFoundError:
        return Finding(name, False, "not installed", f"pip install {name}: {why}")


def _cubins() -> Finding:
    if importlib.util.find_spec("triton") is None:
        return Finding(
            "build kernels", False, "triton is not installed", "pip install 'triton>=3.6'"
        )
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    return Finding("build kernels", True, f"for sm_80, sm_90, sm_100 (host compiler: {compiler})")


def _cuda() -> Finding:
    if not torch.cuda.is_available():
        return Finding("CUDA device", False, "none", "plans for GPUs can be made, not run, here")
    names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
    return Finding("CUDA device", True, f"{torch.cuda.device_count()} x {', '.join(sorted(names))}")


def _cache(options: Options) -> Finding:
    folder = options.cache
    while not folder.exists():
        folder = folder.parent
    writable = os.access(folder, os.W_OK)
    hint = "" if writable else "set WEFT_CACHE to a folder that can be written"
    return Finding("cache folder", writable, str(options.cache), hint)


def diagnose(options: Options) -> list[Finding]:
    """All findings, most basic first."""
    memory = psutil.virtual_memory()
    backends = [n for n in ("gloo", "nccl") if dist.is_backend_available(n)]
    return [
        Finding("Python", True, platform.python_version()),
        Finding("machine", True, f"{os.cpu_count()} cores, {human_bytes(memory.total)} memory"),
        Finding("torch", True, torch.__version__),
        _package("triton", "kernels are not built without it"),
        _package("transformers", "only the examples and tests need it"),
        Finding(
            "run on several processes",
            bool(backends),
            ", ".join(backends) or "torch.distributed has no backend",
            "" if backends else "install a torch build with distributed support",
        ),
        _cuda(),
        _cubins(),
        _cache(options),
    ]
