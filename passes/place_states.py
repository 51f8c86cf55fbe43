"""The states of an op on a mesh: every legal split, what it asks for, and what it costs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import product

from ..costmodel.cluster import Cluster
from ..costmodel.estimate import op_time_us, op_times_us
from ..ir.module import Op, Value
from ..ir.opdef import OPS, full_attrs, signature_of
from ..ir.types import B, Mesh, TensorType, illegal_placement
from .reshard import Placements


@dataclass(frozen=True)
class State:
    """A split of an op: a state per axis, placements of operands and results, time in us."""

    states: tuple[str, ...]
    operands: tuple[Placements, ...]
    results: tuple[Placements, ...]
    time_us: float


def states_of(
    op: Op, mesh: Mesh, cluster: Cluster, fixed: tuple[str | None, ...] = ()
) -> tuple[State, ...]:
    """All legal states of an op.

    Of states with the same placements only the fastest is kept. `fixed` gives the state of an axis
    that has none to choose, None for the others. Raises SignatureError.
    """
    attrs = tuple(sorted(full_attrs(op.name, op.attrs).items()))
    ins = tuple(v.type for v in op.operands)
    outs = tuple(v.type for v in op.results)
    return _states(op.name, attrs, ins, outs, mesh, cluster, fixed or (None,) * len(mesh.axes))


@lru_cache(maxsize=16384)
def _states(
    name: str,
    attrs: tuple[tuple[str, object], ...],
    ins: tuple[TensorType, ...],
    outs: tuple[TensorType, ...],
    mesh: Mesh,
    cluster: Cluster,
    fixed: tuple[str | None, ...],
) -> tuple[State, ...]:
    op = Op(
        name,
        tuple(Value(f"o{i}", t) for i, t in enumerate(ins)),
        tuple(Value(f"r{i}", t) for i, t in enumerate(outs)),
        dict(attrs),  # type: ignore[arg-type]
    )
    whole, nothing = (B,) * len(mesh.axes), ("",) * len(mesh.axes)
    if OPS[name].signature is None:
        time_us = op_time_us(op, nothing, mesh, cluster)
        return (State(nothing, (whole,) * len(ins), (whole,) * len(outs), time_us),)
    signature = signature_of(op)
    choices = []
    for size, only in zip(mesh.sizes, fixed, strict=True):
        legal = ["", *(s for s in signature.states if not signature.illegal(s, size))]
        choices.append(legal if only is None else [only])
    legal_states = []
    for states in product(*choices):
        if signature.check(states, mesh.sizes):
            continue
        operands, results = signature.placements(states)
        tensors = zip((*ins, *outs), (*operands, *results), strict=True)
        if not any(illegal_placement(t, mesh, p) for t, p in tensors):
            legal_states.append((states, operands, results))
    # priced together: a batch costs little more than one
    times = op_times_us(op, [states for states, _, _ in legal_states], mesh, cluster)
    found: dict[object, State] = {}
    for (states, operands, results), time_us in zip(legal_states, times, strict=True):
        state = State(states, operands, results, time_us)
        known = found.get((operands, results))
        if known is None or state.time_us < known.time_us:
            found[operands, results] = state
    return tuple(found.values())
