"""Clusters: what `2x8:h100` or a TOML file says, and the meshes that may be laid over it.

    HOSTSxDEVICES:KIND            2x8:h100
    joined by + for mixed ones    2x8:h100+1x8:a100
    a TOML file:                  [[groups]]        device = "h100"  hosts = 2  devices = 8
                                  [links.intra]     bytes_per_s = 3e11  latency_s = 1e-6
                                  [links.inter]     bytes_per_s = 3.5e10  latency_s = 5e-6
                                  [links]           fabric = "nvlink4"
                                  [device]          memory_bytes = 6e10
    either, @ a file about its device: a calibration (`weft calibrate`), or datasheet numbers in a
    TOML file                     1x4:cpu@here.json   2x8:h100@newer.toml

Ranks are numbered host by host. Every error is a CompileError W0501.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..ir.errors import CompileError
from ..ir.types import Mesh
from .calibration import read_calibration
from .collectives_query import check_fabric
from .datasheet import read_device_file
from .devices import DEVICES, Device, Link, calibrated, with_sheet

#: more kinds of hosts than any cluster has
_MOST_GROUPS = 64
#: characters of a specification that a message repeats
_SHOWN = 80
_SHORTHAND = re.compile(r"(\d{1,9})\s*[xX]\s*(\d{1,9})\s*:\s*([A-Za-z0-9_.-]+)")
#: more ranks than any cluster has; keeps typing errors from allocating
_MOST_RANKS = 1 << 20


@dataclass(frozen=True)
class Group:
    """Hosts with the same devices."""

    kind: str
    hosts: int
    devices: int  #: per host

    @property
    def ranks(self) -> int:
        """Devices in the group."""
        return self.hosts * self.devices

    def __str__(self) -> str:
        return f"{self.hosts}x{self.devices}:{self.kind}"


@dataclass(frozen=True)
class Cluster:
    """Device groups and links.

    Attributes:
        groups: the device groups; planning takes one (see `homogeneous`).
        device: the device of the first group, with what a file changed about it.
        intra: link between devices of a host.
        inter: link between hosts, per device.
        fabric: what joins the devices of a host, a key of `collectives_query.FABRICS`; that of the
            device kind by default.
    """

    groups: tuple[Group, ...]
    device: Device
    intra: Link
    inter: Link
    fabric: str = ""

    @property
    def ranks(self) -> int:
        """Number of devices."""
        return sum(group.ranks for group in self.groups)

    @property
    def hosts(self) -> int:
        """Number of hosts."""
        return sum(group.hosts for group in self.groups)

    @property
    def devices_per_host(self) -> int:
        """Devices of a host of the first group."""
        return self.groups[0].devices

    def __str__(self) -> str:
        return "+".join(map(str, self.groups))

    def homogeneous(self) -> Group:
        """The only group. Raises CompileError W0501 for a mixed cluster."""
        if len(self.groups) > 1:
            raise CompileError(
                "W0501",
                f"plans for mixed clusters are not supported: {self}",
                reason="the search places a program on devices of one kind",
                hint=f"use one group, for example --cluster {self.groups[0]}",
            )
        return self.groups[0]

    def axis_link(self, mesh: Mesh, axis: str) -> Link:
        """The link that collectives along a mesh axis use, as one of its groups sees it.

        Inside a host it is `intra`. Across hosts all groups run at once and share the hosts'
        network, so a group has the bandwidth of as many devices as it has on one host, at most
        what the inside of a host carries.
        """
        return _axis_link(self, mesh, axis)

    def axis_hosts(self, mesh: Mesh, axis: str) -> list[int]:
        """The host of each member of the first group along a mesh axis."""
        host_of = [host for group in _hosts(self) for host in group]
        return [host_of[rank] for rank in mesh.group(0, [axis])]


@lru_cache(maxsize=4096)
def _axis_link(cluster: Cluster, mesh: Mesh, axis: str) -> Link:
    spread = cluster.axis_hosts(mesh, axis)
    if len(set(spread)) == 1:
        return cluster.intra
    members = spread.count(spread[0])
    bandwidth = cluster.inter.bytes_per_s * members
    if members > 1:
        bandwidth = min(bandwidth, cluster.intra.bytes_per_s)
    return replace(cluster.inter, bytes_per_s=bandwidth)


def _hosts(cluster: Cluster) -> Iterable[list[int]]:
    number = 0
    for group in cluster.groups:
        for _ in range(group.hosts):
            yield [number] * group.devices
            number += 1


def parse_cluster(text: str) -> Cluster:
    """A cluster from its shorthand or the path of a TOML file. Raises CompileError W0501."""
    if not isinstance(text, str):
        raise CompileError(
            "W0501", "the cluster must be a text", reason=f"it is of type {type(text).__name__}",
            hint='write for example "2x8:h100", or the path of a .toml file',
        )  # fmt: skip
    text, _, about = text.strip().partition("@")
    if about:
        return _about(parse_cluster(text), Path(about))
    if text.endswith(".toml"):
        return _from_file(Path(text))
    parts = text.split("+")
    if len(parts) > _MOST_GROUPS:
        raise CompileError(
            "W0501", f"the cluster has {len(parts)} groups",
            reason=f"at most {_MOST_GROUPS} are supported", hint="one group for each kind of host",
        )  # fmt: skip
    groups = tuple(_parse_group(part.strip(), text) for part in parts)
    return make_cluster(groups)


def _about(cluster: Cluster, path: Path) -> Cluster:
    """A cluster with what a file says about its device. Raises CompileError W1302."""
    if path.suffix == ".toml":
        return replace(cluster, device=with_sheet(cluster.device, read_device_file(path)))
    found = read_calibration(path)
    if found.kind != cluster.device.kind:
        raise CompileError(
            "W1302", f"{path} was measured on {found.kind}, the cluster has {cluster.device.kind}",
            reason="a calibration holds for the device kind that it was measured on",
            hint=f"run weft calibrate on a host with {cluster.device.kind}",
        )  # fmt: skip
    return replace(cluster, device=calibrated(cluster.device, found))


def make_cluster(groups: tuple[Group, ...]) -> Cluster:
    """A cluster of known device kinds with the links that they come with. Raises CompileError."""
    if sum(group.ranks for group in groups) > _MOST_RANKS:
        raise CompileError(
            "W0501", f"the groups have {sum(group.ranks for group in groups)} devices together",
            reason=f"at most {_MOST_RANKS} ranks are supported", hint="check the numbers of hosts",
        )  # fmt: skip
    device = DEVICES[groups[0].kind]
    return Cluster(groups, device, device.intra, device.inter)


def _parse_group(part: str, whole: str) -> Group:
    match = _SHORTHAND.fullmatch(part)
    if match is None:
        kinds = get_close_matches(part.rpartition(":")[2].lower(), DEVICES, 1)
        example = f"2x8:{kinds[0]}" if kinds else "2x8:h100"
        raise CompileError(
            "W0501",
            f"the cluster {_short(whole)} is not understood",
            reason=f"{_short(part)} is not HOSTSxDEVICES:KIND",
            hint=f"write for example {example!r}, or give the path of a .toml file",
        )
    hosts, devices, kind = int(match[1]), int(match[2]), match[3].lower()
    return _group(kind, hosts, devices, f"in {_short(whole)}")


def _short(text: object) -> str:
    shown = repr(text)
    return shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."


def _group(kind: str, hosts: int, devices: int, where: str) -> Group:
    if kind not in DEVICES:
        near = get_close_matches(kind, DEVICES, 1, cutoff=0.5)
        hint = f"did you mean {hosts}x{devices}:{near[0]}?" if near else "use one of these kinds"
        raise CompileError(
            "W0501",
            f"unknown device kind {_short(kind)} {where}",
            reason=f"the known kinds are {', '.join(DEVICES)}",
            hint=hint,
        )
    if hosts < 1 or devices < 1:
        raise CompileError(
            "W0501",
            f"a cluster needs at least one host and one device {where}",
            reason=f"there are {hosts} hosts with {devices} devices each",
            hint=f"write for example {max(hosts, 1)}x{max(devices, 1)}:{kind}",
        )
    if hosts * devices > _MOST_RANKS:
        raise CompileError(
            "W0501",
            f"{hosts} x {devices} devices are too many {where}",
            reason=f"at most {_MOST_RANKS} ranks are supported",
            hint="check the numbers of hosts and devices",
        )
    return Group(kind, hosts, devices)


_TOP, _GROUP = ("name", "groups", "links", "device"), ("device", "hosts", "devices")
_LINKS = ("intra", "inter", "fabric")
_DEVICE = ("memory_bytes", "dram_bytes_per_s", "launch_us", "flops_per_s", "cores")


#: more than any number of a file is: bytes per second, operations per second
_MOST = 1e30
#: bytes of a file; a cluster takes hundreds
_MOST_BYTES = 1 << 20


def _bad(path: Path, message: str, reason: str = "", hint: str = "") -> CompileError:
    return CompileError("W0501", f"{str(path)[-200:]}: {message}", reason=reason, hint=hint)


def _table(path: Path, value: Any, where: str, known: Iterable[str]) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise _bad(path, f"{where} must be a table")
    names = list(known)
    for key in value:
        if key not in names:
            near = get_close_matches(key, names, 1)
            raise _bad(
                path,
                f"unknown key {_short(key)} in {where}",
                f"the keys are {', '.join(names)}",
                f"did you mean {near[0]!r}?" if near else "",
            )
    return value


def _number(path: Path, value: Any, where: str, *, zero: bool = False) -> float:
    good = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not good or not (value > 0 or (zero and value == 0)) or value > _MOST:
        raise _bad(path, f"{where} must be a positive number, got {_short(value)}",
                   hint="bytes, seconds and operations a second are below 1e30")  # fmt: skip
    return float(value)


def _count(path: Path, value: Any, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or abs(value) > _MOST:
        raise _bad(path, f"{where} must be a whole number, got {_short(value)}")
    return value


def _from_file(path: Path) -> Cluster:
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise _bad(path, f"is larger than {_MOST_BYTES >> 20} MiB", hint="check the path")
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise _bad(path, "cannot be read", str(error), "check the path") from None
    except (ValueError, RecursionError) as error:  # TOMLDecodeError and UnicodeDecodeError too
        raise _bad(path, "is not valid TOML", str(error)[:200], "correct the file") from None
    _table(path, data, "the file", _TOP)
    rows = data.get("groups")
    if not isinstance(rows, list) or not rows:
        raise _bad(path, "needs at least one [[groups]] table", hint='add device = "h100", '
                   "hosts = 2 and devices = 8 under [[groups]]")  # fmt: skip
    if len(rows) > _MOST_GROUPS:
        raise _bad(path, f"has {len(rows)} groups", f"at most {_MOST_GROUPS} are supported")
    groups = []
    for index, row in enumerate(rows):
        where = f"groups[{index}]"
        row = _table(path, row, where, _GROUP)
        for key in _GROUP:
            if key not in row:
                raise _bad(path, f"{where} lacks {key!r}", f"it needs {', '.join(_GROUP)}")
        hosts, devices = (_count(path, row[k], f"{where}.{k}") for k in ("hosts", "devices"))
        if not isinstance(row["device"], str):
            raise _bad(path, f"{where}.device must be a text, got {_short(row['device'])}")
        groups.append(_group(row["device"].lower(), hosts, devices, f"in {path}"))
    cluster = make_cluster(tuple(groups))
    links = _table(path, data.get("links", {}), "links", _LINKS)
    if "fabric" in links:
        fabric = str(links["fabric"])
        joined = check_fabric(fabric).devices
        if any(group.devices > joined for group in groups):
            raise _bad(path, f"links.fabric: {fabric} joins at most {joined} devices",
                       f"a host has {max(g.devices for g in groups)}", "correct one of the two")  # fmt: skip
        cluster = replace(cluster, fabric=fabric)
    for name, row in links.items():
        if name == "fabric":
            continue
        row = _table(path, row, f"links.{name}", [f.name for f in fields(Link)])
        values = {k: _number(path, v, f"links.{name}.{k}", zero=k != "bytes_per_s")
                  for k, v in row.items()}  # fmt: skip
        changed = replace(getattr(cluster, name), **values)
        cluster = replace(cluster, **{name: changed})
    changes: dict[str, Any] = {}
    for key, value in _table(path, data.get("device", {}), "device", _DEVICE).items():
        if key == "flops_per_s":
            rates = _table(path, value, "device.flops_per_s", ("f64", "f32", "bf16", "f16", "f8"))
            numbers = {k: _number(path, v, f"device.flops_per_s.{k}") for k, v in rates.items()}
            changes[key] = tuple({**dict(cluster.device.flops_per_s), **numbers}.items())
        elif key == "cores":
            changes[key] = _count(path, value, "device.cores")
        else:
            changes[key] = _number(path, value, f"device.{key}")
    return replace(cluster, device=replace(cluster.device, **changes))


def meshes(cluster: Cluster) -> list[Mesh]:
    """Candidate meshes for a cluster, the most structured first.

    Axis `host` spans hosts, `dev` the devices of a host; where a host has at least 4 devices, they
    may also form two axes `dev0`, `dev1` (a power of two as close to square as possible), and a
    single axis `rank` spans everything. One rank gives a mesh without axes. Raises CompileError
    W0501 for a mixed cluster.
    """
    group = cluster.homogeneous()
    hosts, devices = group.hosts, group.devices
    inner = 1
    while inner * inner * 4 <= devices and devices % (inner * 2) == 0:
        inner *= 2
    shapes: list[tuple[tuple[str, int], ...]] = [
        (("host", hosts), ("dev", devices)),
        (("host", hosts), ("dev0", devices // inner), ("dev1", inner)),
        (("rank", hosts * devices),),
    ]
    out: list[Mesh] = []
    for shape in shapes:
        mesh = Mesh(tuple((n, s) for n, s in shape if s > 1), group.kind)
        if mesh.sizes not in [other.sizes for other in out]:
            out.append(mesh)
    return out
