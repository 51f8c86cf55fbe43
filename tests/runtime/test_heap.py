"""Idle heap memory goes back to the system."""

import ctypes
import sys

import psutil
import pytest

from weft.runtime.heap import trim


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_freed_blocks_below_a_live_one_are_returned() -> None:
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    libc.free.argtypes = [ctypes.c_void_p]
    size, count = 64 << 10, 1600  # 100 MiB in blocks below the mmap threshold
    blocks = [libc.malloc(size) for _ in range(count)]
    for block in blocks:
        ctypes.memset(block, 1, size)
    for block in blocks[:-1]:  # the last one keeps the heap's top where it is
        libc.free(block)
    before = psutil.Process().memory_info().rss
    assert trim(0)
    assert before - psutil.Process().memory_info().rss > 50 << 20
    libc.free(blocks[-1])


def test_little_idle_memory_is_kept() -> None:
    assert not trim(1 << 40)
