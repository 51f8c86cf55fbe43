"""One entry per device kind: datasheet peaks, memory, launch cost and the links it comes with.

Peaks are dense and vendor-stated (NVIDIA and AMD datasheets; CDNA and Ampere to Blackwell white
papers). What kernels reach of them is learned, see `kernel_model.py`; `sheet` names the row of
`datasheets.csv` that the model knows the device by.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .calibration import Calibration
from .datasheet import Datasheet

#: fraction of the DRAM bandwidth that a streaming kernel reaches (BabelStream on A100 and H100
#: reports 0.85 to 0.92)
DRAM_EFFICIENCY = 0.85
#: fraction of the link bandwidth that NCCL reaches: H200 x8 all_gather of 128 MB has a bus
#: bandwidth of 307 GB/s of 450 (apex_plus profile), all_reduce 331; x4 H100 all_reduce 329
LINK_EFFICIENCY = 0.7


@dataclass(frozen=True)
class Link:
    """A link between devices.

    Attributes:
        bytes_per_s: bandwidth per device and direction that a collective reaches.
        latency_s: time of one step of a ring.
        base_s: fixed cost of a collective, whatever its size.
    """

    bytes_per_s: float
    latency_s: float
    base_s: float = 0.0


@dataclass(frozen=True)
class Device:
    """A device kind.

    Attributes:
        kind: its name in a cluster specification.
        flops_per_s: (dtype, peak) pairs, `f8` for both f8 formats; an absent dtype runs at the f32
            rate, f64 at half of it.
        dram_bytes_per_s: peak memory bandwidth.
        memory_bytes: memory of one device.
        launch_us: least time of one action: kernel launch, or the call on a CPU.
        intra: the link between two devices of a host.
        inter: the link between hosts, per device.
        source: where the numbers come from.
        sheet: its row of `datasheets.csv`.
        cores: processor cores of a host that its ranks share; 0 where each rank has its own device.
        calibration: what was measured on the machine at hand, see `calibration.py`.
        own_sheet: datasheet numbers from a user's file, in place of `sheet`.
    """

    kind: str
    flops_per_s: tuple[tuple[str, float], ...]
    dram_bytes_per_s: float
    memory_bytes: float
    launch_us: float
    intra: Link
    inter: Link
    source: str
    sheet: str = "cpu"
    cores: int = 0
    calibration: Calibration | None = None
    own_sheet: Datasheet | None = None

    def peak_flops_per_s(self, dtype: str) -> float:
        """Peak rate of matrix products in a dtype."""
        rates = dict(self.flops_per_s)
        name = "f8" if dtype in ("f8e4m3", "f8e5m2") else dtype
        return rates.get(name, rates["f32"] / 2 if name == "f64" else rates["f32"])


def _gpu(
    kind: str,
    *,
    f32: float,
    f16: float,
    f64: float,
    dram_gb: float,
    memory_gb: float,
    link_gb: float,
    nic_gb: float,
    sheet: str,
    f8: float = 0.0,
    bf16: bool = True,
    source: str = "datasheet",
) -> Device:
    """A GPU entry: TFLOP/s, GB/s and GB; `link_gb` and `nic_gb` per device and direction."""
    tera = {"f32": f32, "f16": f16, "f64": f64, "bf16": f16 if bf16 else 0.0, "f8": f8}
    return Device(
        kind,
        tuple((dtype, rate * 1e12) for dtype, rate in tera.items() if rate),
        dram_gb * 1e9,
        memory_gb * 1e9,
        # 4 us: launch plus gap of back-to-back kernels under a CPU launcher (eager PyTorch needs
        # 24 us and more per op, a CUDA graph 2 us)
        launch_us=4.0,
        # base and step: all_reduce of 0 bytes takes 15, 10, 6 us on 8, 4, 2 H200 (14, 6, 2 ring
        # steps), all_gather 10 us on 8 (7 steps)
        intra=Link(link_gb * 1e9 * LINK_EFFICIENCY, 0.6e-6, 6e-6),
        # 15 us and 3 us a step: 16 GPUs on 2 hosts, 8 bytes, take 69 us over EFA (30 steps)
        inter=Link(nic_gb * 1e9 * LINK_EFFICIENCY, 3e-6, 15e-6),
        source=source,
        sheet=sheet,
    )


_ENTRIES = (
    Device(
        "cpu",
        # one process on one core (AVX2/AVX-512 server core): 512^3 f32 GEMM of torch runs at
        # 100 GFLOP/s; bf16 has no faster path that may be assumed
        (("f32", 1.4e11), ("f64", 7e10)),
        dram_bytes_per_s=1.5e10,
        memory_bytes=4e9,
        # one ATen call on 64 elements takes 2.9 us, the executor adds at most 8 us
        launch_us=8.0,
        # gloo over loopback, 4 processes on 2 cores: all_reduce of 4 B 470 us, of 8 MiB 11.3 ms;
        # all_to_all of 8 MiB 5.3 ms; 2 processes: all_reduce of 4 B 350 us
        intra=Link(1.1e9, 60e-6, 150e-6),
        # gloo over 10 Gbit/s Ethernet
        inter=Link(1.1e9, 150e-6, 200e-6),
        source="measured with gloo on a 2-core x86 server",
    ),
    _gpu("v100", sheet="V100-SXM2-32GB",
         f32=15.7, f16=125, f64=7.8, dram_gb=900, memory_gb=32, link_gb=150, nic_gb=12.5,
         bf16=False, source="V100 SXM2 32 GB datasheet, DGX-1"),
    _gpu("a100", sheet="A100-SXM4-80GB",
         f32=19.5, f16=312, f64=19.5, dram_gb=2039, memory_gb=80, link_gb=300, nic_gb=25,
         source="A100 SXM4 80 GB datasheet, DGX A100"),
    _gpu("h100", sheet="H100-SXM5-80GB",
         f32=66.9, f16=989, f64=66.9, f8=1979, dram_gb=3350, memory_gb=80, link_gb=450,
         nic_gb=50, source="H100 SXM5 80 GB datasheet, DGX H100"),
    _gpu("h200", sheet="H200-SXM-141GB",
         f32=66.9, f16=989, f64=66.9, f8=1979, dram_gb=4800, memory_gb=141, link_gb=450,
         nic_gb=50, source="H200 SXM datasheet, DGX H200"),
    _gpu("b200", sheet="B200-SXM",
         f32=75, f16=2250, f64=37, f8=4500, dram_gb=8000, memory_gb=180, link_gb=900,
         nic_gb=50, source="B200 SXM datasheet, DGX B200"),
    _gpu("l40s", sheet="L40S",
         f32=91.6, f16=362, f64=1.4, f8=733, dram_gb=864, memory_gb=48, link_gb=32,
         nic_gb=25, source="L40S datasheet; PCIe 4 x16 between devices"),
    _gpu("mi250", sheet="MI250",
         f32=45.3, f16=362, f64=45.3, dram_gb=3277, memory_gb=128, link_gb=350, nic_gb=25,
         source="MI250 datasheet, both dies"),
    _gpu("mi300x", sheet="MI300X",
         f32=163.4, f16=1307, f64=81.7, f8=2615, dram_gb=5300, memory_gb=192,
         link_gb=448, nic_gb=50, source="MI300X datasheet, 7 xGMI links of 64 GB/s"),
)  # fmt: skip

#: device kind -> entry
DEVICES: dict[str, Device] = {entry.kind: entry for entry in _ENTRIES}


def calibrated(device: Device, found: Calibration) -> Device:
    """A device as it was measured; a CPU's rates are those of the measurement."""
    changed = replace(device, launch_us=found.launch_us, cores=found.cores, calibration=found)
    return replace(with_sheet(changed, found.device), own_sheet=None) if found.cores else changed


def with_sheet(device: Device, sheet: Datasheet) -> Device:
    """A device with the numbers of a datasheet in place of its own."""
    rates = {"f32": sheet.f32, "f16": sheet.f16, "bf16": sheet.bf16, "f8": sheet.f8}
    flops = tuple((name, rate * 1e12) for name, rate in rates.items() if rate)
    return replace(
        device,
        flops_per_s=flops,
        dram_bytes_per_s=sheet.mem_gbs * 1e9,
        memory_bytes=sheet.mem_gb * 1e9 if sheet.mem_gb else device.memory_bytes,
        own_sheet=sheet,
    )
