"""Calibration: few samples shift the model, files are checked, kernels to measure are unlike each other."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from weft.costmodel.calibrate_choose import candidates, choose
from weft.costmodel.calibration import (
    Calibration,
    Sample,
    batch_of,
    read_calibration,
    to_text,
    write_calibration,
)
from weft.costmodel.cluster import about_all, parse_cluster
from weft.costmodel.datasheet import find_datasheet
from weft.costmodel.estimate import sharing
from weft.costmodel.kernel_fewshot import adapt
from weft.costmodel.kernel_model import shipped
from weft.ir.errors import CompileError

CPU, FAR = find_datasheet("cpu"), find_datasheet("RTX-PRO-6000-Server")


def measured(factor: float, count: int = 32, device: str = "far") -> Calibration:
    """A machine that is `factor` times as slow as the model says."""
    sheet = FAR if device == "far" else CPU
    chosen = choose(sheet, candidates(sheet, 1e4), count)
    samples = []
    for family in dict.fromkeys(s.family for s in chosen):
        own = [s for s in chosen if s.family == family]
        times = factor * shipped().centre_us(batch_of(sheet, own)[0])
        samples += [replace(s, time_us=float(t)) for s, t in zip(own, times, strict=True)]
    return Calibration("cpu", sheet, 9.0, 2, {"flops_per_s": 1e11}, tuple(samples))


@pytest.mark.parametrize("factor", [0.7, 1.0, 1.5])
def test_samples_shift_kernels_that_were_not_measured(factor: float) -> None:
    found = measured(factor, 64)
    pool = [s for s in candidates(FAR, 1e4) if s.family == "gemm"][5::40]
    batch = batch_of(FAR, pool)[0]
    before, after = shipped().estimates(batch), found.adapter.estimates(batch)
    ratio = after.time_us / before.time_us
    assert np.median(np.abs(ratio / factor - 1)) < 0.08
    assert np.mean(after.high_us / after.low_us) < np.mean(before.high_us / before.low_us)
    assert (after.low_us <= after.time_us).all() and (after.time_us <= after.high_us).all()


def test_one_wild_sample_does_not_move_what_is_far_from_it() -> None:
    sample = candidates(FAR, 1e4)[0]
    batch, _ = batch_of(FAR, [sample])
    expected = shipped().centre_us(batch)
    adapter = adapt(shipped(), [(batch, 1.05 * expected)])
    attention = [s for s in candidates(FAR, 1e4) if s.family == "attention"]
    other = batch_of(FAR, attention)[0]
    moved = adapter.estimates(other).time_us / shipped().centre_us(other)
    assert np.abs(moved - 1).max() < 0.03


def test_samples_that_confirm_the_model_leave_it_alone() -> None:
    rng = np.random.default_rng(0)
    batch, _ = batch_of(FAR, [s for s in candidates(FAR, 1e4) if s.family == "gemm"])
    chosen = np.sort(rng.permutation(len(batch.index))[:64])
    expected = shipped().centre_us(batch)
    few = batch.take(chosen).compact()
    noise = np.exp2(0.05 * rng.normal(size=len(expected)))
    found = adapt(shipped(), [(few, (expected * noise)[chosen])]).estimates(batch)
    assert np.abs(found.time_us / expected - 1).max() < 0.03
    inside = (found.low_us <= expected * noise) & (expected * noise <= found.high_us)
    assert inside.mean() > 0.9
    # and the interval becomes as narrow as the errors are
    assert np.median(found.high_us / found.low_us) < 1.6


def test_a_file_reads_back_and_is_applied_to_a_cluster(tmp_path: Path) -> None:
    found, path = measured(1.2, 8, "cpu"), tmp_path / "deep" / "here.json"
    write_calibration(found, path)
    assert to_text(read_calibration(path)) == path.read_text()
    cluster = parse_cluster(f"1x4:cpu@{path}")
    assert cluster.device.launch_us == 9.0 and cluster.device.cores == 2
    assert cluster.device.calibration is parse_cluster(f"1x4:cpu@{path}").device.calibration
    assert [p.name for p in path.parent.iterdir()] == ["here.json"]


def test_a_calibration_is_about_the_groups_of_its_kind(tmp_path: Path) -> None:
    path = tmp_path / "here.json"
    write_calibration(measured(1.2, 8, "cpu"), path)
    mixed = parse_cluster(about_all("1x4:cpu+1x2:h100+2x2:CPU", str(path)))
    assert [h.device.calibration is not None for h in mixed.hardware] == [True, False, True]
    assert about_all("1x4:cpu", str(path)) == f"1x4:cpu@{path}"
    with pytest.raises(CompileError, match="measured on cpu"):
        parse_cluster(about_all("1x4:h100+1x2:a100", str(path)))


def test_damaged_and_foreign_files_are_refused(tmp_path: Path) -> None:
    text, path = to_text(measured(1.2, 4, "cpu")), tmp_path / "c.json"
    broken = json.loads(text)
    broken["launch_us"] = 0.1
    for content in (
        "",
        "{",
        "[]",
        '{"format": "other"}',
        text[:200],
        json.dumps(broken),
        "[" * 100000,
    ):
        path.write_text(content)
        with pytest.raises(CompileError, match="W1302"):
            read_calibration(path)
    path.write_text(text)
    with pytest.raises(CompileError, match="measured on cpu"):
        parse_cluster(f"1x4:h100@{path}")
    with pytest.raises(CompileError, match="W1302"):
        parse_cluster(f"1x4:cpu@{tmp_path / 'missing.json'}")


def test_kernels_to_measure_are_few_distinct_and_the_same_each_time() -> None:
    pool = candidates(CPU, 1e5)
    chosen = choose(CPU, pool, 64)
    assert 32 <= len(chosen) <= 64 and chosen == choose(CPU, pool, 64)
    keys = {(s.op, tuple(s.sizes.values())) for s in chosen}
    assert len(keys) == len(chosen)
    assert {s.family for s in chosen} == {"gemm", "rowwise"}
    batch, _ = batch_of(CPU, [s for s in chosen if s.family == "gemm"])
    assert np.ptp(np.log2(shipped().centre_us(batch))) > 8


def test_ranks_that_share_cores_are_slower(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text('[[groups]]\ndevice = "cpu"\nhosts = 1\ndevices = 4\n[device]\ncores = 2\n')
    assert sharing(parse_cluster(str(path))) == 2
    assert sharing(parse_cluster("1x4:cpu")) == 1


def test_a_sample_of_an_unknown_family_is_refused(tmp_path: Path) -> None:
    found = measured(1.0, 4, "cpu")
    odd = replace(found, samples=(Sample("magic", "x", "fp32", "", "", "", {"M": 1.0}, 1.0),))
    path = tmp_path / "odd.json"
    write_calibration(odd, path)
    with pytest.raises(CompileError, match="magic"):
        read_calibration(path)
