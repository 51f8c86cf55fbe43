"""Clusters: what `2x8:h100` or a TOML file says, and the meshes that may be laid over it.

    HOSTSxDEVICES:KIND            2x8:h100
    joined by + for mixed ones    2x8:h100+1x8:a100
    a TOML file:                  [[groups]]        device = "h100"  hosts = 2  devices = 8
                                  [links.intra]     bytes_per_s = 3e11  latency_s = 1e-6
                                  [links.inter]     bytes_per_s = 3.5e10  latency_s = 5e-6
                                  [links]           fabric = "nvlink4"
                                  [device]          memory_bytes = 6e10
    what holds for one group      [groups.links.inter] and [groups.numbers] behind its [[groups]]
    each group @ a file about its device: a calibration (`weft calibrate`), or datasheet numbers in a
    TOML file                     1x4:cpu@here.json   2x8:h100@newer.toml+1x8:a100

Ranks are numbered host by host, group by group. Between hosts of two groups goes what the slower of
their links carries. Every error is a CompileError W0501.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
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
#: a + ahead of a group of the shorthand, not one in the name of a file
_GROUPS = re.compile(r"\+(?=\s*\d+\s*[xX]\s*\d+\s*:)")
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
class Hardware:
    """What a group's hosts are made of.

    Attributes:
        device: with what a file changed about it.
        intra: link between devices of a host.
        inter: link between hosts, per device.
        fabric: what joins the devices of a host, a key of `collectives_query.FABRICS`; that of the
            device kind by default.
    """

    device: Device
    intra: Link
    inter: Link
    fabric: str = ""


@dataclass(frozen=True)
class Cluster:
    """Device groups and links.

    Attributes:
        groups: the device groups. A mesh lies on devices of one (see `homogeneous`), stages of a
            pipeline may lie on several.
        device, intra, inter, fabric: of the first group, see `Hardware`.
        others: what the other groups are made of.
    """

    groups: tuple[Group, ...]
    device: Device
    intra: Link
    inter: Link
    fabric: str = ""
    others: tuple[Hardware, ...] = ()

    @property
    def hardware(self) -> tuple[Hardware, ...]:
        """What each group is made of."""
        return (Hardware(self.device, self.intra, self.inter, self.fabric), *self.others)

    def part(self, number: int) -> Cluster:
        """One group as a cluster."""
        return joined(self.groups[number : number + 1], self.hardware[number : number + 1])

    def in_order(self, numbers: Sequence[int]) -> Cluster:
        """The groups in another order, in which their ranks are then numbered."""
        return joined([self.groups[n] for n in numbers], [self.hardware[n] for n in numbers])

    def host_groups(self) -> list[int]:
        """The group of each host."""
        return [n for n, group in enumerate(self.groups) for _ in range(group.hosts)]

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
                f"one mesh cannot lie on all of {self}",
                reason="its devices and links are of several kinds, a mesh has one",
                hint=f"ask for stages, for example --stages {len(self.groups)}, which may differ in "
                f"kind, or use one group: --cluster {self.groups[0]}",
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
    text = text.strip()
    pieces = _GROUPS.split(text, _MOST_GROUPS) if "@" in text else [text]
    if len(pieces) > 1:
        several = [parse_cluster(piece) for piece in pieces]
        return joined(
            [group for cluster in several for group in cluster.groups],
            [hardware for cluster in several for hardware in cluster.hardware],
        )
    text, _, about = text.partition("@")
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


def about_all(text: str, path: str) -> str:
    """A specification with a calibration for each of its groups of the kind that was measured."""
    pieces = _GROUPS.split(text)
    if len(pieces) > 1:
        kind = read_calibration(Path(path)).kind
        found = [f"{p}@{path}" if p.strip().lower().endswith(f":{kind}") else p for p in pieces]
        if found != pieces:
            return "+".join(found)
    return f"{text}@{path}"


def make_cluster(groups: tuple[Group, ...]) -> Cluster:
    """A cluster of known device kinds with the links that they come with. Raises CompileError."""
    if sum(group.ranks for group in groups) > _MOST_RANKS:
        raise CompileError(
            "W0501", f"the groups have {sum(group.ranks for group in groups)} devices together",
            reason=f"at most {_MOST_RANKS} ranks are supported", hint="check the numbers of hosts",
        )  # fmt: skip
    devices = [DEVICES[group.kind] for group in groups]
    return joined(groups, [Hardware(d, d.intra, d.inter) for d in devices])


def joined(groups: Sequence[Group], hardware: Sequence[Hardware]) -> Cluster:
    """A cluster of groups, and what each of them is made of."""
    first, *others = hardware
    return Cluster(
        tuple(groups), first.device, first.intra, first.inter, first.fabric, tuple(others)
    )


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
_OF_GROUP = (*_GROUP, "links", "numbers")
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
    groups, changed = [], []
    for index, row in enumerate(rows):
        where = f"groups[{index}]"
        row = _table(path, row, where, _OF_GROUP)
        for key in _GROUP:
            if key not in row:
                raise _bad(path, f"{where} lacks {key!r}", f"it needs {', '.join(_GROUP)}")
        hosts, devices = (_count(path, row[k], f"{where}.{k}") for k in ("hosts", "devices"))
        if not isinstance(row["device"], str):
            raise _bad(path, f"{where}.device must be a text, got {_short(row['device'])}")
        groups.append(_group(row["device"].lower(), hosts, devices, f"in {path}"))
        changed.append(row)
    hardware = []
    for index, found in enumerate(make_cluster(tuple(groups)).hardware):
        most = groups[index].devices
        found = _with_links(path, found, data.get("links", {}), "links", most)
        found = _with_numbers(path, found, data.get("device", {}), "device")
        where = f"groups[{index}]"
        found = _with_links(path, found, changed[index].get("links", {}), f"{where}.links", most)
        found = _with_numbers(path, found, changed[index].get("numbers", {}), f"{where}.numbers")
        hardware.append(found)
    return joined(groups, hardware)


def _with_links(path: Path, found: Hardware, rows: Any, where: str, devices: int) -> Hardware:
    """What a table of links changes."""
    links = _table(path, rows, where, _LINKS)
    for name, row in links.items():
        if name == "fabric":
            joins = check_fabric(str(row)).devices
            if devices > joins:
                raise _bad(path, f"{where}.fabric: {row} joins at most {joins} devices",
                           f"a host has {devices}", "correct one of the two")  # fmt: skip
            found = replace(found, fabric=str(row))
            continue
        row = _table(path, row, f"{where}.{name}", [f.name for f in fields(Link)])
        values = {k: _number(path, v, f"{where}.{name}.{k}", zero=k != "bytes_per_s")
                  for k, v in row.items()}  # fmt: skip
        found = replace(found, **{name: replace(getattr(found, name), **values)})
    return found


def _with_numbers(path: Path, found: Hardware, rows: Any, where: str) -> Hardware:
    """What a table of a device's numbers changes."""
    changes: dict[str, Any] = {}
    for key, value in _table(path, rows, where, _DEVICE).items():
        if key == "flops_per_s":
            rates = _table(path, value, f"{where}.{key}", ("f64", "f32", "bf16", "f16", "f8"))
            numbers = {k: _number(path, v, f"{where}.{key}.{k}") for k, v in rates.items()}
            changes[key] = tuple({**dict(found.device.flops_per_s), **numbers}.items())
        elif key == "cores":
            changes[key] = _count(path, value, f"{where}.cores")
        else:
            changes[key] = _number(path, value, f"{where}.{key}")
    return replace(found, device=replace(found.device, **changes))


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
