"""Loading the kernels of an artifact: binaries where device and driver can run them, else sources.

For each kernel in this order: its binary, through `binary.py`; its Triton source, where Triton is
installed; neither, and the plan runs the kernel function's body with ATen. What is not the first
choice is a warning of the log `weft.kernels`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..ir.errors import RunError
from .binary import BinaryKernel, Unfit, current_stream
from .device_driver import Driver, DriverError, system_driver
from .kernel_manifest import kernel_manifest
from .wrapper import Kernel

log = logging.getLogger("weft.kernels")


def load_kernels(
    folder: str | Path, device: torch.device | None = None, *, driver: Driver | None = None,
    stream: Callable[[torch.device], int] = current_stream,
) -> dict[str, Kernel]:  # fmt: skip
    """The kernels of a folder with a `manifest.json`, by name; those that run ATen are left out.

    Args:
        device: where they run: binaries are for CUDA devices, a CPU gets sources (which Triton's
            interpreter runs).
        driver: the device's driver; the system's by default.
        stream: the stream to launch on.

    Only files whose hash is that of the manifest are run. Raises RunError W0701 for others, W0702
    for a folder of another version.
    """
    folder = Path(folder)
    manifest = kernel_manifest(folder)
    on_gpu = driver is not None or (device is not None and device.type == "cuda")
    found: dict[str, Kernel] = {}
    for entry in manifest["kernels"]:
        if "source" not in entry or entry["fallback"] == "aten":
            if on_gpu:
                log.warning("%s runs ATen: %s", entry["name"], entry["reason"])
            continue
        source = _Source(_checked(folder / entry["source"], entry["source_sha256"]))
        kernel: Kernel | None = source if source.possible() else None
        if on_gpu and "binary" in entry:
            image = _checked(folder / entry["binary"], entry["binary_sha256"]).read_bytes()
            kernel = _binary(entry, source, image, driver, stream) or kernel
        if kernel is None:
            log.warning("%s runs ATen: neither its binary nor Triton can be used", entry["name"])
        else:
            found[entry["name"]] = kernel
    return found


def _binary(
    entry: dict[str, Any], source: _Source, image: bytes, driver: Driver | None,
    stream: Callable[[torch.device], int],
) -> Kernel | None:  # fmt: skip
    """A kernel that runs the binary, and the source on operands that the binary does not take."""
    try:
        driver = driver or system_driver(entry["backend"])
        kernel = BinaryKernel(entry, source.path, image, driver, stream)
    except (Unfit, DriverError) as error:
        log.warning("the binary of %s is not used: %s", entry["name"], error)
        return None

    if entry["kind"] == "update":
        return kernel.run  # its caller has another way

    def run(*operands: Tensor) -> Sequence[Tensor]:
        try:
            return kernel(*operands)
        except Unfit as error:
            if not source.possible():
                raise RunError(
                    "W0901", f"the binary of {entry['name']} does not take these operands",
                    reason=str(error), hint="install Triton: it builds the source for them",
                ) from None  # fmt: skip
            return source(*operands)

    return run


class _Source:
    """A kernel's file, imported when it is first called."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._launch: Kernel | None = None

    @staticmethod
    @cache
    def possible() -> bool:
        """Is Triton installed?"""
        return importlib.util.find_spec("triton") is not None

    def __call__(self, *operands: Tensor) -> Sequence[Tensor]:
        if self._launch is None:
            name = f"weft_kernel_{hashlib.sha256(str(self.path).encode()).hexdigest()[:16]}"
            spec = importlib.util.spec_from_file_location(name, self.path)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            self._launch = module.launch
        assert self._launch is not None
        return self._launch(*operands)


def _checked(path: Path, digest: str) -> Path:
    """A file that is what its manifest says."""
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != digest:
        raise RunError(
            "W0701", f"{path} is missing or not what its manifest says",
            hint="compile again, or copy the artifact again",
        )  # fmt: skip
    return path
