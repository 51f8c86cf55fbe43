"""The transfers: one function for each communication op, `(groups, op) -> start`.

What depends on types and coordinates (sizes, splits, padding) is worked out once, in the outer
function; the inner one starts the transfer of a local tensor and returns a `Pending`.

reduce_scatter is an all_to_all and a local sum: on gloo that is 1.1 to 6 times faster than its
native reduce_scatter or an all_reduce with a cut (measured, 2 to 4 ranks, 4 KB to 16 MB), and it
has no requirement on even shards. NCCL's own is used where the shards are even.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..ir.crossing import box_of, crosses, inside, op_pieces
from ..ir.module import Op
from ..ir.types import DTYPES, Placement, TensorType, local_range, local_shape
from .context import TORCH_DTYPES
from .groups import Groups, Pending, Shape
from .shards import neutral

#: dtypes that the backends move only as bytes (gloo: measured with torch 2.13)
_AS_BYTES = frozenset({torch.float8_e4m3fn, torch.float8_e5m2, torch.int16})
_REDUCE = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}
#: torch 2.13 renamed these two
_gather_single: Callable[..., Any] = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_scatter_single: Callable[..., Any] = getattr(
    dist, "reduce_scatter_single", dist.reduce_scatter_tensor
)

Start = Callable[..., Pending]


def _flat(tensor: Tensor) -> Tensor:
    """The elements in row-major order, as bytes where the backend does not know the dtype."""
    flat = tensor.contiguous().view(-1)
    return flat.view(torch.uint8) if flat.dtype in _AS_BYTES else flat


def _axis(op: Op) -> str:
    return str(op.attrs["axis"])


def _int(op: Op, name: str, default: int = 0) -> int:
    return int(op.attrs.get(name, default))  # type: ignore[arg-type]


def _alone(x: Tensor) -> Pending:
    """The result on an axis of one rank: a copy, so that results never share memory."""
    out = x.clone()
    return Pending((), lambda: out)


def all_reduce(comm: Groups, op: Op, last: bool = False) -> Start:
    """With `last` the operand's memory may become the result's."""
    group, how = comm.group(_axis(op)), _REDUCE[str(op.attrs.get("combine", "sum"))]
    if group is None:
        return _alone

    def start(x: Tensor) -> Pending:
        out = x if last and x.is_contiguous() else x.clone(memory_format=torch.contiguous_format)
        work = dist.all_reduce(out, op=how, group=group, async_op=True)
        return Pending((work,), lambda: out)

    return start


def _all_gather(comm: Groups, op: Op) -> Start:
    axis, dim = _axis(op), _int(op, "dim")
    group, type = comm.group(axis), op.operands[0].type
    if group is None:
        return _alone
    shapes = [local_shape(type, comm.mesh, coord) for coord in comm.coords(axis)]
    sizes = [prod(shape) for shape in shapes]
    count, largest = len(sizes), max(sizes)
    even = len(set(shapes)) == 1
    result = comm.shape(op.result.type)
    if largest == 0:
        return lambda x: Pending((), lambda: x.new_empty(result))

    def start(x: Tensor) -> Pending:
        flat = x.contiguous().view(-1)
        if x.numel() < largest:
            flat = torch.cat((flat, flat.new_empty(largest - x.numel())))
        out = flat.new_empty(count * largest)
        wire = _flat(flat)
        work = _gather_single(_flat(out), wire, group=group, async_op=True)

        def finish() -> Tensor:
            if even and dim == 0:
                return out.view(result)
            if even:
                return out.view(count, *shapes[0]).movedim(0, dim).reshape(result).contiguous()
            rows = out.view(count, largest)
            pieces = [rows[i, : sizes[i]].view(shapes[i]) for i in range(count)]
            return torch.cat(pieces, dim)

        return Pending((work,), finish, wire)

    return start


def _pieces(comm: Groups, whole: TensorType, part: TensorType, axis: str, dim: int) -> list[Shape]:
    """(offset, size) along `dim`, within this rank's shard of `whole`, of each member's part."""
    base = local_range(whole, comm.mesh, comm.coord, dim)[0]
    ranges = (local_range(part, comm.mesh, coord, dim) for coord in comm.coords(axis))
    return [(offset - base, size) for offset, size in ranges]


def _cut(x: Tensor, dim: int, pieces: Sequence[Shape]) -> Tensor:
    """All pieces of a tensor behind each other, flat."""
    if dim == 0:  # they lie so already
        return _flat(x)
    return _flat(torch.cat([x.narrow(dim, o, s).reshape(-1) for o, s in pieces]))


def _swap(
    type: TensorType, counts: Sequence[int], wanted: Sequence[int], group: Any
) -> Callable[[Tensor, Tensor], Any]:
    """Starts an all_to_all `(flat pieces, result)`; piece sizes are given in elements."""
    scale = DTYPES[type.dtype] if TORCH_DTYPES[type.dtype] in _AS_BYTES else 1
    ins, outs = [n * scale for n in counts], [n * scale for n in wanted]
    exchange = dist.all_to_all_single
    return lambda sent, out: exchange(_flat(out), sent, outs, ins, group=group, async_op=True)


def _reduce_scatter(comm: Groups, op: Op) -> Start:
    axis, dim, combine = _axis(op), _int(op, "dim"), str(op.attrs.get("combine", "sum"))
    group = comm.group(axis)
    if group is None:
        return _alone
    operand, type = op.operands[0].type, op.result.type
    pieces = _pieces(comm, operand, type, axis, dim)
    mine = comm.shape(type)
    rest = prod(comm.shape(operand)) // max(1, comm.shape(operand)[dim])
    counts = [size * rest for _, size in pieces]
    wanted = [prod(mine)] * len(pieces)
    native = comm.nccl and len(set(counts)) == 1
    how, swap = _REDUCE[combine], _swap(type, counts, wanted, group)
    total, shape, dtype = sum(wanted), (len(wanted), *mine), TORCH_DTYPES[type.dtype]

    def start(x: Tensor) -> Pending:
        sent = _cut(x, dim, pieces)
        if native:
            result = x.new_empty(mine)
            work = _scatter_single(result.view(-1), sent, op=how, group=group, async_op=True)
            return Pending((work,), lambda: result, sent)
        out = x.new_empty(total)
        work = swap(sent, out)

        def finish() -> Tensor:
            rows = out.view(shape)
            if combine == "sum":
                return rows.sum(0, dtype=dtype)
            return rows.amax(0) if combine == "max" else rows.amin(0)

        return Pending((work,), finish, sent)

    return start


def _all_to_all(comm: Groups, op: Op) -> Start:
    axis, source, target = _axis(op), _int(op, "source"), _int(op, "target")
    group = comm.group(axis)
    if group is None:
        return _alone
    operand, type = op.operands[0].type, op.result.type
    pieces = _pieces(comm, operand, type, axis, target)
    local, mine = comm.shape(operand), comm.shape(type)
    counts = [size * (prod(local) // max(1, local[target])) for _, size in pieces]
    shapes = []
    for coord in comm.coords(axis):
        shape = list(mine)
        shape[source] = local_range(operand, comm.mesh, coord, source)[1]
        shapes.append(tuple(shape))
    wanted = [prod(shape) for shape in shapes]
    total, swap = sum(wanted), _swap(type, counts, wanted, group)

    def start(x: Tensor) -> Pending:
        sent = _cut(x, target, pieces)
        out = x.new_empty(total)
        work = swap(sent, out)

        def finish() -> Tensor:
            if source == 0:
                return out.view(mine)
            rows = torch.split(out, wanted)
            return torch.cat([r.view(s) for r, s in zip(rows, shapes, strict=True)], source)

        return Pending((work,), finish, sent)

    return start


def _broadcast(comm: Groups, op: Op) -> Start:
    axis, root = _axis(op), _int(op, "root")
    group, here = comm.group(axis), comm.position(axis) == root
    if group is None:
        return _alone
    shape = comm.shape(op.result.type)

    def start(x: Tensor) -> Pending:
        out = x.clone(memory_format=torch.contiguous_format) if here else x.new_empty(shape)
        work = dist.broadcast(_flat(out), group=group, group_src=root, async_op=True)
        return Pending((work,), lambda: out)

    return start


def _permute_ranks(comm: Groups, op: Op) -> Start:
    """As an all_to_all in which each rank sends everything to one other."""
    axis, shift = _axis(op), _int(op, "shift", 1)
    group, coords, here = comm.group(axis), comm.coords(axis), comm.position(axis)
    if group is None or shift % len(coords) == 0:
        return _alone
    size = len(coords)
    to, source = (here + shift) % size, (here - shift) % size
    shape = local_shape(op.operands[0].type, comm.mesh, coords[source])
    counts, wanted = [0] * size, [0] * size
    counts[to] = prod(comm.shape(op.operands[0].type))
    wanted[source] = prod(shape)
    swap = _swap(op.result.type, counts, wanted, group)

    def start(x: Tensor) -> Pending:
        sent, out = _flat(x), x.new_empty(shape)
        return Pending((swap(sent, out),), lambda: out, sent)

    return start


def _lse_combine(comm: Groups, op: Op) -> Start:
    group = comm.group(_axis(op))
    if group is None:
        return _alone
    count = len(comm.members(_axis(op)))

    def start(x: Tensor) -> Pending:
        sent = _flat(x)
        out = sent.new_empty(count * sent.numel())
        work = _gather_single(out, sent, group=group, async_op=True)
        shape = (count, *x.shape)
        return Pending((work,), lambda: out.view(shape).logsumexp(0), sent)

    return start


def _send(comm: Groups, op: Op) -> Start:
    if crosses(op):
        return _send_across(comm, op)
    peer = comm.ranks.rank(_int(op, "to"), comm.ranks.place(comm.rank))
    tag = _int(op, "tag")

    def start(x: Tensor) -> Pending:
        sent = _flat(x)
        return Pending((dist.isend(sent, peer, tag=tag),), lambda: x, sent)

    return start


def _recv(comm: Groups, op: Op) -> Start:
    if crosses(op):
        return _recv_across(comm, op)
    peer = comm.ranks.rank(_int(op, "source"), comm.ranks.place(comm.rank))
    type, tag = op.result.type, _int(op, "tag")
    shape, dtype = comm.shape(type), TORCH_DTYPES[type.dtype]

    def start() -> Pending:
        device = torch.device("cuda", torch.cuda.current_device()) if comm.nccl else None
        out = torch.empty(shape, dtype=dtype, device=device)
        return Pending((dist.irecv(_flat(out), peer, tag=tag),), lambda: out)

    return start


def _send_across(comm: Groups, op: Op) -> Start:
    """To each rank of the other mesh the piece of this rank's shard that it takes from here."""
    stage, tag, place = _int(op, "to"), _int(op, "tag"), comm.ranks.place(comm.rank)
    here = box_of(op.operands[0].type, comm.mesh, comm.coord)
    parts = [
        (comm.ranks.rank(stage, piece.target), inside(piece.box, here))
        for piece in op_pieces(op, comm.mesh)
        if piece.source == place
    ]

    def start(x: Tensor) -> Pending:
        sent = [(_flat(_part(x, part)), peer) for peer, part in parts]
        works = [dist.isend(piece, peer, tag=tag) for piece, peer in sent]
        return Pending(works, lambda: x, sent)

    return start


def _recv_across(comm: Groups, op: Op) -> Start:
    """The pieces of this rank's shard, each from the rank of the other mesh that sends it."""
    stage, tag, place = _int(op, "source"), _int(op, "tag"), comm.ranks.place(comm.rank)
    type = op.result.type
    here, shape, dtype = box_of(type, comm.mesh, comm.coord), comm.shape(type), TORCH_DTYPES[type.dtype]
    parts = [
        (comm.ranks.rank(stage, piece.source), inside(piece.box, here))
        for piece in op_pieces(op, comm.mesh)
        if piece.target == place
    ]

    def start() -> Pending:
        device = torch.device("cuda", torch.cuda.current_device()) if comm.nccl else None
        out = torch.empty(shape, dtype=dtype, device=device)
        places = [_part(out, part) for _, part in parts]
        taken = [p if p.is_contiguous() else torch.empty_like(
            p, memory_format=torch.contiguous_format) for p in places]  # fmt: skip
        works = [
            dist.irecv(_flat(piece), peer, tag=tag)
            for piece, (peer, _) in zip(taken, parts, strict=True)
        ]

        def finish() -> Tensor:
            for whole, piece in zip(places, taken, strict=True):
                if whole is not piece:
                    whole.copy_(piece)
            return out

        return Pending(works, finish, taken)

    return start


def _part(x: Tensor, ranges: Sequence[tuple[int, int]]) -> Tensor:
    """A view of (offset, size) of each dim."""
    for dim, (offset, size) in enumerate(ranges):
        x = x.narrow(dim, offset, size)
    return x


def _shard(comm: Groups, op: Op) -> Callable[..., Tensor]:
    axis, dim = _axis(op), _int(op, "dim")
    pieces = _pieces(comm, op.operands[0].type, op.result.type, axis, dim)
    offset, size = pieces[comm.position(axis)]
    # a copy: a view would keep the whole operand's memory after its `free`
    return lambda x: x.narrow(dim, offset, size).clone(memory_format=torch.contiguous_format)


def _partial(comm: Groups, op: Op) -> Callable[..., Tensor]:
    axis, combine = _axis(op), str(op.attrs.get("combine", "sum"))
    operand, type = op.operands[0].type, op.result.type
    held: Placement = (operand.placement or ())[comm.mesh.axis(axis)]
    if held.kind == "S":
        dim = held.dim
        offset, size = _pieces(comm, type, operand, axis, dim)[comm.position(axis)]
        shape = comm.shape(type)

        def pad(x: Tensor) -> Tensor:
            out = neutral(x.new_empty(()), combine).expand(shape).clone()
            out.narrow(dim, offset, size).copy_(x)
            return out

        return pad
    if combine == "sum" and comm.position(axis) != 0:
        return partial(torch.zeros_like, memory_format=torch.contiguous_format)
    return partial(torch.clone, memory_format=torch.contiguous_format)


STARTS: dict[str, Callable[[Groups, Op], Start]] = {
    "all_reduce": all_reduce, "all_gather": _all_gather, "reduce_scatter": _reduce_scatter,
    "all_to_all": _all_to_all, "broadcast": _broadcast, "permute_ranks": _permute_ranks,
    "lse_combine": _lse_combine, "send": _send, "recv": _recv,
}  # fmt: skip
LOCALS: dict[str, Callable[[Groups, Op], Callable[..., Tensor]]] = {
    "shard": _shard, "partial": _partial,
}  # fmt: skip
#: ops that communicate or depend on the rank: the keys of both tables
COMMUNICATION = frozenset(STARTS) | frozenset(LOCALS)
