"""Checkpoints: any plan to any plan, damage, full disks, two writers; one process plays all ranks."""

from __future__ import annotations

import fcntl
import os
import pickle
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from weft.ir.errors import RunError
from weft.ir.parser import parse_module
from weft.ir.types import DTYPES, B, Mesh, S, TensorType, illegal_placement, local_shape
from weft.runtime import checkpoint_format as fmt
from weft.runtime.checkpoint import Checkpoints
from weft.runtime.checkpoint_lock import FolderLock
from weft.runtime.checkpoint_plan import Layout, ShardLoadPlanner, ShardSavePlanner
from weft.runtime.checkpoint_storage import Reader, Writer
from weft.runtime.context import TORCH_DTYPES
from weft.runtime.hf_weights import load_pretrained, save_pretrained
from weft.runtime.program import Program
from weft.runtime.shards import gather, scatter

Types = dict[str, TensorType]

ONE = """weft 1 schedule
mesh [] "cpu"

func @main(%w: f32[5, 6]{} {role = "param", name = "w"}, %b: f32[6]{} {role = "buffer", name = "b"},
 %m: f32[5, 6]{} {role = "state", name = "exp_avg/w"}) -> (f32[5, 6]{} {role = "output"}) {
  %y = mul(%w, %w) : f32[5, 6]{}
  return %y
}
"""


def save_all(path: Path, step: int, types: Types, mesh: Mesh, whole: dict[str, Tensor]) -> int:
    """What the ranks of a mesh do together in a save; the bytes of their shards' items."""
    shards = {name: scatter(whole[name], types[name], mesh) for name in types}
    ranks = range(mesh.size)
    lock = FolderLock(path)
    writers = [Writer(path, step, lock=lock) for _ in ranks]
    planners = [ShardSavePlanner(Layout(types, mesh, mesh.coord(rank))) for rank in ranks]
    plans = []
    for rank in ranks:
        planners[rank].set_up_planner({name: parts[rank] for name, parts in shards.items()})
        writers[rank].set_up_storage_writer(rank == 0)
        plans.append(writers[rank].prepare_local_plan(planners[rank].create_local_plan()))
    plans, metadata = planners[0].create_global_plan(plans)
    plans = writers[0].prepare_global_plan(plans)
    results = [
        writers[rank].write_data(planners[rank].finish_plan(plans[rank]), planners[rank]).value()
        for rank in ranks
    ]
    writers[0].finish(metadata, results)
    lock.release()
    return sum(result.size_in_bytes for part in results for result in part)


def load_rank(path: Path, types: Types, mesh: Mesh, rank: int) -> tuple[dict[str, Tensor], int]:
    """What one rank reads, and how many bytes of data files."""
    layout = Layout(types, mesh, mesh.coord(rank))
    out = {
        name: torch.zeros(local_shape(type, mesh, layout.coord), dtype=TORCH_DTYPES[type.dtype])
        for name, type in types.items()
    }
    reader = Reader(path)
    planner = ShardLoadPlanner(layout)
    planner.set_up_planner(out, reader.read_metadata())
    reader.read_data(planner.create_local_plan(), planner).wait()
    return out, reader.bytes_read


def random_tensor(type: TensorType, seed: int) -> Tensor:
    """Random bits (of a bool, random truth): NaNs and denormals have to survive too."""
    g = torch.Generator().manual_seed(seed)
    size = prod(type.shape) * DTYPES[type.dtype]
    bits = torch.randint(0, 2 if type.dtype == "bool" else 256, (size,), generator=g)
    return bits.to(torch.uint8).view(TORCH_DTYPES[type.dtype]).reshape(type.shape)


def same(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit."""
    flat = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(*flat)


@st.composite
def meshes(draw: st.DrawFn) -> Mesh:
    sizes = draw(st.lists(st.integers(1, 3), max_size=3))
    return Mesh(tuple((f"a{i}", size) for i, size in enumerate(sizes)))


@st.composite
def placed(draw: st.DrawFn, types: Types, mesh: Mesh) -> Types:
    """The types under random placements."""
    out = {}
    for name, type in types.items():
        options = [B, *(S(dim) for dim in range(len(type.shape)))]
        chosen = [draw(st.sampled_from(options)) for _ in mesh.axes]
        while illegal_placement(type, mesh, chosen):
            chosen[chosen.index(next(p for p in chosen if p != B))] = B
        out[name] = type.placed(chosen)
    return out


@st.composite
def cases(draw: st.DrawFn) -> tuple[Mesh, Types, Mesh, Types]:
    types = {}
    for number in range(draw(st.integers(1, 3))):
        dtype = draw(st.sampled_from(sorted(DTYPES)))
        shape = tuple(draw(st.lists(st.integers(0, 7), max_size=3)))
        types[f"t{number}"] = TensorType(dtype, shape)
    before, after = draw(meshes()), draw(meshes())
    return before, draw(placed(types, before)), after, draw(placed(types, after))


@settings(max_examples=80, deadline=None)
@given(cases(), st.integers(0, 1000))
def test_any_plan_loads_what_any_other_saved(
    tmp_path_factory: pytest.TempPathFactory, case: tuple[Mesh, Types, Mesh, Types], seed: int
) -> None:
    before, types, after, types_after = case
    path = tmp_path_factory.mktemp("checkpoint")
    whole = {name: random_tensor(type, seed + i) for i, (name, type) in enumerate(types.items())}
    written = save_all(path, 3, types, before, whole)
    assert written == sum(type.bytes for type in types.values())  # each byte once
    parts = [load_rank(path, types_after, after, rank)[0] for rank in range(after.size)]
    for name, type in types_after.items():
        for part, shard in zip(parts, scatter(whole[name], type, after), strict=True):
            assert same(part[name], shard), name
        if type.dtype in ("i64", "f32"):
            got = gather([part[name] for part in parts], type, after)
            assert same(got, whole[name])


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_boxes_cover_a_part_once_and_span_little(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    offsets = [data.draw(st.integers(0, n - 1)) for n in sizes]
    lengths = [data.draw(st.integers(1, n - o)) for n, o in zip(sizes, offsets, strict=True)]
    item = data.draw(st.sampled_from([1, 8, 1 << 18, 5 << 20]))  # as if elements were large
    seen = torch.zeros(sizes, dtype=torch.int32)
    for at, many in fmt.boxes(sizes, offsets, lengths, item):
        seen[tuple(slice(o, o + n) for o, n in zip(at, many, strict=True))] += 1
        strides = torch.empty(sizes, device="meta").stride()
        span = (sum((n - 1) * s for n, s in zip(many, strides, strict=True)) + 1) * item
        assert span <= max(fmt.READ_BYTES, item)
        held = prod(many) * item
        assert span - held <= max(0, prod(many) - 1) * fmt.BLOCK_BYTES
    want = torch.zeros_like(seen)
    want[tuple(slice(o, o + n) for o, n in zip(offsets, lengths, strict=True))] = 1
    assert torch.equal(seen, want)


def test_only_the_blocks_of_a_ranks_own_part_are_read(tmp_path: Path) -> None:
    line = Mesh((("x", 4),))
    shape = (64, 1 << 17)  # rows of half a block, 32 blocks in all
    whole = {"w": torch.randn(shape)}
    save_all(tmp_path, 1, {"w": TensorType("f32", shape, (B,))}, line, whole)
    total = 64 << 19
    for placement, most in ((S(0), total // 4), (B, total)):
        types = {"w": TensorType("f32", shape, (placement,))}
        for rank in range(4):
            part, read = load_rank(tmp_path, types, line, rank)
            assert read <= most + 2 * fmt.BLOCK_BYTES
            assert same(part["w"], scatter(whole["w"], types["w"], line)[rank])
    wide = (4, 1 << 21)  # rows of 8 blocks: of a split of columns only these are read
    save_all(tmp_path, 2, {"w": TensorType("f32", wide, (B,))}, line, {"w": torch.ones(wide)})
    _, read = load_rank(tmp_path, {"w": TensorType("f32", wide, (S(1),))}, line, 1)
    assert read <= (4 << 21) + 4 * fmt.BLOCK_BYTES


def test_copies_take_turns_in_writing() -> None:
    mesh = Mesh((("x", 2), ("y", 2)))
    types = {f"t{i}": TensorType("f32", (4,), (B, B)) for i in range(8)}
    owned = [Layout(types, mesh, coord).owned() for coord in mesh.coords()]
    assert [len(names) for names in owned] == [2, 2, 2, 2]


def program(seed: int = 0) -> Program:
    made = Program(parse_module(ONE))
    g = torch.Generator().manual_seed(seed)
    made.init_state(lambda name, type: torch.randn(type.shape, generator=g))
    made.set_shards({"exp_avg/w": torch.randn(5, 6, generator=g)})
    return made


def test_a_program_saves_and_loads_and_keeps_the_newest(tmp_path: Path) -> None:
    first = program()
    with Checkpoints(first) as checkpoints:
        assert not checkpoints.exists(tmp_path)
        for step in (1, 2, 3, 3):
            checkpoints.save(tmp_path, step, asynchronous=step == 2)
        checkpoints.wait()
        assert checkpoints.exists(tmp_path)
    kept = sorted(path.name for path in tmp_path.glob("step-*"))
    assert kept == ["step-00000003", "step-00000003-1"]  # nothing complete is overwritten
    assert (tmp_path / "latest").read_text().strip() == "step-00000003-1"
    second = program(1)
    assert Checkpoints(second).load(tmp_path) == 3
    for name, tensor in first.state_dict().items():
        assert same(second.state_dict()[name], tensor)


def test_an_asynchronous_save_holds_the_state_of_its_call(tmp_path: Path) -> None:
    first = program()
    want = first.state_dict()
    with Checkpoints(first) as checkpoints:
        checkpoints.save(tmp_path, 1, asynchronous=True)
        for shard in first.state_dict(full=False, copy=False).values():
            shard.zero_()
    second = program(1)
    Checkpoints(second).load(tmp_path)
    assert all(same(second.state_dict()[name], tensor) for name, tensor in want.items())


def test_plain_torch_reads_and_writes_the_same_files(tmp_path: Path) -> None:
    first = program()
    Checkpoints(first).save(tmp_path / "a", 1)
    loaded = {"w": torch.zeros(5, 6)}
    dcp.load(loaded, storage_reader=Reader(tmp_path / "a"), no_dist=True)
    assert same(loaded["w"], first.state_dict()["w"])
    roles = {"exp_avg/w": "state"}
    dcp.save(first.state_dict(), storage_writer=Writer(tmp_path / "b", 7, roles=roles), no_dist=True)
    assert Checkpoints(program(1)).load(tmp_path / "b") == 7
    with safe_open(tmp_path / "b" / "step-00000007" / "part-00000.safetensors", "pt") as file:
        assert same(file.get_tensor("w"), first.state_dict()["w"])


def failing(code: str, checkpoints: Checkpoints, path: Path, **options: Any) -> str:
    with pytest.raises(RunError) as caught:
        checkpoints.load(path, **options)
    assert caught.value.code == code
    return str(caught.value)


def test_a_checkpoint_of_another_model_shows_the_difference(tmp_path: Path) -> None:
    types = {"w": TensorType("f32", (5, 7), ()), "b": TensorType("bf16", (6,), ()),
             "extra.weight": TensorType("f32", (2,), ())}  # fmt: skip
    whole = {name: random_tensor(type, 0) for name, type in types.items()}
    save_all(tmp_path, 1, types, Mesh(), whole)
    mine = program()
    before = mine.state_dict()
    text = failing("W1102", Checkpoints(mine), tmp_path)
    assert "w: f32[5, 6] in the plan, f32[5, 7] in the checkpoint" in text
    assert "b: f32[6] in the plan, bf16[6] in the checkpoint" in text
    assert "exp_avg/w: f32[5, 6] in the plan, not in the checkpoint" in text
    assert "extra.weight: f32[2] in the checkpoint, not in the plan" in text
    assert "extra" not in failing("W1102", Checkpoints(mine), tmp_path, strict=False)
    assert all(same(mine.state_dict()[name], tensor) for name, tensor in before.items())


def test_missing_names_stay_as_they_are_unless_strict(tmp_path: Path) -> None:
    types = {"w": TensorType("f32", (5, 6), ())}
    save_all(tmp_path, 4, types, Mesh(), {"w": torch.ones(5, 6)})
    mine = program()
    before = mine.state_dict()
    assert Checkpoints(mine).load(tmp_path, strict=False) == 4
    after = mine.state_dict()
    assert same(after["w"], torch.ones(5, 6)) and same(after["b"], before["b"])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_change_to_a_file_is_noticed(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    root = tmp_path_factory.mktemp("damage")
    checkpoints = Checkpoints(program())
    checkpoints.save(root, 1)
    files = [p for p in (root / "step-00000001").iterdir()]
    path = data.draw(st.sampled_from(sorted(files)))
    content = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content[at] ^= 1 << data.draw(st.integers(0, 7))
    else:
        del content[at:]
    path.write_bytes(content)
    with pytest.raises(RunError) as caught:
        checkpoints.load(root)
    assert caught.value.code in ("W1103", "W1104")


def test_damage_names_the_file_and_the_checkpoint_to_load_instead(tmp_path: Path) -> None:
    checkpoints = Checkpoints(program())
    checkpoints.save(tmp_path, 1)
    checkpoints.save(tmp_path, 2)
    path = tmp_path / "step-00000002" / "part-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    text = failing("W1103", checkpoints, tmp_path)
    assert str(path) in text and str(tmp_path / "step-00000001") in text
    assert checkpoints.load(tmp_path / "step-00000001") == 1
    (tmp_path / "latest").write_text("../elsewhere")
    failing("W1103", checkpoints, tmp_path)
    failing("W1101", checkpoints, tmp_path / "nowhere")


def test_loading_never_unpickles(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "exploded"),)

    checkpoints = Checkpoints(program())
    checkpoints.save(tmp_path, 1)
    folder = tmp_path / "step-00000001"
    for name in (fmt.INDEX, "part-00000.safetensors"):
        good = (folder / name).read_bytes()
        (folder / name).write_bytes(pickle.dumps(Bomb()))
        failing("W1103", checkpoints, tmp_path)
        (folder / name).write_bytes(good)
    (folder / ".metadata").write_bytes(pickle.dumps(Bomb()))
    assert checkpoints.load(tmp_path) == 1
    assert not (tmp_path / "exploded").exists()


def test_a_checkpoint_of_another_version_is_refused(tmp_path: Path) -> None:
    checkpoints = Checkpoints(program())
    checkpoints.save(tmp_path, 1)
    index = tmp_path / "step-00000001" / fmt.INDEX
    index.write_text(index.read_text().replace('"format": 1', '"format": 99'))
    failing("W1104", checkpoints, tmp_path)


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """The operating system refuses to make files larger: what a full disk looks like."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path: Path, asynchronous: bool) -> None:
    first = program()
    checkpoints = Checkpoints(first)
    checkpoints.save(tmp_path, 1)
    want = first.state_dict()
    with files_of_at_most(200), pytest.raises(RunError) as caught:
        checkpoints.save(tmp_path, 2, asynchronous=asynchronous)
        checkpoints.wait()
    assert caught.value.code == "W1105" and str(tmp_path) in str(caught.value)
    assert not list(tmp_path.glob(".writing*"))  # its space is given back
    second = program(1)
    assert Checkpoints(second).load(tmp_path) == 1
    assert all(same(second.state_dict()[name], tensor) for name, tensor in want.items())
    checkpoints.save(tmp_path, 2)
    assert Checkpoints(second).load(tmp_path) == 2


def test_what_an_interrupted_save_left_is_removed_by_the_next(tmp_path: Path) -> None:
    checkpoints = Checkpoints(program())
    checkpoints.save(tmp_path, 1)
    left = tmp_path / ".writing-step-00000002"
    left.mkdir()
    (left / "part-00000.safetensors").write_bytes(b"half")
    assert checkpoints.load(tmp_path) == 1
    checkpoints.save(tmp_path, 3)
    assert not left.exists() and checkpoints.load(tmp_path) == 3


def test_two_jobs_cannot_write_to_one_folder(tmp_path: Path) -> None:
    first, second = Checkpoints(program()), Checkpoints(program())
    first.save(tmp_path, 1)
    second._locks[tmp_path.absolute()] = FolderLock(tmp_path, wait_s=0.1)
    with pytest.raises(RunError, match=f"process {os.getpid()} on ") as caught:
        second.save(tmp_path, 1)
    assert caught.value.code == "W1106"
    assert second.load(tmp_path) == 1  # reading is everyone's
    first.close()
    second.save(tmp_path, 2)
    second.close()


def test_a_plan_without_optimizer_takes_the_weights_alone(tmp_path: Path) -> None:
    first = program()
    Checkpoints(first).save(tmp_path, 5)
    forward = ONE.replace(',\n %m: f32[5, 6]{} {role = "state", name = "exp_avg/w"}', "")
    second = Program(parse_module(forward))
    assert Checkpoints(second).load(tmp_path) == 5
    assert same(second.state_dict()["w"], first.state_dict()["w"])


def test_parameters_go_through_hugging_faces_files(tmp_path: Path) -> None:
    first, second = program(), program(1)
    for folder, size in ((tmp_path / "one", 1 << 30), (tmp_path / "many", 100)):
        save_pretrained(first, folder, file_bytes=size)
        before = second.state_dict()
        load_pretrained(second, folder)
        assert same(second.state_dict()["w"], first.state_dict()["w"])
        assert same(second.state_dict()["exp_avg/w"], before["exp_avg/w"])  # not a parameter
        assert not (folder / ".writing-pretrained").exists()
    names = sorted(path.name for path in (tmp_path / "many").iterdir())
    assert names == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
                     "model.safetensors.index.json"]  # fmt: skip
    found = load_file(tmp_path / "one" / "model.safetensors")
    assert set(found) == {"w", "b"}


def test_files_of_another_model_are_refused_with_the_difference(tmp_path: Path) -> None:
    mine = program()
    save_file({"w": torch.ones(5, 7), "other": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(RunError, match=r"w: f32\[5, 6\] in the plan, f32\[5, 7\] in the file") as caught:
        load_pretrained(mine, tmp_path)
    assert caught.value.code == "W1102" and "other" in str(caught.value)
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 40)
    with pytest.raises(RunError) as caught:
        load_pretrained(mine, tmp_path)
    assert caught.value.code == "W1103"
    with pytest.raises(RunError) as caught:
        load_pretrained(mine, tmp_path / "nothing")
    assert caught.value.code == "W1101"


def test_a_full_disk_leaves_the_model_files_that_were_there(tmp_path: Path) -> None:
    first = program()
    save_pretrained(first, tmp_path)
    good = (tmp_path / "model.safetensors").read_bytes()
    with files_of_at_most(150), pytest.raises(RunError) as caught:
        save_pretrained(program(1), tmp_path)
    assert caught.value.code == "W1105"
    assert (tmp_path / "model.safetensors").read_bytes() == good
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_two_jobs_cannot_write_model_files_to_one_folder(tmp_path: Path) -> None:
    first = program()
    save_pretrained(first, tmp_path)
    good = (tmp_path / "model.safetensors").read_bytes()
    other = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    (tmp_path / ".writing-pretrained").mkdir()  # what the other job is about to publish
    with pytest.raises(RunError, match="another job writes to the folder") as caught:
        save_pretrained(program(1), tmp_path)
    assert caught.value.code == "W1105" and caught.value.hint
    assert (tmp_path / "model.safetensors").read_bytes() == good
    assert (tmp_path / ".writing-pretrained").is_dir()
    os.close(other)
    save_pretrained(program(1), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
