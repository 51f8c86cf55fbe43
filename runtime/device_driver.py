"""The part of the CUDA driver (or HIP) that launches kernels, through ctypes."""

from __future__ import annotations

import ctypes
from ctypes import byref, c_int, c_void_p
from functools import cache

#: numbers of the CUDA driver API, which HIP shares where it has them (cuda.h, hip_runtime_api.h)
_SHARED_BYTES_OF_FUNCTION = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_SHARED_PER_BLOCK, _SHARED_OPTIN, _MAJOR, _MINOR = 8, 97, 75, 76  # CU_DEVICE_ATTRIBUTE_*
#: shared memory that every CUDA function may use without being asked for it
_PLAIN_SHARED_BYTES = 48 * 1024
#: backend -> library, and its names of the calls
_APIS = {
    "cuda": ("libcuda.so.1", {
        "version": "cuDriverGetVersion", "load": "cuModuleLoadData", "device": "cuCtxGetDevice",
        "function": "cuModuleGetFunction", "set": "cuFuncSetAttribute",
        "attribute": "cuDeviceGetAttribute", "launch": "cuLaunchKernel",
    }),
    "hip": ("libamdhip64.so", {
        "version": "hipDriverGetVersion", "load": "hipModuleLoadData", "device": "hipGetDevice",
        "function": "hipModuleGetFunction", "set": "hipFuncSetAttribute",
        "attribute": "hipDeviceGetAttribute", "launch": "hipModuleLaunchKernel",
    }),
}  # fmt: skip


class DriverError(RuntimeError):
    """A call of the driver failed; the message has its name and the error's number."""


class Driver:
    """The driver's calls.

    Args:
        backend: `cuda` or `hip`.
        library: path of the library; the system's by default.

    Attributes:
        launch: the foreign function `cuLaunchKernel`; 0 is success.

    Raises DriverError where there is no driver.
    """

    def __init__(self, backend: str, library: str = "") -> None:
        name, self._names = _APIS[backend]
        self.backend = backend
        try:
            self._library = ctypes.CDLL(library or name)
            self.launch = getattr(self._library, self._names["launch"])
        except (OSError, AttributeError) as error:
            raise DriverError(f"no {backend} driver: {error}") from None

    def _call(self, name: str, *arguments: object) -> None:
        status = getattr(self._library, self._names[name])(*arguments)
        if status:
            raise DriverError(f"{self._names[name]} returned error {status}")

    def version(self) -> int:
        """CUDA version that the driver knows, such as 12090 for 12.9."""
        found = c_int()
        self._call("version", byref(found))
        return found.value

    def _attribute(self, number: int) -> int:
        device, found = c_int(), c_int()
        self._call("device", byref(device))
        self._call("attribute", byref(found), number, device)
        return found.value

    def capability(self) -> int:
        """Compute capability of the current CUDA device, such as 90."""
        return 10 * self._attribute(_MAJOR) + self._attribute(_MINOR)

    def shared_bytes(self) -> int:
        """Shared memory that one program may have at most on the current CUDA device."""
        return max(self._attribute(_SHARED_PER_BLOCK), self._attribute(_SHARED_OPTIN))

    def load(self, image: bytes, entry: str, shared_bytes: int) -> c_void_p:
        """Load a binary into the current context; the function `entry` of it.

        The binary stays loaded for the life of the process, as the plan does.
        """
        module, function = c_void_p(), c_void_p()
        self._call("load", byref(module), image)
        self._call("function", byref(function), module, entry.encode())
        if self.backend == "cuda" and shared_bytes > _PLAIN_SHARED_BYTES:
            self._call("set", function, _SHARED_BYTES_OF_FUNCTION, c_int(shared_bytes))
        return function


@cache
def system_driver(backend: str) -> Driver:
    """The driver of this machine. Raises DriverError where there is none."""
    return Driver(backend)
