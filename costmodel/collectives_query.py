"""What a collective is to the cost model: a `Query`, and the table of fabrics.

Bytes are those of nccl-tests: of all_gather the gathered output, of reduce_scatter and alltoall
the full input, of all_reduce and send_recv the buffer; of the expert-parallel ops the tokens of a
rank.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache

from ..ir.errors import CompileError
from .datasheet import datasheets

COLLECTIVES = (
    "all_reduce", "all_gather", "reduce_scatter", "alltoall", "send_recv",
    "ep_dispatch_normal", "ep_combine_normal", "ep_dispatch_ll", "ep_combine_ll",
    "alltoall_dispatch", "alltoall_combine", "alltoall_prepare", "alltoall_combine_low_precision",
)  # fmt: skip
IMPLS = (
    "nccl", "oneccl", "custom:sglang", "custom:trtllm", "custom:vllm", "deepep", "deepep_ll",
    "nvlinkonesided", "nvlinktwosided",
)  # fmt: skip
TIMINGS = (
    "nccl_tests_oop", "nccl_tests", "kineto_kernel", "host_wallclock_sync", "cudagraph", "eager",
    "deepep_bench",
)  # fmt: skip
#: how the devices of a host hang together: all to all through switches, in pairs, as a mesh of
#: direct links, over the host's PCIe, or over that with every other hop of a ring over a bridge
SHAPES = ("switch", "pair", "mesh", "pcie", "bridged")
#: what joins hosts, as far as a description says: InfiniBand (or RoCE), Elastic Fabric Adapter (and
#: other user-level stacks without ordered delivery), sockets
NETWORKS = ("ib", "efa", "tcp")
_NETWORK_NAMES = (("efa", "efa"), ("tcp", "tcp"), ("eth", "tcp"), ("gvnic", "tcp"))
#: generations in steps of latency and of what NCCL may use: in-switch reduction from 2 on
_GENERATIONS = (
    (r"V100|DGX1", 0.0), (r"A100|A30|A40|A10\b|MI25|MI1|MI2", 1.0), (r"L4|RTX|4090|Arc", 1.5),
    (r"H100|H200|H20|GH200|H800|MI3[0-2]", 2.0), (r"B200|B300|MI35|B100", 3.0),
)  # fmt: skip


#: clock in MHz and memory in GB/s of a device without a datasheet, by its generation
_TYPICAL = {0.0: (1530.0, 900.0), 1.0: (1410.0, 2039.0), 1.5: (2520.0, 864.0), 2.0: (1830.0, 3350.0),
            3.0: (1965.0, 8000.0)}  # fmt: skip


@dataclass(frozen=True)
class Fabric:
    """A fabric inside a host.

    Attributes:
        shape: one of SHAPES.
        gb_per_s: peak bandwidth of a device, per direction.
        devices: how many devices it joins at most.
    """

    shape: str
    gb_per_s: float
    devices: int


#: vendors' white papers; PCIe x16, per direction
FABRICS = {
    "nvlink2": Fabric("mesh", 150, 8), "nvlink3": Fabric("switch", 300, 16),
    "nvlink4": Fabric("switch", 450, 8), "nvlink5": Fabric("switch", 900, 8),
    "nvl72": Fabric("switch", 900, 72), "bridge3": Fabric("pair", 300, 16),
    "bridge4": Fabric("pair", 300, 16), "pcie3": Fabric("pcie", 16, 16),
    "pcie4": Fabric("pcie", 32, 16), "pcie5": Fabric("pcie", 64, 16),
    "pcie5x8": Fabric("pcie", 32, 16), "pcie6": Fabric("pcie", 128, 16),
    "xgmi2": Fabric("mesh", 350, 8), "xgmi3": Fabric("mesh", 448, 8),
    "xgmi4": Fabric("mesh", 537, 8), "gloo": Fabric("pcie", 1, 1 << 20),
}  # fmt: skip
#: GB/s where nothing says what the network between hosts is: hosts of PCIe cards have one card of
#: 10 Gbit/s (1.25) or of 25 to 100; others one per device, InfiniBand as in DGX-1 and DGX A100
_HOST_NET = {"pcie": 1.5, "bridged": 4.0, "pair": 4.0}
_DEFAULT_NET = {"mesh": 12.5, "switch": 25.0}


@dataclass(frozen=True)
class Query:
    """A collective whose time is asked for.

    Attributes:
        collective: one of COLLECTIVES.
        bytes: see the module.
        ranks: members of the group.
        per_host: of them, on one host.
        device: name of the device kind; says the generation.
        fabric: a key of FABRICS.
        net_gb_per_s: network per device and direction; 0 where not known.
        impl: one of IMPLS.
        timing: how the time is measured, one of TIMINGS.
        multiprocessors: those that DeepEP's normal kernels may use.
        experts: of DeepEP's low-latency kernels.
        element_bytes: matters to the NVLink all-to-all only.
        joined: what joins hosts, one of NETWORKS.
        bandwidth_scale, latency_scale: of this machine's fabric, against the fabric's usual ones.
    """

    collective: str
    bytes: float
    ranks: int
    per_host: int
    device: str
    fabric: str
    net_gb_per_s: float = 0.0
    impl: str = "nccl"
    timing: str = "nccl_tests_oop"
    multiprocessors: float = 0.0
    experts: float = 0.0
    element_bytes: float = 2.0
    bandwidth_scale: float = 1.0
    latency_scale: float = 1.0
    joined: str = "ib"

    @property
    def hosts(self) -> int:
        """Hosts that the group spans."""
        return -(-self.ranks // self.local)

    @property
    def local(self) -> int:
        """Members on a host."""
        return min(self.ranks, self.per_host)

    @property
    def generation(self) -> float:
        """Of the device; 2 where the name says nothing."""
        return generation_of(self.device)

    @property
    def shape(self) -> str:
        """What the fabric is to this many devices: a bridge joins two, a ring of more takes PCIe
        between the pairs."""
        shape = FABRICS[self.fabric].shape
        return "bridged" if shape == "pair" and self.local > 2 else shape

    @property
    def peer(self) -> bool:
        """Do devices read each other's memory over PCIe? Intel's do, through oneCCL; of others it
        depends on the host, and copies through its memory are usual."""
        return self.device.startswith("Intel")

    @property
    def arm_host(self) -> bool:
        """Is the host's processor part of the module, as Grace is?"""
        return self.device.startswith(("GB", "GH"))

    @property
    def clock_mhz(self) -> float:
        """Of the device."""
        return _clock_and_memory(self.device)[0]

    @property
    def memory_gb_per_s(self) -> float:
        """Of the device."""
        return _clock_and_memory(self.device)[1]

    @property
    def gb_per_s(self) -> float:
        """Peak bandwidth of a member to the others inside its host. Two members of a mesh of direct
        links reach less, their pair's links alone; that would have times fall when ranks double."""
        found = FABRICS[self.fabric]
        rate = found.gb_per_s
        if found.shape == "pair" and self.local > 2:
            rate = FABRICS["pcie5" if self.fabric == "bridge4" else "pcie4"].gb_per_s
        return rate * self.bandwidth_scale

    @property
    def network(self) -> float:
        """GB/s per device between hosts."""
        if self.net_gb_per_s:
            return self.net_gb_per_s
        shared = _HOST_NET.get(self.shape)
        return shared / self.local if shared else _DEFAULT_NET[self.shape]

    def check(self) -> None:
        """Raise CompileError W0501 for what no machine has."""
        fabric = check_fabric(self.fabric)
        for value, known, what in (
            (self.collective, COLLECTIVES, "collective"),
            (self.impl, IMPLS, "implementation"),
            (self.timing, TIMINGS, "timing"),
            (self.joined, NETWORKS, "network"),
        ):
            if value not in known:
                _unknown(what, value, known)
        if self.ranks < 1 or self.per_host < 1 or self.local > fabric.devices:
            raise CompileError(
                "W0501", f"{self.local} ranks of a host cannot meet on {self.fabric}",
                reason=f"it joins 1 to {fabric.devices} devices",
                hint="give fewer devices per host, or a fabric that joins as many",
            )  # fmt: skip
        rates = (self.bandwidth_scale, self.latency_scale)
        if not all(0 < rate < float("inf") for rate in rates) or not 0 <= self.net_gb_per_s < 1e6:
            raise CompileError(
                "W0501", "a link needs a positive, finite bandwidth and latency",
                reason=f"scales {rates}, network {self.net_gb_per_s} GB/s",
                hint="correct the numbers of the cluster file",
            )  # fmt: skip
        if not 0 <= self.bytes < float("inf"):
            raise CompileError(
                "W0501", f"a collective cannot move {self.bytes} bytes",
                hint="give the bytes as a finite number, 0 or more",
            )  # fmt: skip


def generation_of(device: str) -> float:
    """Generation of a device kind; 2 where the name says nothing."""
    return next((g for pattern, g in _GENERATIONS if re.search(pattern, device, re.I)), 2.0)


@cache
def _clock_and_memory(device: str) -> tuple[float, float]:
    sheet = datasheets().get(device)
    return (sheet.boost_mhz, sheet.mem_gbs) if sheet else _TYPICAL[generation_of(device)]


def check_fabric(name: str) -> Fabric:
    """A fabric by name. Raises CompileError W0501, with near misses."""
    if name not in FABRICS:
        _unknown("fabric", name, tuple(FABRICS))
    return FABRICS[name]


def _unknown(what: str, name: str, known: tuple[str, ...]) -> None:
    near = get_close_matches(name, known, 1, 0.4)
    raise CompileError(
        "W0501", f"unknown {what} {name!r}", reason=f"known are {', '.join(known)}",
        hint=f"did you mean {near[0]!r}?" if near else f"use one of these {what}s",
    )  # fmt: skip


def network_of(interconnect: str) -> str:
    """The one of NETWORKS that a description such as `NVLink4-NVSwitch+EFA` says; InfiniBand where it
    says nothing."""
    text = interconnect.lower()
    return next((name for part, name in _NETWORK_NAMES if part in text), "ib")


def fabric_of(interconnect: str, device: str = "") -> str:
    """The key of FABRICS for a description such as `NVLink4-NVSwitch+IB`. Raises W0501."""
    text = interconnect.lower()
    if "bridge" in text:
        return "bridge4" if "pcie5" in text else "bridge3"
    if "nvl72" in text:
        return "nvl72"
    for pattern, name in ((r"nvlink-?(\d)", "nvlink"), (r"pcie-?(?:gen)?(\d)(?:x8)?", "pcie")):
        if match := re.search(pattern, text):
            found = name + match[1] + ("x8" if match[0].endswith("x8") else "")
            check_fabric(found)
            return found
    if "xgmi" in text or "infinity" in text or device.startswith("MI"):
        newest = {"MI35": "xgmi4", "MI2": "xgmi2", "MI1": "xgmi2"}
        return next((f for start, f in newest.items() if device.startswith(start)), "xgmi3")
    if text.startswith(("ib", "eth", "roce", "efa")):
        return "pcie3"
    check_fabric(text)
    return text
