"""What a binary needs: without disassembling it where its PTX says that nothing would be found."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.codegen.kit import only_kernel
from tests.codegen.programs import PROGRAMS

from weft.codegen import binary
from weft.codegen.binary import resources
from weft.codegen.compile import available, compile_kernel
from weft.codegen.source import generate

pytestmark = pytest.mark.skipif(not available(), reason="Triton is missing")


@pytest.mark.parametrize("target", ["cuda:80", "cuda:90"])
def test_instructions_are_counted_as_the_disassembler_counts_them(
    target: str, tmp_path: Path
) -> None:
    source = generate(only_kernel(PROGRAMS["swiglu"]("bf16", (4, 8), 64)))
    found = compile_kernel(source, target)
    disassembled = resources(found.cubin, found.resources.shared_bytes, tmp_path)
    assert found.resources == disassembled and found.resources.instructions > 0


def test_what_ptx_names_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any matrix instruction or asynchronous copy in the PTX has the binary disassembled."""
    found = compile_kernel(generate(only_kernel(PROGRAMS["swiglu"]("bf16", (4, 8), 64))), "cuda:90")
    asked: list[str] = []
    ask = binary._cuobjdump
    monkeypatch.setattr(
        binary, "_cuobjdump", lambda path, option: asked.append(option) or ask(path, option)
    )
    for line in ("mma.sync.aligned.m16n8k16", "wgmma.mma_async.sync", "wmma.load.a.sync",
                 "cp.async.cg.shared.global", "tcgen05.mma.cta_group::1", "add.f32"):  # fmt: skip
        asked.clear()
        resources(found.cubin, 0, tmp_path, f"\t{line} x;")
        assert ("-sass" in asked) == (line != "add.f32"), line
