"""Configurations chosen from the compiler's report."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.codegen.kit import only_kernel
from tests.codegen.programs import PROGRAMS

from weft.codegen.compile import available
from weft.codegen.emit import emit_kernels
from weft.codegen.tune import candidates
from weft.costmodel.datasheet import find_datasheet
from weft.ir.module import Module

pytestmark = pytest.mark.skipif(not available(), reason="Triton is not installed")


@pytest.mark.parametrize("name", ["swiglu", "residual_rms_norm"])
def test_the_best_few_fit_and_are_ranked(name: str, tmp_path: Path) -> None:
    function = only_kernel(PROGRAMS[name]("bf16", (16, 128), 4096))
    sheet = find_datasheet("h200")
    found = candidates(function, None, "cuda:90", sheet, cache=tmp_path)
    assert len(found) == 3
    least = min(c.predicted_us for c in found)
    # never under the time of the bytes alone; equal ones (2 %) by the bytes on their way
    assert least >= found[0].source.bytes_moved / (sheet.mem_gbs * 1e3)
    assert found[0].predicted_us <= 1.02 * least
    for candidate in found:
        needs, threads = candidate.binary.resources, candidate.binary.threads
        assert needs.spill_bytes == 0 and threads == 32 * candidate.source.warps
        assert 1 <= candidate.programs <= 65536 // (needs.registers * threads)
    again = candidates(function, None, "cuda:90", sheet, cache=tmp_path)
    assert [c.source for c in again] == [c.source for c in found]


def test_the_artifact_has_the_chosen_configuration(tmp_path: Path) -> None:
    module = Module("logical", (only_kernel(PROGRAMS["swiglu"]("bf16", (16, 128), 4096)),))
    (entry,) = emit_kernels(module, tmp_path, "h100", tune=True)["kernels"]
    assert entry["constants"] == entry["candidates"][0]["constants"]
    assert entry["warps"] == entry["candidates"][0]["warps"]
    assert entry["registers"] == entry["candidates"][0]["registers"] and "binary" in entry
