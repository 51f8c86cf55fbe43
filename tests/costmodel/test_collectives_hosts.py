"""The emulated hosts of `benchmarks/cluster`: what runs in them, and that nothing of them stays."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "cluster"))

from hosts import Hosts, Topology, missing  # noqa: E402
from network import Measured, error, fit  # noqa: E402

from weft.costmodel.collectives_gloo import OpCosts, Place  # noqa: E402

emulated = pytest.mark.skipif(bool(missing()), reason=missing() or "namespaces can be had")


def spaces() -> str:
    return subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout


@emulated
def test_ranks_see_their_place_and_their_hosts_address(tmp_path: Path) -> None:
    code = (
        "import os, pathlib, socket\n"
        "server = socket.create_server((os.environ['MASTER_ADDR'], 5000)) "
        "if os.environ['RANK'] == '0' else None\n"
        f"pathlib.Path({str(tmp_path)!r}, os.environ['RANK']).write_text("
        "os.environ['GLOO_SOCKET_IFNAME'] + os.environ['WORLD_SIZE'])\n"
    )
    with Hosts(Topology(2, 1)) as hosts:
        hosts.run([sys.executable, "-c", code], timeout_s=30)
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["em02", "em02"]


@emulated
def test_nothing_stays_after_a_failure() -> None:
    before = spaces()
    with pytest.raises(RuntimeError, match="rank 1 ended with status 3"), Hosts(Topology(2, 1)) as hosts:
        assert spaces() != before
        code = "import os, sys, time; sys.exit(3) if os.environ['RANK'] == '1' else time.sleep(60)"
        hosts.run([sys.executable, "-c", code], timeout_s=30)
    assert spaces() == before


@emulated
def test_nothing_stays_when_the_network_cannot_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    before = spaces()
    monkeypatch.setattr("hosts._MTU", 10)  # less than a link may have
    with pytest.raises(RuntimeError, match="mtu 10"), Hosts(Topology(2, 1)):
        pass
    assert spaces() == before


@pytest.mark.parametrize("change", [{"hosts": 0}, {"ranks": 0}, {"rate_mbit": 0}, {"delay_us": -1}])
def test_a_network_that_cannot_be_is_refused(change: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        Topology(**{"hosts": 2, "ranks": 1, **change})


def test_without_namespaces_ranks_are_plain_processes(tmp_path: Path) -> None:
    code = f"import os, pathlib; pathlib.Path({str(tmp_path)!r}, os.environ['RANK']).touch()"
    with Hosts(Topology(2, 1), emulated=False) as hosts:
        hosts.run([sys.executable, "-c", code], timeout_s=30)
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1"}


def test_a_fit_recovers_the_numbers_that_made_the_times() -> None:
    true = OpCosts(80.0, 150.0, 400.0, 0.6, 0.3, 0.9)
    rows = []
    for ranks, per_host in ((2, 1), (4, 1), (2, 2), (4, 4)):
        place = Place(ranks, per_host, 1.25e8, 1e-3)
        for size in (1e3, 1e5, 1e6, 1e7):
            rows.append(Measured("all_reduce", size, place,
                                 true.time_us("all_reduce", size, place) * 1e-6))  # fmt: skip
    assert error(fit(rows), rows) < 3
