"""A cluster survives JSON with every number; what is none is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from weft.costmodel.cluster import parse_cluster
from weft.costmodel.cluster_json import KEY, cluster_of, to_json
from weft.ir.errors import CompileError

TOML = """
[[groups]]
device = "cpu"
hosts = 2
devices = 2
[links.inter]
bytes_per_s = 1e6
latency_s = 3e-3
[device]
memory_bytes = 7e9
"""


def info(text: str) -> dict[str, Any]:
    cluster = parse_cluster(text)
    read: dict[str, Any] = json.loads(json.dumps({"cluster": str(cluster), KEY: to_json(cluster)}))
    return read


@pytest.mark.parametrize("text", ["1x1:cpu", "2x8:h100", "4x8:mi300x+1x4:a100"])
def test_a_cluster_comes_back(text: str) -> None:
    assert cluster_of(info(text)) == parse_cluster(text)


def test_numbers_of_a_file_come_back_without_the_file(tmp_path: Path) -> None:
    path = tmp_path / "slow.toml"
    path.write_text(TOML)
    said, expected = info(str(path)), parse_cluster(str(path))
    path.unlink()
    found = cluster_of(said)
    assert found == expected and found.inter.latency_s == 3e-3
    assert found != parse_cluster("2x2:cpu") == cluster_of({"cluster": "2x2:cpu"})


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (["intra", "bytes_per_s"], 0), (["intra", "bytes_per_s"], "fast"), (["groups"], []),
        (["inter", "latency_s"], -1.0), (["groups", 0, "hosts"], 1.5), (["device"], None),
        (["device", "flops_per_s"], [["f32"]]), (["device", "memory_bytes"], float("nan")),
        (["groups", 0, "hosts"], True), (["inter"], {}), ([], []),
    ],
)  # fmt: skip
def test_what_is_no_cluster_is_told(keys: list[Any], value: Any) -> None:
    said = info("2x2:cpu")
    at: Any = said
    for key in (path := [KEY, *keys])[:-1]:
        at = at[key]
    at[path[-1]] = value
    with pytest.raises(CompileError, match="W0501"):
        cluster_of(said)
