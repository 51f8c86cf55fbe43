"""Cluster specifications, their errors, and the meshes laid over them."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft.costmodel.cluster import meshes, parse_cluster
from weft.costmodel.cluster_json import KEY, cluster_of, to_json
from weft.costmodel.datasheet import _REQUIRED
from weft.costmodel.devices import DEVICES
from weft.ir.errors import CompileError
from weft.ir.types import Mesh


@given(
    hosts=st.integers(1, 64),
    devices=st.integers(1, 16),
    kind=st.sampled_from(sorted(DEVICES)),
)
def test_shorthand_reads_back(hosts: int, devices: int, kind: str) -> None:
    cluster = parse_cluster(f"{hosts}x{devices}:{kind}")
    assert (cluster.hosts, cluster.devices_per_host, cluster.ranks) == (
        hosts, devices, hosts * devices)  # fmt: skip
    assert cluster.device == DEVICES[kind]
    assert parse_cluster(str(cluster)) == cluster


@given(hosts=st.integers(1, 64), devices=st.integers(1, 16))
def test_every_mesh_covers_all_ranks_and_appears_once(hosts: int, devices: int) -> None:
    found = meshes(parse_cluster(f"{hosts}x{devices}:h100"))
    assert all(mesh.size == hosts * devices and mesh.device == "h100" for mesh in found)
    assert all(size > 1 for mesh in found for size in mesh.sizes)
    assert len({mesh.sizes for mesh in found}) == len(found)
    assert any(mesh.sizes == tuple(s for s in (hosts, devices) if s > 1) for mesh in found)


def test_mixed_clusters_parse_and_say_that_planning_needs_one_kind() -> None:
    cluster = parse_cluster("2x8:h100+1x4:a100")
    assert cluster.ranks == 20 and cluster.hosts == 3
    with pytest.raises(CompileError, match="one mesh cannot lie on all of") as error:
        meshes(cluster)
    assert error.value.code == "W0501" and "2x8:h100" in error.value.hint


@pytest.mark.parametrize(
    ("text", "needle"),
    [
        ("2x8:h10", "did you mean 2x8:h100"),
        ("2x8:a10", "did you mean 2x8:a100"),
        ("2x8:mi300", "did you mean 2x8:mi300x"),
        ("2x8:zzzz", "known kinds are cpu"),
        ("0x8:h100", "at least one host"),
        ("2x0:h100", "at least one host"),
        ("h100", "HOSTSxDEVICES:KIND"),
        ("2x8h100", "HOSTSxDEVICES:KIND"),
        ("2*8:h100", "HOSTSxDEVICES:KIND"),
        ("-1x8:h100", "HOSTSxDEVICES:KIND"),
        ("2x8:h100+", "HOSTSxDEVICES:KIND"),
        ("", "HOSTSxDEVICES:KIND"),
        ("99999x99999:cpu", "too many"),
        ("nowhere.toml", "cannot be read"),
    ],
)
def test_a_bad_specification_is_explained(text: str, needle: str) -> None:
    with pytest.raises(CompileError) as error:
        parse_cluster(text)
    assert error.value.code == "W0501" and needle in str(error.value)
    assert error.value.hint


@given(text=st.text(max_size=20))
def test_any_text_parses_or_is_refused_with_a_diagnostic(text: str) -> None:
    try:
        assert parse_cluster(text).ranks > 0
    except CompileError as error:
        assert error.code == "W0501"


_FILE = """
[[groups]]
device = "h100"
hosts = 2
devices = 4
[links.inter]
bytes_per_s = 1e9
latency_s = 1e-3
[device]
memory_bytes = 1e10
flops_per_s = {f32 = 5e13}
"""


def test_a_file_overrides_links_and_device(tmp_path: Path) -> None:
    path = tmp_path / "cluster.toml"
    path.write_text(_FILE)
    cluster = parse_cluster(str(path))
    assert cluster.ranks == 8 and cluster.inter.bytes_per_s == 1e9
    assert cluster.intra == DEVICES["h100"].intra
    assert cluster.device.memory_bytes == 1e10
    assert cluster.device.peak_flops_per_s("f32") == 5e13
    assert cluster.device.peak_flops_per_s("bf16") == DEVICES["h100"].peak_flops_per_s("bf16")


@pytest.mark.parametrize(
    ("old", "new", "needle"),
    [
        ('device = "h100"', 'device = "h101"', "did you mean 2x4:h100"),
        ("hosts = 2", "hosts = 0", "at least one host"),
        ("hosts = 2", 'hosts = "two"', "whole number"),
        ("hosts = 2", "", "lacks 'hosts'"),
        ("[links.inter]", "[links.iter]", "did you mean 'inter'"),
        ("latency_s = 1e-3", "latency = 1e-3", "did you mean 'latency_s'"),
        ("bytes_per_s = 1e9", "bytes_per_s = -1", "positive number"),
        ("bytes_per_s = 1e9", "bytes_per_s = nan", "positive number"),
        ("memory_bytes = 1e10", "memory_bytes = true", "positive number"),
        ("[[groups]]", "[groups]", "[[groups]]"),
        ("[device]", "[device", "not valid TOML"),
        ("{f32 = 5e13}", "5", "must be a table"),
    ],
)
def test_a_bad_file_is_explained(tmp_path: Path, old: str, new: str, needle: str) -> None:
    path = tmp_path / "cluster.toml"
    path.write_text(_FILE.replace(old, new, 1))
    with pytest.raises(CompileError) as error:
        parse_cluster(str(path))
    assert error.value.code == "W0501" and needle in str(error.value)


def test_an_axis_across_hosts_shares_the_network() -> None:
    cluster = parse_cluster("2x8:h100")
    mesh = Mesh((("host", 2), ("dev", 8)), "h100")
    assert cluster.axis_link(mesh, "dev") == cluster.intra
    assert cluster.axis_link(mesh, "host").bytes_per_s == cluster.inter.bytes_per_s
    flat = cluster.axis_link(Mesh((("rank", 16),), "h100"), "rank")
    assert cluster.inter.bytes_per_s < flat.bytes_per_s <= cluster.intra.bytes_per_s
    assert flat.latency_s == cluster.inter.latency_s


@pytest.mark.parametrize("kind", sorted(DEVICES))
def test_each_device_has_sane_numbers(kind: str) -> None:
    device = DEVICES[kind]
    for dtype in ("f64", "f32", "bf16", "f16", "f8e4m3", "i64"):
        assert 1e10 < device.peak_flops_per_s(dtype) < 1e17
    assert device.source and device.launch_us > 0
    assert 1e9 < device.memory_bytes < 1e12 and 1e9 < device.dram_bytes_per_s < 1e14
    assert device.inter.bytes_per_s <= device.intra.bytes_per_s


def test_each_group_has_hardware_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "mixed.toml"
    file.write_text("""
[device]
launch_us = 2.0
[links.inter]
latency_s = 1e-5
[[groups]]
device = "h100"
hosts = 2
devices = 8
[[groups]]
device = "a100"
hosts = 1
devices = 4
[groups.numbers]
memory_bytes = 4e10
[groups.links.inter]
bytes_per_s = 1e9
""")
    cluster = parse_cluster(str(file))
    one, two = cluster.part(0), cluster.part(1)
    assert (one.device.kind, two.device.kind) == ("h100", "a100")
    assert (one.device.memory_bytes, two.device.memory_bytes) == (80e9, 4e10)
    assert one.device.launch_us == two.device.launch_us == 2.0
    assert one.inter.latency_s == two.inter.latency_s == 1e-5
    assert (one.inter.bytes_per_s > 1e9, two.inter.bytes_per_s) == (True, 1e9)
    assert cluster.host_groups() == [0, 0, 1] and cluster.in_order([0, 1]) == cluster
    turned = cluster.in_order([1, 0])
    assert str(turned) == "1x4:a100+2x8:h100" and turned.part(1) == one
    assert cluster_of({KEY: to_json(cluster)}) == cluster


def test_a_file_is_about_the_group_ahead_of_it(tmp_path: Path) -> None:
    file = tmp_path / "new+1.toml"
    numbers: dict[str, object] = dict.fromkeys(_REQUIRED, 100.0)
    numbers |= {"name": '"new"', "mem_gb": 7.0}
    file.write_text("".join(f"{key} = {value}\n" for key, value in numbers.items()))
    plain = parse_cluster("1x8:h100+2x8:a100")
    first = parse_cluster(f"1x8:h100@{file}+2x8:a100")
    assert first.device.memory_bytes == 7e9 and first.others == plain.others
    last = parse_cluster(f"1x8:h100+2x8:a100@{file}")
    assert last.device == plain.device and last.others[0].device.memory_bytes == 7e9
