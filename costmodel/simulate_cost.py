"""What the simulator asks the cost model: the time of an action on a rank, alone on its device."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from ..ir.module import Function, Op, Value
from ..ir.opdef import OPS
from ..ir.signature import SignatureError
from ..ir.types import DTYPES, Mesh, TensorType, local_shape
from .cluster import Cluster
from .collectives import LOCAL, Spread, collective_time_us
from .devices import DRAM_EFFICIENCY
from .estimate import op_time_us

Coord = tuple[int, ...]
#: a rank for itself
_ALONE = Mesh()


@dataclass(frozen=True)
class Transfer:
    """What a communication moves.

    Attributes:
        name: of the op.
        bytes: the most that a member holds before it.
        members: number of ranks that take part.
        per_host: of them, on one host.
        axis: the mesh axis, or `stage`.
    """

    name: str
    bytes: int
    members: int
    per_host: int
    axis: str

    @property
    def inter(self) -> bool:
        """Does it go between hosts?"""
        return self.members > self.per_host


class Costs(Protocol):
    """Times in us of actions that have their device and link for themselves."""

    def action_us(self, op: Op, coord: Coord) -> float:
        """Time of a local action on the rank at a mesh coordinate."""

    def transfer_us(self, transfer: Transfer) -> tuple[float, float]:
        """Time of a transfer, and that of one of no bytes."""


@dataclass
class Scaled:
    """The times of other costs, with a device or a link `factor` times as fast.

    Args:
        part: `device`, `intra` (transfers inside a host) or `inter` (transfers between hosts).
    """

    costs: Costs
    part: str
    factor: float

    def action_us(self, op: Op, coord: Coord) -> float:
        """Time of a local action. See `Costs`."""
        time_us = self.costs.action_us(op, coord)
        return time_us / self.factor if self.part == "device" else time_us

    def transfer_us(self, transfer: Transfer) -> tuple[float, float]:
        """Time of a transfer, and that of one of no bytes. See `Costs`."""
        whole, empty = self.costs.transfer_us(transfer)
        faster = self.part == ("inter" if transfer.inter else "intra")
        return (whole / self.factor, empty / self.factor) if faster else (whole, empty)


@dataclass
class ModelCosts:
    """The cost model's answers, each distinct question asked once.

    Args:
        functions: the kernel functions of the schedules, by name.
    """

    mesh: Mesh
    cluster: Cluster
    functions: Mapping[str, Function] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._times: dict[Hashable, float] = {}
        self._transfers: dict[Transfer, tuple[float, float]] = {}
        self._types: dict[int, int] = {}  # id -> number of an equal type
        self._numbers: dict[TensorType, int] = {}
        self._kept: list[TensorType] = []  # so that ids stay valid

    def action_us(self, op: Op, coord: Coord) -> float:
        """Time of a local action. See `Costs`."""
        key = (
            op.name,
            tuple(op.attrs.items()) if op.attrs else (),
            tuple(op.split.items()) if op.split else (),
            tuple([self._number(v.type) for v in op.operands]),
            tuple([self._number(v.type) for v in op.results]),
            coord,
        )
        found = self._times.get(key)
        if found is None:
            found = self._times[key] = self._action_us(op, coord)
        return found

    def _number(self, type: TensorType) -> int:
        number = self._types.get(id(type))
        if number is None:
            number = self._numbers.setdefault(type, len(self._numbers))
            self._types[id(type)] = number
            self._kept.append(type)
        return number

    def _action_us(self, op: Op, coord: Coord) -> float:
        if op.name == "call":
            return self._kernel_us(op, coord)
        if op.name in LOCAL:  # reads its part, writes it
            moved = 2 * sum(local_bytes_at(v.type, self.mesh, coord) for v in op.results)
            device = self.cluster.device
            return device.launch_us + moved / (device.dram_bytes_per_s * DRAM_EFFICIENCY) * 1e6
        entry = OPS[op.name]
        if entry.signature is None and entry.family in ("control", "creation"):
            return 0.0
        try:
            return op_time_us(self._local(op, coord), (), _ALONE, self.cluster)
        except SignatureError:  # attributes that name global sizes do not fit local shapes
            states = [op.split.get(name, "") for name in self.mesh.names]
            return op_time_us(op, states, self.mesh, self.cluster)

    def _kernel_us(self, op: Op, coord: Coord) -> float:
        """A kernel function's call. A kernel reads its operands and writes its results once, what
        lies between stays on the chip; a CPU runs the ops of the body one by one."""
        if self.cluster.device.kind == "cpu":
            body = self.functions[str(op.attrs["callee"])].ops
            return sum(self.action_us(inner, coord) for inner in body)
        stream = self._local(op, coord).with_(name="aten", attrs={})
        return op_time_us(stream, (), _ALONE, self.cluster)

    def _local(self, op: Op, coord: Coord) -> Op:
        """What the rank at a coordinate computes, as an op of one device.

        So its shards may be smaller than the largest ones, and no collectives are priced with it:
        a schedule has them as actions of their own.
        """

        def cut(value: Value) -> Value:
            shape = local_shape(value.type, self.mesh, coord)
            return Value(value.name, TensorType(value.type.dtype, shape, ()))

        return op.with_(
            operands=tuple(map(cut, op.operands)), results=tuple(map(cut, op.results)), split={}
        )

    def transfer_us(self, transfer: Transfer) -> tuple[float, float]:
        """Time of a transfer, and that of one of no bytes. See `Costs`."""
        found = self._transfers.get(transfer)
        if found is None:
            spread = Spread(transfer.members, transfer.per_host)
            whole, empty = (
                collective_time_us(transfer.name, size, spread, self.cluster)
                for size in (transfer.bytes, 0)
            )
            found = self._transfers[transfer] = whole, min(whole, empty)
        return found


def local_bytes_at(type: TensorType, mesh: Mesh, coord: Coord) -> int:
    """Bytes of the shard at a coordinate."""
    total = DTYPES[type.dtype]
    for size in local_shape(type, mesh, coord):
        total *= size
    return total
