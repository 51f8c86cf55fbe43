"""Emulated hosts: network namespaces on one machine, with a real rate and a real delay between them.

    with Hosts(Topology(2, 1, rate_mbit=1000, delay_us=1000)) as hosts:
        hosts.run([sys.executable, "worker.py"])

Needs root, `ip` and `tc` (iproute2), gcc and /dev/net/tun. `missing()` says what is not there;
without them `Hosts` starts plain local processes, which share one network without delay.
Everything is taken down again on the way out, whatever happened; what a killed process left, by the
next one.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

_PREFIX = "weft-host-"
_MTU = 9000
_ADDRESS = "10.77.0.{}"
_SETTINGS = (
    "net.ipv4.tcp_slow_start_after_idle=0", "net.ipv4.tcp_no_metrics_save=1",
    "net.ipv4.tcp_rmem=4096 1048576 33554432", "net.ipv4.tcp_wmem=4096 1048576 33554432",
)  # fmt: skip


@dataclass(frozen=True)
class Topology:
    """Hosts and what is between them.

    Attributes:
        hosts: number of hosts.
        ranks: processes on each.
        rate_mbit: rate of a host's network card, each direction.
        delay_us: one-way delay between two hosts.

    Raises ValueError for numbers that no network has.
    """

    hosts: int
    ranks: int
    rate_mbit: float = 1000.0
    delay_us: float = 1000.0

    def __post_init__(self) -> None:
        if self.hosts < 1 or self.ranks < 1:
            raise ValueError(f"hosts and ranks must be at least 1, got {self.hosts}x{self.ranks}")
        if not 0 < self.rate_mbit < float("inf") or not 0 <= self.delay_us < float("inf"):
            raise ValueError(f"rate_mbit {self.rate_mbit} or delay_us {self.delay_us} is impossible")

    @property
    def world(self) -> int:
        """All processes."""
        return self.hosts * self.ranks

    def __str__(self) -> str:
        name = f"{self.hosts}x{self.ranks}"
        return name if self.hosts == 1 else f"{name} {self.rate_mbit:g} Mbit/s {self.delay_us:g} us"


def missing() -> str:
    """Why there can be no namespaces here; empty where there can."""
    if os.geteuid() != 0:
        return "not root"
    tools = [tool for tool in ("ip", "tc", "gcc") if shutil.which(tool) is None]
    if tools:
        return f"no {', '.join(tools)} (apt-get install iproute2 gcc)"
    if not Path("/dev/net/tun").exists():
        return "no /dev/net/tun"
    probe = f"{_PREFIX}probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    if made.returncode:
        return f"no network namespaces: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", probe], check=True)
    return ""


class Hosts:
    """The hosts of a topology, for as long as the context lasts.

    Attributes:
        emulated: namespaces? Plain local processes otherwise.
    """

    def __init__(self, topology: Topology, *, emulated: bool = True) -> None:
        self.topology = topology
        self.emulated = emulated and topology.hosts > 1
        self._names = [f"{_PREFIX}{os.getpid()}-{i}" for i in range(topology.hosts)]
        self._stack = ExitStack()

    def __enter__(self) -> Hosts:
        if self.emulated:
            with self._stack:  # taken down when anything below fails
                self._up()
                self._stack = self._stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def _up(self) -> None:
        _sweep()
        for name in self._names:
            _do("ip", "netns", "add", name)
            self._stack.callback(subprocess.run, ["ip", "netns", "del", name], check=False)
            _do("ip", "-n", name, "link", "set", "lo", "up")
            for setting in _SETTINGS:
                _do("ip", "netns", "exec", name, "sysctl", "-qw", setting)
        self._start_switch()
        rate = self.topology.rate_mbit
        burst = max(int(rate * 1e6 / 8 * 1e-4), 3 * _MTU)  # small: small messages are paced too
        for index, name in enumerate(self._names):
            _do("ip", "-n", name, "addr", "add", _ADDRESS.format(index + 1) + "/24", "dev", "em0")
            _do("ip", "-n", name, "link", "set", "em0", "mtu", str(_MTU), "txqueuelen", "5000", "up")
            _do("ip", "netns", "exec", name, "tc", "qdisc", "replace", "dev", "em0", "root", "tbf",
                "rate", f"{rate}mbit", "burst", str(burst), "limit", str(1 << 25))  # fmt: skip

    def _start_switch(self) -> None:
        folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
        program = folder / "switch"
        source = Path(__file__).with_name("switch.c")
        _do("gcc", "-O2", "-o", str(program), str(source))
        prefix = self._names[0].removesuffix("0")
        words = [str(program), str(self.topology.hosts), prefix, str(self.topology.rate_mbit),
                 str(self.topology.delay_us)]  # fmt: skip
        switch = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        self._stack.callback(_end, switch)
        assert switch.stdout is not None
        if switch.stdout.readline().strip() != "ready":
            raise RuntimeError("the switch did not start: its reason is above")

    def run(
        self, command: Sequence[str], env: Mapping[str, str] | None = None, timeout_s: float = 300.0
    ) -> None:
        """Run a command on all ranks and wait. Raises RuntimeError when one fails or time is up;
        the others are ended then."""
        world, ranks = self.topology.world, self.topology.ranks
        address = _ADDRESS.format(1) if self.emulated else "127.0.0.1"
        common = {
            "MASTER_ADDR": address, "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "em0" if self.emulated else "lo",
        }  # fmt: skip
        processes: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(world):
                own = {"RANK": str(rank), "LOCAL_RANK": str(rank % ranks)}
                name = self._names[rank // ranks]
                prefix = ["ip", "netns", "exec", name] if self.emulated else []
                full = {**os.environ, **(env or {}), **common, **own}
                processes.append(subprocess.Popen([*prefix, *command], env=full))
            _wait(processes, time.monotonic() + timeout_s)
        finally:
            for process in processes:
                _end(process)


def _wait(processes: Sequence[subprocess.Popen[bytes]], until: float) -> None:
    while any(process.poll() is None for process in processes):
        failed = [i for i, process in enumerate(processes) if process.poll()]
        if failed:
            time.sleep(0.5)  # let the others say what they saw
            raise RuntimeError(f"rank {failed[0]} ended with status {processes[failed[0]].returncode}")
        if time.monotonic() > until:
            raise RuntimeError("the ranks did not end in time")
        time.sleep(0.02)
    if any(process.returncode for process in processes):
        raise RuntimeError("a rank failed: its reason is above")


def _end(process: subprocess.Popen[bytes] | subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(2.0)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _sweep() -> None:
    """Remove the hosts of processes that were killed."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    for name in (line.split()[0] for line in listed.splitlines() if line.startswith(_PREFIX)):
        owner = name.removeprefix(_PREFIX).partition("-")[0]
        if owner.isdecimal() and not Path("/proc", owner).exists():
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _do(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
