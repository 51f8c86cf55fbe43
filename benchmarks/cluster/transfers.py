"""On each rank: times of weft's own transfers, over sizes and mesh axes.

    transfers.py OUT.json LARGEST_BYTES MESH...        MESH: axis sizes such as 4 or 2x2

Whole loops are timed: the median of some, the slowest rank's. Between two transfers a rank computes,
as in a step, and the time of that alone is taken off: back to back, the receiver of a transfer is
always ready before its sender, and all its memory is in the cache. Rank 0 writes a list of
[mesh, axis, op, bytes per rank, seconds].
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from weft.ir.module import Attr, Op, Value
from weft.ir.types import B, Mesh, Placement, TensorType
from weft.runtime.comm import Comm

_OPS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "permute_ranks",
        "lse_combine")  # fmt: skip
_SIZES = tuple(1 << n for n in (9, 14, 17, 19, 21, 23))
#: seconds of one loop, and number of loops
_LOOP_S, _LOOPS = 0.04, 3


def transfer(comm: Comm, mesh: Mesh, axis: str, name: str, count: int) -> Callable[[], object]:
    """A transfer of `count` f32 per rank along an axis."""
    parts = mesh.sizes[mesh.axis(axis)]
    index = mesh.axis(axis)

    def type(held: Placement, shape: tuple[int, ...]) -> TensorType:
        placement = [B] * len(mesh.axes)
        placement[index] = held
        return TensorType("f32", shape, tuple(placement))

    cut0, cut1, part = Placement("S", 0), Placement("S", 1), Placement("P", combine="sum")
    flat, square = (count,), (parts, count)
    rows: dict[str, tuple[TensorType, TensorType, dict[str, Attr]]] = {
        "all_reduce": (type(part, flat), type(B, flat), {"combine": "sum"}),
        "all_gather": (type(cut0, (count * parts,)), type(B, (count * parts,)), {"dim": 0}),
        "reduce_scatter": (type(part, flat), type(cut0, flat), {"combine": "sum", "dim": 0}),
        "all_to_all": (type(cut0, square), type(cut1, square), {"source": 0, "target": 1}),
        "broadcast": (type(B, flat), type(B, flat), {"root": 0}),
        "permute_ranks": (type(B, flat), type(B, flat), {"shift": 1}),
        "lse_combine": (type(B, flat), type(B, flat), {}),
    }
    before, after, attrs = rows[name]
    op = Op(name, (Value("x", before),), (Value("y", after),), {"axis": axis, **attrs})
    run, x = comm.action(op), torch.ones(comm.shape(before))
    return lambda: run(x)


def compute() -> Callable[[], object]:
    """Half a millisecond of a core, or so."""
    x, w = torch.ones(64, 512), torch.ones(512, 512)
    return lambda: torch.relu(x @ w)


def seconds(comm: Comm, run: Callable[[], object], between: Callable[[], object]) -> float:
    """Time of a call on the slowest rank."""
    run()
    start = time.perf_counter()
    run()
    count = torch.tensor([max(3, min(100, int(_LOOP_S / max(time.perf_counter() - start, 1e-6))))])
    dist.broadcast(count, 0)
    found = []
    for _ in range(_LOOPS):
        took = []
        for actions in ((between,), (between, run)):
            comm.barrier()
            start = time.perf_counter()
            for _ in range(int(count)):
                for action in actions:
                    action()
            took.append((time.perf_counter() - start) / int(count))
        found.append(max(took[1] - took[0], 1e-6))
    slowest = torch.tensor([statistics.median(found)], dtype=torch.float64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return float(slowest)


def main() -> None:
    """Measure all."""
    out, largest, meshes = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rows, between = [], compute()
    for text in meshes:
        sizes = [int(size) for size in text.split("x")]
        mesh = Mesh(tuple((f"a{i}", size) for i, size in enumerate(sizes)), "cpu")
        comm = Comm(mesh)
        for axis, parts in mesh.axes:
            for name in _OPS:
                for size in _SIZES:
                    held = size // parts if name in ("all_gather", "lse_combine") else size
                    if parts > 1 and size <= largest:
                        run = transfer(comm, mesh, axis, name, max(held // 4 // parts, 1) * parts)
                        rows.append([text, axis, name, held, seconds(comm, run, between)])
    if dist.get_rank() == 0:
        out.write_text(json.dumps(rows))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
