"""Rules of all levels: names, SSA form, calls, the op table, attributes."""

from __future__ import annotations

from collections.abc import Iterator

from .module import LEVELS, Attr, Function, Module, Op, Value
from .opdef import attr_fits
from .ops import OPS
from .rule import Rule, Violation, op_rule
from .type_text import near
from .types import DTYPES, TensorType

#: What the parameters and results of the entry function may be.
PARAM_ROLES = frozenset({
    "param", "buffer", "state", "input", "lr", "seed", "tangent", "grad", "received",
})  # fmt: skip
RESULT_ROLES = frozenset({"loss", "output", "update", "grad", "backward", "sent"})


def _level(module: Module) -> Iterator[Violation]:
    if module.level not in LEVELS:
        yield Violation(f"there is no level {module.level!r}", hint=f"known: {', '.join(LEVELS)}")


def _functions(module: Module) -> Iterator[Violation]:
    if not module.functions:
        yield Violation("the module has no function; the first one is the entry")
    seen: set[str] = set()
    for function in module.functions:
        if function.name in seen:
            yield Violation(f"@{function.name} is defined twice", function)
        seen.add(function.name)
        if len(function.param_attrs) != len(function.params):
            yield Violation(f"@{function.name}: each parameter needs one record of attributes")
        if len(function.result_attrs) != len(function.results):
            yield Violation(f"@{function.name}: each result needs one record of attributes")


def _wrong_use(value: Value, defined: dict[str, TensorType]) -> str:
    known = defined.get(value.name)
    if known is None:
        return f"{value} is used before it is defined"
    if known != value.type:
        return f"{value} is used as {value.type}, but it is defined as {known}"
    return ""


def _ssa(module: Module) -> Iterator[Violation]:
    for function in module.functions:
        defined: dict[str, TensorType] = {}
        for value in function.params:
            if value.name in defined:
                yield Violation(f"{value} is defined twice", function)
            defined[value.name] = value.type
        for index, op in enumerate(function.ops):
            for value in op.operands:
                if message := _wrong_use(value, defined):
                    hint = near(value.name, defined) if value.name not in defined else ""
                    yield Violation(message, function, index, hint=hint)
            for value in op.results:
                if value.name in defined:
                    yield Violation(f"{value} is defined twice", function, index)
                defined[value.name] = value.type
        for value in function.results:
            if message := _wrong_use(value, defined):
                yield Violation(message, function, len(function.ops))


def _malformed(type: TensorType) -> str:
    if type.dtype not in DTYPES:
        return f"has the unknown dtype {type.dtype!r}"
    return "has a negative size" if any(size < 0 for size in type.shape) else ""


def _types(module: Module) -> Iterator[Violation]:
    for function in module.functions:
        for value in function.params:
            if message := _malformed(value.type):
                yield Violation(f"{value} {message}", function, code="W0202")
        for index, op in enumerate(function.ops):
            for value in op.results:
                if message := _malformed(value.type):
                    yield Violation(f"{value} {message}", function, index, "W0202")


def _known_op(module: Module, op: Op) -> str:
    entry = OPS.get(op.name)
    if entry is None:
        return f"unknown op {op.name!r}; {near(op.name, OPS)}".rstrip("; ")
    if module.level not in entry.levels:
        return f"{op.name} belongs to {' and '.join(entry.levels)}, not to {module.level}"
    return ""


def _attrs(module: Module, op: Op) -> str:
    entry = OPS[op.name]
    for name, value in op.attrs.items():
        spec = entry.attrs.get(name)
        if spec is None:
            return f"{op.name} has no attribute {name!r}; it has {', '.join(entry.attrs) or 'none'}"
        if not attr_fits(spec.kind, value):
            return f"attribute {name!r} of {op.name} is {value!r}, not of kind {spec.kind}"
    for name, spec in entry.attrs.items():
        if spec.default is None and name not in op.attrs:
            return f"{op.name} needs the attribute {name!r}"
    return ""


def _own(module: Module, op: Op) -> str:
    check = OPS[op.name].verify
    return check(op) if check is not None else ""


def _differs(what: str, given: tuple[Value, ...], wanted: tuple[Value, ...]) -> str:
    if len(given) != len(wanted):
        return f"{len(given)} {what}s, the callee has {len(wanted)}"
    for number, (one, other) in enumerate(zip(given, wanted, strict=True)):
        if one.type != other.type:
            return f"{what} {number} is {one.type}, the callee's is {other.type}"
    return ""


def _calls(module: Module) -> Iterator[Violation]:
    functions = {function.name: function for function in module.functions}
    for function in module.functions:
        for index, op in enumerate(function.ops):
            if op.name != "call":
                continue
            name = str(op.attrs["callee"])
            callee = functions.get(name)
            if callee is None:
                yield Violation(f"there is no function @{name}", function, index,
                                hint=near(name, functions))  # fmt: skip
                continue
            message = _differs("operand", op.operands, callee.params)
            message = message or _differs("result", op.results, callee.results)
            if message:
                yield Violation(f"call of @{name}: {message}", function, index)


def callees(function: Function) -> list[tuple[int, str]]:
    """(position of the call, callee) of each call in a function."""
    return [
        (index, str(op.attrs["callee"]))
        for index, op in enumerate(function.ops)
        if op.name == "call"
    ]


def _recursion(module: Module) -> Iterator[Violation]:
    """Depth-first search without Python recursion: call chains may be long."""
    calls = {function.name: callees(function) for function in module.functions}
    done: set[str] = set()
    for start in module.functions:
        path: list[str] = [start.name]
        pending = [iter(calls[start.name])]
        while pending:
            step = next(pending[-1], None)
            if step is None:
                pending.pop()
                done.add(path.pop())
                continue
            index, name = step
            if name in path:
                chain = " calls ".join(f"@{part}" for part in [*path[path.index(name) :], name])
                yield Violation(f"recursion: {chain}", module.function(path[-1]), index)
            elif name not in done:
                path.append(name)
                pending.append(iter(calls[name]))


def _role(attrs: dict[str, Attr], known: frozenset[str]) -> str:
    role = attrs.get("role")
    return "" if role is None or role in known else f"unknown role {role!r}"


def _entry(module: Module) -> Iterator[Violation]:
    entry = module.entry
    params = {value.name: value for value in entry.params}
    for value, attrs in zip(entry.params, entry.param_attrs, strict=True):
        if message := _role(dict(attrs), PARAM_ROLES):
            yield Violation(f"{value}: {message}", entry, hint=f"known: {sorted(PARAM_ROLES)}")
    updated: set[str] = set()
    for value, attrs in zip(entry.results, entry.result_attrs, strict=True):
        if message := _role(dict(attrs), RESULT_ROLES):
            yield Violation(f"{value}: {message}", entry, hint=f"known: {sorted(RESULT_ROLES)}")
        if (attrs.get("role") == "update") != ("updates" in attrs):
            yield Violation(f"{value}: role `update` and `updates` go together", entry)
        if "updates" not in attrs:
            continue
        name = str(attrs["updates"])
        target = params.get(name)
        if target is None:
            yield Violation(f"{value} updates %{name}, which is no parameter", entry,
                            hint=near(name, params))  # fmt: skip
        elif target.type != value.type:
            yield Violation(f"{value} : {value.type} updates {target} : {target.type}", entry)
        if name in updated:
            yield Violation(f"%{name} is updated twice", entry)
        updated.add(name)


RULES: tuple[Rule, ...] = (
    Rule("level", "the level is one of the four", _level),
    Rule("functions", "there is an entry; function names are unique", _functions),
    op_rule("known-op", "each op is in the op table and allowed at the level", _known_op),
    op_rule("attributes", "each op has the attributes of its table entry", _attrs),
    Rule("types", "dtypes are known, sizes are not negative", _types),
    Rule("ssa", "values are defined once, before their uses, and keep their type", _ssa),
    Rule("calls", "calls name a function and fit its parameters and results", _calls),
    Rule("recursion", "no function calls itself, directly or through others", _recursion),
    Rule("entry", "roles are known; an update has the type of the parameter it replaces", _entry),
)
#: Checked once shapes and dtypes are known to fit.
LATE: tuple[Rule, ...] = (op_rule("op", "the op's own check holds", _own),)
