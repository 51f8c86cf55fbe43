"""An artifact is written whole or not at all, and read only as it was written."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from weft.frontend.artifact import ArtifactWriter, check_target
from weft.ir.errors import CompileError, RunError
from weft.ir.module import Function, Module, Op
from weft.ir.text import print_module
from weft.runtime.artifact import FORMAT, Artifact, content_hash, file_hash, plan_hash

INFO: dict[str, Any] = {
    "weft": "test", "torch": "2", "target": "main", "cluster": "1x1:cpu", "mesh": "one rank", "ranks": 1,
    "predicted": {"step_us": 1.0, "memory_bytes": 2}, "dumps": ["ir/00-trace.weft"], "made_by": ["trace"],
    "meta": {},
}  # fmt: skip


def fill(writer: ArtifactWriter, first: float) -> None:
    with writer:
        writer.text("ir/00-trace.weft", print_module(Module("logical", (Function("main", (), (), ()),))))
        writer.tensors("weights", {"w": torch.arange(first, first + 6).reshape(2, 3)})
        writer.commit(INFO)


def write(path: Path) -> Path:
    fill(ArtifactWriter(path), 0.0)
    return path


@pytest.mark.parametrize(
    ("field", "value"),
    [("dumps", []), ("dumps", ["../secret.weft"]), ("dumps", [3]), ("made_by", []), ("ranks", "2"), ("ranks", True),
     ("predicted", {}), ("meta", []), ("cluster", None)],
)  # fmt: skip
def test_a_manifest_with_right_hashes_and_a_wrong_field_is_refused(
    tmp_path: Path, field: str, value: Any
) -> None:
    plan = write(tmp_path / "out") / "plan.json"
    info = {**json.loads(plan.read_text()), field: value}
    plan.write_text(json.dumps({**info, "plan_hash": plan_hash(info)}))
    with pytest.raises(RunError, match="is not a plan") as error:
        Artifact.open(tmp_path / "out")
    assert error.value.code == "W0701" and error.value.reason and error.value.hint


@pytest.mark.parametrize("name", ["../secret.weft", "/etc/hostname", "ir/../../secret.weft", ""])
def test_a_manifest_that_names_a_file_outside_is_refused_and_the_file_not_read(
    tmp_path: Path, name: str
) -> None:
    plan = write(tmp_path / "out") / "plan.json"
    (tmp_path / "secret.weft").write_text("weft 1 logical")
    info = json.loads(plan.read_text())
    info["files"][name] = file_hash(tmp_path / "secret.weft")
    info["content_hash"] = content_hash(info["files"])
    plan.write_text(json.dumps({**info, "plan_hash": plan_hash(info)}))
    with pytest.raises(RunError, match="is not a plan") as error:
        Artifact.open(tmp_path / "out")
    assert "is not a file of the folder" in error.value.reason


@pytest.mark.parametrize("path", [None, 3, ["out"], "a\0b", 1.5])
def test_what_is_no_path_is_refused(path: Any) -> None:
    with pytest.raises(RunError, match="must be the path") as error:
        Artifact.open(path)
    assert error.value.code == "W1001"


def test_a_program_that_calls_what_it_does_not_have_is_refused(tmp_path: Path) -> None:
    """Hashes say that a file is as it was written, not that a plan made it."""
    call = Op("call", (), (), {"callee": "gone"})
    with ArtifactWriter(tmp_path / "out") as writer:
        writer.text("ir/00-trace.weft", print_module(Module("logical", (Function("main", (), (call,), ()),))))
        writer.commit(INFO)
    with pytest.raises(CompileError, match="no function @gone"):
        Artifact.open(tmp_path / "out").module()


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    artifact = Artifact.open(write(tmp_path / "out"))
    assert artifact.module().entry.name == "main"
    assert torch.equal(artifact.tensors("weights")["w"], torch.arange(6.0).reshape(2, 3))
    assert artifact.tensors("inputs") == {}


def test_writing_again_replaces_and_leaves_nothing_behind(tmp_path: Path) -> None:
    write(tmp_path / "out")
    write(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_same_content_has_the_same_hash(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a"), write(tmp_path / "b")
    hashes = [Artifact.open(path).info["content_hash"] for path in (first, second)]
    assert hashes[0] == hashes[1]


@pytest.mark.parametrize("name", ["ir/00-trace.weft", "weights.safetensors", "plan.json"])
def test_every_flipped_byte_is_found(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path / "out")
    good = (folder / name).read_bytes()
    for position in range(0, len(good), max(1, len(good) // 25)):
        bad = bytearray(good)
        bad[position] ^= 0x04
        (folder / name).write_bytes(bytes(bad))
        with pytest.raises(RunError) as caught:
            Artifact.open(folder)
        assert caught.value.code in ("W0701", "W0702")


def test_a_missing_file_and_a_missing_plan_are_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "out")
    (folder / "weights.safetensors").unlink()
    with pytest.raises(RunError, match="weights.safetensors is missing"):
        Artifact.open(folder)
    with pytest.raises(RunError, match="not an artifact folder"):
        Artifact.open(tmp_path)


def test_another_version_is_refused_by_name(tmp_path: Path) -> None:
    folder = write(tmp_path / "out")
    info = json.loads((folder / "plan.json").read_text())
    info["format"], info["weft"] = FORMAT + 1, "9.9"
    info["plan_hash"] = plan_hash(info)
    (folder / "plan.json").write_text(json.dumps(info))
    with pytest.raises(RunError, match=r"W0702.*") as caught:
        Artifact.open(folder)
    assert "weft 9.9" in str(caught.value)


def test_an_interrupted_write_leaves_the_old_artifact(tmp_path: Path) -> None:
    folder = write(tmp_path / "out")
    with pytest.raises(KeyboardInterrupt), ArtifactWriter(folder) as writer:
        writer.text("ir/00-trace.weft", "half")
        raise KeyboardInterrupt
    assert Artifact.open(folder).module().entry.name == "main"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("old", [False, True])
def test_of_two_jobs_that_write_one_folder_the_later_is_refused(tmp_path: Path, old: bool) -> None:
    target = tmp_path / "out"
    if old:
        fill(ArtifactWriter(target), 5.0)
    with ArtifactWriter(target) as slow, pytest.raises(CompileError, match="another job") as caught:
        write(target)
        fill(slow, 7.0)
    assert caught.value.code == "W1001" and caught.value.reason and caught.value.hint
    assert torch.equal(Artifact.open(target).tensors("weights")["w"], torch.arange(6.0).reshape(2, 3))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_jobs_that_write_the_same_to_one_folder_at_once_leave_it_whole(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, [tmp_path / "out"] * 40))
    assert Artifact.open(tmp_path / "out").module().entry.name == "main"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_of_something_else_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("keep")
    with pytest.raises(CompileError, match="is not an artifact"):
        ArtifactWriter(tmp_path)


def test_a_full_disk_is_told_and_leaves_the_old_artifact(tmp_path: Path) -> None:
    folder = write(tmp_path / "out")
    for error in (OSError(28, "No space left on device"), SafetensorError("I/O error")):
        with pytest.raises(CompileError, match="cannot be written") as caught:
            with ArtifactWriter(folder) as writer:
                writer.text("ir/00-trace.weft", "half")
                raise error
        assert str(error) in str(caught.value)
        assert Artifact.open(folder).module().entry.name == "main"
        assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_place_that_takes_no_folder_is_told_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("text")
    with pytest.raises(CompileError, match="file is not a folder that can be written"):
        check_target(tmp_path / "file" / "out")
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)  # read-only
    with pytest.raises(CompileError, match="cannot be written"):
        check_target(tmp_path / "new" / "out")
