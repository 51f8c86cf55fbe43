"""What the collectives of `ir/ops/collective.py` mean: functions over the values of all ranks.

A value is a list with one tensor for each rank of the mesh, in rank order. Each function acts on
every group of ranks that differ only along the axis; shards may be uneven. Where a tensor dim is
split over several axes, the axis of `all_gather`, `reduce_scatter`, `all_to_all` and `shard` must
be the innermost one that splits it, before as well as after: their types say so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ..ir.crossing import box_of, crosses, far_end, inside, op_pieces
from ..ir.errors import RunError
from ..ir.module import Op
from ..ir.types import Mesh, local_shape, shard_offset, shard_size
from .shards import combine_terms, neutral

Ranks = Sequence[Tensor]


def over_groups(
    values: Ranks, mesh: Mesh, axes: Sequence[str], act: Callable[[list[Tensor]], list[Tensor]]
) -> list[Tensor]:
    """Apply `act` (values of a group -> new values of its ranks) to each group along `axes`."""
    out = list(values)
    for group in _groups(mesh, tuple(axes)):
        for member, tensor in zip(group, act([values[r] for r in group]), strict=True):
            out[member] = tensor
    return out


@lru_cache(maxsize=1024)
def _groups(mesh: Mesh, axes: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
    """All groups of ranks that differ only along axes."""
    return tuple(dict.fromkeys(mesh.group(rank, axes) for rank in range(mesh.size)))


def _parts(tensor: Tensor, dim: int, count: int) -> list[Tensor]:
    total = tensor.shape[dim]
    return [
        tensor.narrow(dim, shard_offset(total, count, i), shard_size(total, count, i))
        for i in range(count)
    ]


def all_reduce(values: Ranks, mesh: Mesh, axis: str, combine: str = "sum") -> list[Tensor]:
    """P(combine) -> B."""
    return over_groups(values, mesh, [axis], lambda g: [combine_terms(g, combine)] * len(g))


def all_gather(values: Ranks, mesh: Mesh, axis: str, dim: int) -> list[Tensor]:
    """S(dim) -> B."""
    return over_groups(values, mesh, [axis], lambda g: [torch.cat(g, dim)] * len(g))


def reduce_scatter(
    values: Ranks, mesh: Mesh, axis: str, dim: int, combine: str = "sum"
) -> list[Tensor]:
    """P(combine) -> S(dim)."""
    return over_groups(
        values, mesh, [axis], lambda g: _parts(combine_terms(g, combine), dim, len(g))
    )


def all_to_all(values: Ranks, mesh: Mesh, axis: str, source: int, target: int) -> list[Tensor]:
    """S(source) -> S(target)."""

    def act(group: list[Tensor]) -> list[Tensor]:
        cut = [_parts(tensor, target, len(group)) for tensor in group]
        return [torch.cat([row[i] for row in cut], source) for i in range(len(group))]

    return over_groups(values, mesh, [axis], act)


def broadcast(values: Ranks, mesh: Mesh, axis: str, root: int = 0) -> list[Tensor]:
    """The value of coordinate `root` on all ranks of the axis."""
    return over_groups(values, mesh, [axis], lambda g: [g[root]] * len(g))


def permute_ranks(values: Ranks, mesh: Mesh, axis: str, shift: int = 1) -> list[Tensor]:
    """Coordinate i receives from i - shift, around the ring."""
    return over_groups(
        values, mesh, [axis], lambda g: [g[(i - shift) % len(g)] for i in range(len(g))]
    )


def shard(values: Ranks, mesh: Mesh, axis: str, dim: int) -> list[Tensor]:
    """B -> S(dim)."""
    return over_groups(
        values, mesh, [axis], lambda g: [_parts(t, dim, len(g))[i] for i, t in enumerate(g)]
    )


def partial(
    values: Ranks, mesh: Mesh, axis: str, combine: str = "sum", dim: int | None = None
) -> list[Tensor]:
    """B -> P(combine), or S(dim) -> P(combine) when `dim` is given.

    What a rank does not hold is filled with the neutral element; from B, `max` and `min` copy.
    """

    def act(group: list[Tensor]) -> list[Tensor]:
        if dim is not None:
            empty = [neutral(tensor, combine) for tensor in group]
            return [
                torch.cat([*empty[:i], tensor, *empty[i + 1 :]], dim)
                for i, tensor in enumerate(group)
            ]
        if combine != "sum":
            return group
        return [t if i == 0 else torch.zeros_like(t) for i, t in enumerate(group)]

    return over_groups(values, mesh, [axis], act)


def lse_combine(values: Ranks, mesh: Mesh, axes: Sequence[str]) -> list[Tensor]:
    """log-sum-exp over axes; -inf where all ranks hold -inf."""
    return over_groups(values, mesh, axes, lambda g: [torch.stack(g).logsumexp(0)] * len(g))


#: (sending stage, receiving stage, tag) -> messages under way
Mailbox = dict[tuple[int, int, int], list[list[Tensor]]]


def run_collective(
    op: Op, values: Ranks, mesh: Mesh, mail: Mailbox | None = None, stage: int = 0
) -> list[Tensor]:
    """The result of one collective op (or of `shard`, `partial`, `send`, `recv`) on every rank.

    Args:
        op: the op; its axis and other attributes say what to do.
        values: the operand on every rank; empty for `recv`.
        mail: messages under way.
        stage: the stage that runs the op; the mesh holds the ranks of one stage.

    Raises RunError W0803 when nothing was sent that a `recv` could receive.
    """
    attrs: Mapping[str, object] = op.attrs
    if op.name in ("send", "recv"):
        return _message(op, values, mesh, {} if mail is None else mail, stage)
    axis = str(attrs["axis"])
    named = {
        key: attrs[key]
        for key in ("combine", "dim", "source", "target", "root", "shift")
        if key in attrs
    }
    if op.name == "lse_combine":
        return lse_combine(values, mesh, [axis])
    if op.name == "partial":
        held = (op.operands[0].type.placement or ())[mesh.axis(axis)]
        if held.kind == "S":
            named["dim"] = held.dim
    return COLLECTIVES[op.name](values, mesh, axis, **named)


def _message(op: Op, values: Ranks, mesh: Mesh, mail: Mailbox, stage: int) -> list[Tensor]:
    tag = int(op.attrs.get("tag", 0))  # type: ignore[arg-type]
    if op.name == "send":
        to = int(op.attrs["to"])  # type: ignore[arg-type]
        mail.setdefault((stage, to, tag), []).append(list(values))
        return list(values)
    waiting = mail.get((int(op.attrs["source"]), stage, tag))  # type: ignore[arg-type]
    if not waiting:
        raise RunError("W0803", f"stage {stage} receives tag {tag}, which nothing has sent")
    sent = waiting.pop(0)
    return _crossed(op, sent, mesh) if crosses(op) else sent


def _crossed(op: Op, sent: Ranks, mesh: Mesh) -> list[Tensor]:
    """What the ranks of a stage put together from the pieces that the ranks of another one send.

    What no piece covers is NaN, or -1.
    """
    own, (there, type) = op.result.type, far_end(op)
    odd = float("nan") if sent[0].is_floating_point() else -1
    out = [sent[0].new_full(local_shape(own, mesh, coord), odd) for coord in mesh.coords()]
    for piece in op_pieces(op, mesh):
        source = inside(piece.box, box_of(type, there, there.coord(piece.source)))
        target = inside(piece.box, box_of(own, mesh, mesh.coord(piece.target)))
        got, place = sent[piece.source], out[piece.target]
        for dim, ((start, size), (here, _)) in enumerate(zip(source, target, strict=True)):
            got, place = got.narrow(dim, start, size), place.narrow(dim, here, size)
        place.copy_(got)
    return out


#: op name -> its meaning, `f(values, mesh, axis, **attributes)`
COLLECTIVES: dict[str, Callable[..., list[Tensor]]] = {
    "all_reduce": all_reduce, "all_gather": all_gather, "reduce_scatter": reduce_scatter,
    "all_to_all": all_to_all, "broadcast": broadcast, "permute_ranks": permute_ranks,
    "shard": shard, "partial": partial,
}  # fmt: skip
