"""Giving idle heap memory back to the system, where the C library is glibc.

Tensors below glibc's mmap threshold live on its heap. Transfers free them in another order than
they were made in, the heap then grows by some MiB in each step and nothing returns it (measured: 11
MiB a step on 2 gloo ranks, 460 MiB instead of 620 after 9 steps with trimming).
"""

from __future__ import annotations

import ctypes
import sys


class _MallInfo2(ctypes.Structure):
    """`struct mallinfo2` of malloc.h (glibc 2.33 and later)."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks",
                     "uordblks", "fordblks", "keepcost")
    ]  # fmt: skip


def _library() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallinfo2") or not hasattr(library, "malloc_trim"):
        return None
    library.mallinfo2.restype = _MallInfo2
    return library


_LIBC = _library()
#: less than this is not worth the page faults of the next step
LEAST_BYTES = 32 << 20


def idle_heap() -> int:
    """Bytes of the heap that nothing uses; 0 where the C library does not say."""
    return 0 if _LIBC is None else int(_LIBC.mallinfo2().fordblks)


def trim(idle_bytes: int) -> bool:
    """Return the heap's free memory to the system when it is more than `idle_bytes` and 32 MiB.

    Returns whether it did; False where the C library cannot.
    """
    if _LIBC is None or idle_heap() <= max(idle_bytes, LEAST_BYTES):
        return False
    _LIBC.malloc_trim(0)
    return True
