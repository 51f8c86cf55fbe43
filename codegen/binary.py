"""What a compiled kernel needs and which matrix instructions it has, read from the binary itself."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from ..ir.errors import CompileError
from ..runtime.cubin import read_cubin

#: cuobjdump answers in well under a second; a machine that does much else takes longer
_TOOL_TIMEOUT_S = 200
#: Matrix instructions: of NVIDIA up to sm_8x (HMMA, IMMA, QMMA, DMMA), wgmma of sm_90 (HGMMA, IGMMA,
#: QGMMA), tcgen05 of sm_100 (UTCHMMA, UTCQMMA, UTCIMMA); CUDA binary utilities, instruction sets.
_SASS = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Za-z0-9_.]*)", re.M)
_MATRIX = re.compile(r"(?:[HIQDB]G?MMA|UTC\w*MMA)\b")
_ASYNC = ("LDGSTS", "UTMALDG", "UBLKCP")
#: PTX that becomes one of these: mma, wmma, wgmma, tcgen05, cp.async (PTX ISA)
_NOTABLE = re.compile(r"\b(?:w?g?mma|tcgen05|cp)\.")


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel needs.

    Attributes:
        registers: per thread.
        spill_bytes: stack and local memory per thread: registers that did not fit.
        shared_bytes: shared memory per program.
        instructions: of the whole kernel.
        matrix: its most frequent matrix instruction, such as `HGMMA.64x256x16.F32.BF16`; or empty.
        async_copies: instructions that copy from global to shared memory past the registers.
    """

    registers: int
    spill_bytes: int
    shared_bytes: int
    instructions: int = 0
    matrix: str = ""
    async_copies: int = 0


def resources(cubin: bytes, shared: int, folder: Path, ptx: str | None = None) -> Resources:
    """Read a cubin with the `cuobjdump` that comes with Triton, through a file in `folder`.

    Args:
        ptx: what the cubin was made of. Where it has nothing that is looked for, the cubin is not
            disassembled, which would take longer than all else.

    Raises CompileError W0901 without an answer.
    """
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    match = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", _cuobjdump(path, "-res-usage"))
    if match is None:
        raise CompileError(
            "W0901", "the resources of a kernel cannot be read", reason="cuobjdump gave no answer",
            hint="reinstall Triton: its wheel holds the tool",
        )  # fmt: skip
    registers, stack, local = map(int, match.groups())
    if ptx is not None and not _NOTABLE.search(ptx):
        return Resources(registers, stack + local, shared, read_cubin(cubin).instructions)
    mnemonics = Counter(_SASS.findall(_cuobjdump(path, "-sass")))
    copies = sum(n for name, n in mnemonics.items() if name.startswith(_ASYNC))
    return Resources(registers, stack + local, shared, mnemonics.total(),
                     _first(mnemonics, _MATRIX), copies)  # fmt: skip


def hip_resources(assembly: str, shared: int) -> Resources:
    """The same from the assembly of an AMD kernel: its metadata, and its mnemonics."""

    def field(name: str) -> int:
        match = re.search(rf"\.{name}:\s+(\d+)", assembly)
        return int(match[1]) if match else 0

    mnemonics = Counter(re.findall(r"^\t([a-z]\w+)(?=\s|$)", assembly, re.M))
    spilled = field("private_segment_fixed_size")
    return Resources(field("vgpr_count"), spilled, shared, mnemonics.total(),
                     _first(mnemonics, re.compile("v_s?mfma")))  # fmt: skip


def _first(mnemonics: Counter[str], kind: re.Pattern[str]) -> str:
    """The most frequent mnemonic of a kind."""
    return next((name for name, _ in mnemonics.most_common() if kind.match(name)), "")


def _cuobjdump(path: Path, option: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.is_file():
        return ""
    run = subprocess.run([str(tool), option, str(path)], capture_output=True, text=True,
                         timeout=_TOOL_TIMEOUT_S, check=False)  # fmt: skip
    return run.stdout + run.stderr


__all__ = ["Resources", "hip_resources", "resources"]
