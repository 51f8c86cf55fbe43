"""What each mesh axis does, in plain words, from what it splits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from ..ir.module import Module, Op
from ..ir.opdef import OPS, flops_of, signature_of
from ..ir.types import Mesh
from .flat import flat

#: results of these hold what their first operand holds
_SAME = frozenset({"reshard", "reshape", "permute", "expand", "slice", "cast"})
#: kind of split -> its name in the field, and what it does to the work
_KINDS = {
    "batch": ("data parallel", "the batch is split"),
    "sequence": ("sequence parallel", "the sequence is split"),
    "weight": ("tensor parallel", "weights or heads are split"),
}


def axis_words(placed: Module, axis: str) -> str:
    """One line about a mesh axis of a placed module.

    Of the contractions' FLOPs, how much it splits by batch, by sequence and by weights; of the
    bytes of parameters and optimizer states, how much it shards, and which ZeRO stage that is.
    Rajbhandari et al., ZeRO, 2020.
    """
    module = flat(placed)
    work = _work(module, axis)
    total = sum(work.values())
    parts = []
    for kind, flops in work.most_common():
        if kind in _KINDS and flops >= 0.005 * total:
            name, what = _KINDS[kind]
            parts.append(f"{name}: {what} in {flops / total:.0%} of the matrix work")
    if work["repeated"] and parts:
        parts.append(f"{work['repeated'] / total:.0%} of it is repeated")
    if _splits_vocabulary(module, axis):
        parts.append("the vocabulary of an embedding is split")
    stored = _stored(module, axis)
    replicates = work["batch"] + work["sequence"] >= work["weight"]
    parts += _stored_words(stored, replicates, _scatters_gradients(module, axis))
    return "; ".join(parts) or "not used: every rank along it does the same"


def _work(module: Module, axis: str) -> Counter[str]:
    """FLOPs of the contractions by kind of split along an axis."""
    weights = _weights(module)
    work: Counter[str] = Counter()
    for op in module.entry.ops:
        if OPS[op.name].family == "contraction":
            work[_kind(op, axis, weights)] += int(flops_of(op))
    return work


def _weights(module: Module) -> set[str]:
    """Names of the values that are parameters, perhaps moved or cast."""
    entry = module.entry
    pairs = zip(entry.params, entry.param_attrs, strict=True)
    names = {value.name for value, attrs in pairs if attrs.get("role") == "param"}
    for op in entry.ops:
        if op.name in _SAME and op.operands[0].name in names:
            names.update(v.name for v in op.results)
    return names


def _kind(op: Op, axis: str, weights: set[str]) -> str:
    dim = op.split.get(axis, "")
    signature = signature_of(op)
    if dim not in signature.dims:
        return "repeated"
    if op.name.startswith("attention"):
        return {"b": "batch", "s": "sequence", "t": "sequence"}.get(dim, "weight")
    tensors = (*signature.operands, *signature.results)
    values = (*op.operands, *op.results)
    held = [signature.position(tensor, dim) for tensor in tensors]
    for value, position in zip(values, held, strict=True):
        if value.name in weights and position is not None:
            return "weight"
    # a weight's gradient: its own dims stay, those of the tokens are summed
    first = next(i for i, position in enumerate(held) if position is not None)
    position, rank = held[first], len(values[first].type.shape)
    has_weight = any(v.name in weights for v in op.operands)
    if not has_weight and held[len(op.operands)] is not None and len(op.results[0].type.shape) <= 2:
        return "weight"
    if position == 0:
        return "batch"
    if op.name == "convolution" or (rank == 4 and position == 1) or position == rank - 1:
        return "weight"
    return "sequence"


def _splits_vocabulary(module: Module, axis: str) -> bool:
    return any(op.name == "embedding" and op.split.get(axis) == "v" for op in module.entry.ops)


def _stored(module: Module, axis: str) -> dict[str, float]:
    """Share of the bytes of parameters and of states that an axis shards."""
    position = (module.mesh or Mesh()).axis(axis)
    cut: Counter[str] = Counter()
    whole: Counter[str] = Counter()
    entry = module.entry
    for value, attrs in zip(entry.params, entry.param_attrs, strict=True):
        role = str(attrs.get("role", ""))
        sharded = value.type.placement and value.type.placement[position].kind == "S"
        (cut if sharded else whole)[role] += value.type.bytes
    return {role: cut[role] / max(1, cut[role] + whole[role]) for role in ("param", "state")}


def _scatters_gradients(module: Module, axis: str) -> bool:
    """Does an update read a gradient whose sum was scattered over the axis?"""
    position = (module.mesh or Mesh()).axis(axis)
    defs = module.entry.defs()
    for op in module.entry.ops:
        if OPS[op.name].family == "optimizer":
            source = defs.get(op.operands[1].name)
            if source is not None and source.name == "reshard":
                before = source.operands[0].type.placement or ()
                after = source.result.type.placement or ()
                if before[position].kind == "P" and after[position].kind == "S":
                    return True
    return False


def _stored_words(stored: dict[str, float], replicates: bool, scatters: bool) -> Iterator[str]:
    param, state = stored["param"], stored["state"]
    if not replicates and (param or state):
        states = f" and {state:.0%} of the optimizer states" if state else ""
        yield f"each rank holds its part of {param:.0%} of the parameters{states}"
        return
    if param:
        states = f" and {state:.0%} of the optimizer states" if state else ""
        yield f"{param:.0%} of the parameters{states} are sharded (ZeRO-3)"
    elif state:
        stage = "ZeRO-2" if scatters else "ZeRO-1"
        yield f"{state:.0%} of the optimizer states are sharded ({stage})"
    elif replicates:
        yield "parameters are whole"
