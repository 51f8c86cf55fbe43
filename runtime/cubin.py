"""What a cubin says of itself: argument layout, registers, stack, threads, CUDA version.

Read from the ELF sections `.nv.info` that ptxas writes: records of a format byte, an attribute byte
and two bytes that are the value itself, or the length of what follows for format 4. The attributes
are those that `cuobjdump -elf` prints as EIATTR_*.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

#: a record whose value follows
_SIZED = 4
_REQNTID, _FRAME_SIZE, _MIN_STACK_SIZE, _KPARAM_INFO = 0x10, 0x11, 0x12, 0x17
_REGCOUNT, _CUDA_API_VERSION = 0x2F, 0x37
_INFO = ".nv.info."
#: of sm_70 and up (CUDA binary utilities; Jia et al., Dissecting the Volta GPU, 2018)
_INSTRUCTION_BYTES = 16


class BadCubin(ValueError):
    """The bytes are no cubin with one kernel; the message says why."""


@dataclass(frozen=True)
class CubinInfo:
    """What a cubin with one kernel needs.

    Attributes:
        entry: the kernel's name.
        parameters: (offset, size) in bytes of each argument, hidden ones included, in order.
        registers: per thread.
        stack_bytes: local memory per thread; spilled registers among it.
        threads: per program; 0 where the binary leaves it open.
        cuda: version of the CUDA toolkit that made it, such as 12090 for 12.9.
        instructions: of the kernel, those that fill up its last line included.
    """

    entry: str
    parameters: tuple[tuple[int, int], ...]
    registers: int
    stack_bytes: int
    threads: int
    cuda: int
    instructions: int


def read_cubin(content: bytes) -> CubinInfo:
    """Read a cubin. Raises BadCubin for anything else."""
    try:
        sections = dict(_sections(content))
        (name,) = [name for name in sections if name.startswith(_INFO)]
        parameters, threads, cuda, registers, stack = {}, 0, 0, 0, 0
        for attribute, value in (*_records(sections[".nv.info"]), *_records(sections[name])):
            if attribute == _KPARAM_INFO:
                # index, ordinal, offset, then 14 bits of size above 18 of alignment and space
                _, ordinal, offset, packed = struct.unpack("<IHHI", value)
                parameters[ordinal] = (offset, packed >> 18)
            elif attribute == _REQNTID:
                threads = struct.unpack_from("<I", value)[0]
            elif attribute == _CUDA_API_VERSION:
                version = struct.unpack_from("<I", value)[0]
                cuda = version // 10 * 1000 + version % 10 * 10
            elif attribute == _REGCOUNT:
                registers = struct.unpack_from("<II", value)[1]
            elif attribute in (_FRAME_SIZE, _MIN_STACK_SIZE):
                stack = max(stack, struct.unpack_from("<II", value)[1])
    except (struct.error, KeyError, ValueError, IndexError) as error:
        raise BadCubin(f"not a cubin with one kernel: {error}") from None
    if sorted(parameters) != list(range(len(parameters))):
        raise BadCubin("its arguments are not numbered from 0")
    layout = tuple(parameters[i] for i in range(len(parameters)))
    entry = name[len(_INFO):]
    instructions = len(sections.get(f".text.{entry}", b"")) // _INSTRUCTION_BYTES
    return CubinInfo(entry, layout, registers, stack, threads, cuda, instructions)


def _sections(content: bytes) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the sections of a 64-bit ELF file."""
    if content[:5] != b"\x7fELF\x02":
        raise BadCubin("not a 64-bit ELF file")
    (table,) = struct.unpack_from("<Q", content, 40)
    size, count, names = struct.unpack_from("<HHH", content, 58)
    headers = [struct.unpack_from("<IIQQQQ", content, table + i * size) for i in range(count)]
    strings = headers[names][4]
    for name, kind, _, _, offset, length in headers:
        start = strings + name
        text = content[start : content.index(b"\0", start)].decode()
        yield text, content[offset : offset + length] if kind != 8 else b""  # 8: no bytes in the file


def _records(section: bytes) -> Iterator[tuple[int, bytes]]:
    position = 0
    while position < len(section):
        form, attribute, size = struct.unpack_from("<BBH", section, position)
        position += 4
        if form == _SIZED:
            yield attribute, section[position : position + size]
            position += size
