"""Costs for tests of the simulator."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from weft.costmodel.simulate_cost import Transfer, local_bytes_at
from weft.ir.module import Op
from weft.ir.types import Mesh


class Fixed:
    """Times by the name of the op; of a transfer's, a share `empty` is latency, and all of it for
    the ops in `still`."""

    def __init__(
        self, times: Mapping[str, float], empty: float = 0.0, still: Collection[str] = ()
    ) -> None:
        self.times, self.empty, self.still = times, empty, still

    def action_us(self, op: Op, coord: tuple[int, ...]) -> float:
        return self.times.get(op.name, 0.0)

    def transfer_us(self, transfer: Transfer) -> tuple[float, float]:
        time_us = self.times.get(transfer.name, 0.0)
        return time_us, (1.0 if transfer.name in self.still else self.empty) * time_us


class Sized:
    """Times from the bytes of a rank's shards: what a random schedule of any shapes can have.

    Args:
        shared: transfers take bandwidth; otherwise all of their time is latency.
    """

    def __init__(self, mesh: Mesh, shared: bool = True) -> None:
        self.mesh, self.shared = mesh, shared

    def action_us(self, op: Op, coord: tuple[int, ...]) -> float:
        return 1 + sum(local_bytes_at(v.type, self.mesh, coord) for v in op.results) / 100

    def transfer_us(self, transfer: Transfer) -> tuple[float, float]:
        slow = 2 if transfer.inter else 1
        time_us = slow * (3 + transfer.bytes / 50)
        return time_us, slow * 3 if self.shared else time_us
