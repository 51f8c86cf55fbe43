"""Rules on meshes, placements and splits; none of them at the logical level."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .module import Module, Op, Value
from .opdef import signature_of
from .ops import OPS
from .rule import Rule, Violation, op_rule
from .types import B, Mesh, Placement, illegal_placement


def _logical(module: Module) -> Iterator[Violation]:
    if module.mesh is not None:
        yield Violation("a logical module has no mesh", hint="set the level to placed")
    for function in module.functions:
        for value in function.params:
            if value.type.placement is not None:
                yield Violation(f"{value} has a placement", function)
        for index, op in enumerate(function.ops):
            if op.split:
                yield Violation(f"{op.name} has a split", function, index)
            for value in op.results:
                if value.type.placement is not None:
                    yield Violation(f"{value} has a placement", function, index)


def _mesh(module: Module) -> Iterator[Violation]:
    if module.mesh is None:
        yield Violation(f"a {module.level} module needs a mesh", hint='write `mesh [dp=2] "cpu"`')
        return
    if len(set(module.mesh.names)) != len(module.mesh.names):
        yield Violation("two mesh axes have one name")
    for name, size in module.mesh.axes:
        if size < 1:
            yield Violation(f"mesh axis {name} has size {size}")


def mesh_of(module: Module) -> Mesh:
    """The mesh of a module that has one; the rule `mesh` comes first."""
    assert module.mesh is not None
    return module.mesh


def _illegal(value: Value, mesh: Mesh) -> str:
    if value.type.placement is None:
        return f"{value} has no placement"
    reason = illegal_placement(value.type, mesh, value.type.placement)
    return f"{value} : {value.type}: {reason}" if reason else ""


def _placements(module: Module) -> Iterator[Violation]:
    mesh = mesh_of(module)
    for function in module.functions:
        for value in function.params:
            if message := _illegal(value, mesh):
                yield Violation(message, function, code="W0203")
        for index, op in enumerate(function.ops):
            for value in op.results:
                if message := _illegal(value, mesh):
                    yield Violation(message, function, index, "W0203")


def _split(module: Module, op: Op) -> str:
    mesh = mesh_of(module)
    for axis in op.split:
        if axis not in mesh.names:
            known = ", ".join(mesh.names) or "none"
            return f"the split names the axis {axis!r}, the mesh has {known}"
    if not op.split:
        return ""
    if OPS[op.name].signature is None:
        return f"{op.name} has no signature, so it cannot be split"
    states = tuple(op.split.get(axis, "") for axis in mesh.names)
    reason = signature_of(op).check(states, mesh.sizes)
    return f"{op.name} cannot be split so: {reason}" if reason else ""


def _show(placement: Sequence[Placement]) -> str:
    return "{" + ", ".join(map(str, placement)) + "}"


def _unlike(
    values: Sequence[Value], wanted: Sequence[tuple[Placement, ...]], what: str, why: str
) -> str:
    for number, (value, placement) in enumerate(zip(values, wanted, strict=True)):
        if value.type.placement != placement:
            held = _show(value.type.placement or ())
            return f"{what} {number}, {value}, is {held}, {why} {_show(placement)}"
    return ""


def _fits(module: Module, op: Op) -> str:
    mesh = mesh_of(module)
    if op.name == "aten":  # opaque: on whole values only
        whole = [(B,) * len(mesh.axes)]
        message = _unlike(op.operands, whole * len(op.operands), "operand", "aten needs")
        return message or _unlike(op.results, whole * len(op.results), "result", "aten gives")
    if OPS[op.name].signature is None:
        return ""
    states = tuple(op.split.get(axis, "") for axis in mesh.names)
    operands, results = signature_of(op).placements(states)
    message = _unlike(op.operands, operands, "operand", "the split needs")
    return message or _unlike(op.results, results, "result", "the split gives")


RULES: tuple[Rule, ...] = (
    Rule("mesh", "there is a mesh with named axes", _mesh),
    Rule("placements", "each value has a placement that is legal for its shape", _placements),
    op_rule("split", "splits name mesh axes, and states that the op allows", _split, "W0203"),
    op_rule("split-placements", "values are placed as the op's split says", _fits, "W0203"),
)
LOGICAL: tuple[Rule, ...] = (
    Rule("logical", "there are no meshes, placements and splits", _logical),
)
