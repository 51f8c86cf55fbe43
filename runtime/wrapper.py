"""A schedule as straight-line Python: one line for each action.

    v7 = f7(v3, v4)                          # einsum, model.layers.0.mlp (modeling.py:212)
    del v3

`f7` is the op's reference semantics bound to a context that knows this rank's coordinate, so a step
does no look-ups and no interpretation. Values of constants alone are computed when the wrapper is
made. Neighbouring in-place optimizer updates run as one call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import count
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..ir.module import Function, Module, Op, Value
from ..ir.ops import OPS
from ..ir.ops.optimizer import OVERWRITES
from ..ir.types import DTYPES, local_shape
from .comm import COMMUNICATION, Comm
from .context import OpContext, results_of
from .finite import FiniteCheck
from .inductor import Inductor
from .lifetimes import PERSISTENT, alias_roots, last_readers
from .pairs import both_gradients, image_and_kernel, pairs
from .reuse import into_operand, reusable
from .sections import Run, Section, Text, cut
from .segments import Segment
from .updates import by_kernel, make_update, update_key, update_name

#: Constants up to this many bytes are kept between steps; larger ones are cheap to fill and would
#: hold memory all the time.
HOIST_BYTES = 1 << 20
#: families whose results depend on nothing but operands, attributes and the rank's coordinate
_PURE = frozenset({"pointwise", "reduction", "row", "movement", "indexing", "contraction"})
_serial = count()

Kernel = Callable[..., Sequence[Tensor]]


class Wrapper:
    """Compiles a schedule for one rank.

    Args:
        module: a schedule-level module.
        comm: this rank's communication.
        device: where the rank's tensors live.
        kernels: compiled kernels by name, `launch(*operands) -> results`; a kernel function that is
            not among them runs its body.
        check_finite: look for NaN and Inf after each action (`finite.py`).
        compiler: compiles the actions between transfers; they run one by one without it.
    """

    def __init__(
        self,
        module: Module,
        comm: Comm,
        device: torch.device,
        kernels: Mapping[str, Kernel] | None = None,
        check_finite: bool = False,
        compiler: Inductor | None = None,
    ) -> None:
        self.module, self.comm, self.device = module, comm, device
        self.function = module.entry
        self.kernels = dict(kernels or {})
        self.names: dict[str, str] = {}
        self.called: dict[str, str] = {}  # kernel function -> its name in Python
        self.globals: dict[str, Any] = {"ROWS": torch.contiguous_format}
        self.lines: dict[tuple[str, int], Op] = {}  # (generated file, line) -> action
        self.roots = alias_roots(self.function)
        self.roles = {
            value.name: str(attrs.get("role", "input"))
            for value, attrs in zip(self.function.params, self.function.param_attrs, strict=True)
        }
        lasting = [v for v in self.function.params if self.roles[v.name] in PERSISTENT]
        self.slots = {value.name: slot for slot, value in enumerate(lasting)}
        #: result of an in-place update -> the value whose memory it took
        self.storage = {
            result.name: op.operands[place].name
            for op in self.function.ops
            if op.attrs.get("inplace")
            for place, result in zip(OVERWRITES.get(op.name, ()), op.results, strict=False)
        }
        self._last = last_readers(self.function)
        self.constants: dict[str, Tensor] = {}
        self._numbers: dict[str, Op] = {}  # constants that are one number
        self._hoist()
        self.finite: FiniteCheck | None = None
        if check_finite:
            self.finite = FiniteCheck(self.function, comm, self.constants, self._body)
            self.globals |= {"BEGIN": self.finite.begin, "AFTER": self.finite.after}
        self._reused = reusable(self.function, tuple(self.constants))
        self.sections = cut(self.function, self.constants)
        self.compiler = None if check_finite else compiler
        for section in self.sections:
            attrs = self.function.result_attrs
            section.returned = [p for p in section.results if "updates" not in attrs[p]]
            section.run = self._function(section, traced=False)

    def traced(self, section: Section) -> Run:
        """A section's function that reads the clock after each action."""
        if section.traced is None:
            section.traced = self._function(section, traced=True)
        return section.traced

    # -- what is known before the first step ------------------------------------------------

    def _context(self, op: Op) -> OpContext:
        return OpContext(op, self.comm.mesh, self.comm.coord, device=self.device, fused=True)

    def _hoist(self) -> None:
        """Compute the small values that depend on constants alone."""
        overwritten = {root for name in self.storage.values() for root in self.roots.get(name, ())}
        for op in self.function.ops:
            if not self._is_pure(op):
                continue
            if any(value.name not in self.constants for value in op.operands):
                continue
            small = all(self._bytes(value) <= HOIST_BYTES for value in op.results)
            if not small or any(self.roots[v.name] & overwritten for v in op.results):
                continue
            with torch.no_grad():
                tensors = self._evaluate(op, [self.constants[v.name] for v in op.operands])
            for value, tensor in zip(op.results, tensors, strict=True):
                self.constants[value.name] = tensor
                self.globals[self._name(value)] = tensor
                if op.name == "constant":
                    self._numbers[value.name] = op

    def _is_pure(self, op: Op) -> bool:
        if op.name == "call":
            return all(map(self._is_pure, self.module.function(str(op.attrs["callee"])).ops))
        return OPS[op.name].family in _PURE or _is_constant(op)

    def _evaluate(self, op: Op, operands: Sequence[Tensor]) -> Sequence[Tensor]:
        if op.name == "call":
            results: Sequence[Tensor] = self.globals[self._kernel(str(op.attrs["callee"]))](
                *operands
            )
            return results
        return results_of(op, self._semantics(op)(*operands))

    def _bytes(self, value: Value) -> int:
        shape = local_shape(value.type, self.comm.mesh, self.comm.coord)
        return prod(shape) * DTYPES[value.type.dtype]

    def _name(self, value: Value) -> str:
        return self.names.setdefault(value.name, f"v{len(self.names)}")

    # -- text ---------------------------------------------------------------------------------

    def _function(self, section: Section, traced: bool) -> Callable[..., Any]:
        text = Text(f"<weft rank {self.comm.rank} step {next(_serial)}>", self.lines)
        text.add("def step(S, I, L, T):")
        values = {value.name: value for value in self.function.params}
        fed = 0
        for name in section.takes:
            if name in self.slots:
                place = f"S[{self.slots[name]}]"
            else:
                place, fed = f"I[{fed}]", fed + 1
            text.add(f"    {self._name(values[name])} = {place}  # {name}")
        text.add("    I.clear()")  # so that a free ends an input's life
        for number, name in enumerate(section.received):
            text.add(f"    {self.names[name]} = L[{number}]")
        text.add("    L.clear()")
        if self.finite is not None:
            taken = ", ".join(self.names[name] for name in section.takes)
            text.add(f"    BEGIN({section is self.sections[0]}, {section.takes!r}, [{taken}])")
        known = {self.names[name] for name in (*section.takes, *section.received)}
        for index, op, line in self._lines(section, known):
            text.add(f"    {line}", op)
            if self.finite is not None and op.name != "free" and not op.attrs.get("inplace"):
                self._look(text, op)
            if traced and op.name != "free":
                handle = self._name(op.results[0]) if op.attrs.get("async") else "None"
                text.add(f"    T({index}, {handle})")
        self._returns(section, text)
        if not traced:
            section.source = text.text()
        return text.function(self.globals, "step")

    def _look(self, text: Text, op: Op) -> None:
        """Look for NaN and Inf in an action's results; those of a transfer come with its wait."""
        if op.attrs.get("async") or not op.results:
            return
        assert self.finite is not None
        kept = op.operands if op.name == "call" else ()  # others may have lost their memory
        operands = ", ".join(self._name(value) for value in kept)
        results = ", ".join(self._name(value) for value in op.results)
        text.add(f"    AFTER({self.finite.number(op)}, [{operands}], [{results}])", op)

    def _body(self, call: Op) -> tuple[Function, list[Callable[..., Any]]]:
        """The body of a kernel function, and what runs each of its ops."""
        function = self.module.function(str(call.attrs["callee"]))
        return function, [self._semantics(op) for op in function.ops]

    def _returns(self, section: Section, text: Text) -> None:
        """New values of the state, then `return results, handed`."""
        function, shared = self.function, self._shared_roots()
        returned = []
        for position in section.results:
            value = function.results[position]
            name, updates = self._name(value), function.result_attrs[position].get("updates")
            alone = not self.roots[value.name] & shared
            if updates is None:
                returned.append(name if alone else f"{name}.clone()")
            elif updates not in (value.name, self.storage.get(value.name)):
                keep = f"{name}.contiguous()" if alone else f"{name}.clone(memory_format=ROWS)"
                text.add(f"    S[{self.slots[str(updates)]}] = {keep}  # {updates}")
        handed = ", ".join(self.names[name] for name in section.handed)
        text.add(f"    return [{', '.join(returned)}], [{handed}]")

    def _shared_roots(self) -> set[str]:
        """Memory that belongs to the state, to constants, or to several results."""
        shared = {value.name for value in self.function.params} | set(self.constants)
        shared.update(self.storage)  # the results of updates in place
        seen: set[str] = set()
        for value in self.function.results:
            shared |= self.roots[value.name] & seen
            seen |= self.roots[value.name]
        return shared

    def _read(self) -> set[str]:
        """Values that an action reads, or that are returned and not a new state in place."""
        read = {v.name for op in self.function.ops if op.name != "free" for v in op.operands}
        for value, attrs in zip(self.function.results, self.function.result_attrs, strict=True):
            if attrs.get("updates", "") != self.storage.get(value.name):
                read.add(value.name)
        return read

    def _lines(self, section: Section, known: set[str]) -> Iterator[tuple[int, Op, str]]:
        """As `_statements`, with the segments that are compiled as one line each."""
        if self.compiler is None:
            yield from self._statements(section.actions, known)
            return
        if not section.pieces:
            results = (self.function.results[position].name for position in section.results)
            kept = {*results, *section.handed}
            section.pieces = self.compiler.pieces(section.actions, kept, self._numbers, self.roots)
        for piece in section.pieces:
            if not isinstance(piece, Segment):
                yield from self._statements(piece, known)
                continue
            index, op = piece.actions[-1]
            function = f"c{index}"
            self.globals[function] = piece.run
            left = ", ".join(self.names.setdefault(name, f"v{len(self.names)}")
                             for name in piece.gives)  # fmt: skip
            known.update(self.names[name] for name in piece.gives)
            operands = ", ".join(self.names[name] for name in piece.takes)
            yield index, op, f"{left}, = {function}({operands})"

    def _statements(
        self, actions: Sequence[tuple[int, Op]], known: set[str]
    ) -> Iterator[tuple[int, Op, str]]:
        """(position, action, Python line); `known` holds the Python names that exist."""
        read, position = self._read(), 0
        paired = {} if self.finite is not None else pairs(actions)
        done = set(paired.values())
        while position < len(actions):
            index, op = actions[position]
            position += 1
            if position - 1 in done:
                continue
            if position - 1 in paired:
                other = actions[paired[position - 1]][1]
                known.update(self._name(value) for value in (op.result, other.result))
                yield index, op, self._pair(index, op, other)
                continue
            if op.name == "free":
                names = [self._name(value) for value in op.operands]
                names = [name for name in names if name in known]
                known.difference_update(names)
                if names:
                    yield index, op, f"del {', '.join(names)}"
                continue
            if op.attrs.get("inplace"):
                group, frees = _together(actions, position - 1)
                position += len(group) + len(frees) - 1
                yield index, op, self._update(group)
                for update in group:
                    if self.finite is not None:
                        made = ", ".join(
                            self.names[self.storage[result.name]] for result in update.results
                        )
                        number = self.finite.number(update)
                        yield index, update, f"AFTER({number}, [], [{made}])"
                    for result in update.results:
                        if result.name in read:
                            old, new = self.storage[result.name], self._name(result)
                            known.add(new)
                            yield index, update, f"{new} = {self.names[old]}"
                yield from self._statements(frees, known)
                continue
            known.update(self._name(value) for value in op.results)
            yield index, op, self._statement(index, op)

    def _statement(self, index: int, op: Op) -> str:
        left = ", ".join(self._name(value) for value in op.results)
        names = [self._name(value) for value in op.operands]
        if op.name == "wait":
            return (f"{left} = " if left else "") + f"{names[0]}.wait()"
        if op.name == "call":
            function = self._kernel(str(op.attrs["callee"]))
            return f"{left}, = {function}({', '.join(names)})"
        function = f"f{index}"
        if function not in self.globals:
            last = index in self._last and op.operands[0].name not in self.constants
            self.globals[function] = self._semantics(op, last, self._reused.get(index))
        return (f"{left} = " if left else "") + f"{function}({', '.join(names)})"

    def _semantics(
        self, op: Op, last: bool = False, into: int | None = None
    ) -> Callable[..., Any]:
        """What runs an op on this rank's tensors; `last` as in `Comm.action`.

        `into` is the operand whose memory the result takes.
        """
        if op.name in COMMUNICATION:
            return self.comm.action(op, last)
        reused = None if into is None else into_operand(op, into)
        if reused is not None:
            return reused
        call = partial(OPS[op.name].ref, self._context(op))
        if op.name == "aten" and len(op.results) == 1:
            return partial(_only, call)
        return call

    def _pair(self, index: int, op: Op, other: Op) -> str:
        image, kernel = image_and_kernel(op, other)
        function = f"b{index}"
        self.globals[function] = both_gradients(op)
        operands = (op.operands[0], kernel.operands[1], image.operands[1])
        left = f"{self._name(image.result)}, {self._name(kernel.result)}"
        return f"{left} = {function}({', '.join(map(self._name, operands))})"

    def _update(self, group: Sequence[Op]) -> str:
        function = f"u{len(self.globals)}"
        update = make_update(group[0], self._context(group[0]))
        kernel = self.kernels.get(update_name(group[0]))
        self.globals[function] = by_kernel(kernel, update) if kernel is not None else update
        columns = []
        for place in range(len(group[0].operands) - 2):
            columns.append("[" + ", ".join(self._name(op.operands[place]) for op in group) + "]")
        columns += [self._name(value) for value in group[0].operands[-2:]]
        return f"{function}({', '.join(columns)})"

    def _kernel(self, callee: str) -> str:
        """The name of a kernel function: a compiled kernel, or Python of the function's body."""
        if callee in self.called:
            return self.called[callee]
        plain = "".join(c if c.isalnum() and c.isascii() else "_" for c in callee)
        name = self.called[callee] = f"k{len(self.called)}_{plain}"
        function = self.module.function(callee)
        compiled = self.kernels.get(str(function.attrs.get("kernel", "")))
        if compiled is not None:
            self.globals[name] = compiled
            return name
        text = Text(f"<weft rank {self.comm.rank} {callee} {next(_serial)}>", self.lines)
        space: dict[str, Any] = {}
        constants = {
            op.result.name
            for op in function.ops
            if _is_constant(op) and self._bytes(op.result) <= HOIST_BYTES
        }
        reused = reusable(function, tuple(constants))
        local = {value.name: f"a{i}" for i, value in enumerate(function.params)}
        text.add(f"def {name}({', '.join(local.values())}):")
        for i, (op, dropped) in enumerate(zip(function.ops, function.last_uses(), strict=True)):
            operands = ", ".join(local[value.name] for value in op.operands)
            for value in op.results:
                local[value.name] = f"v{len(local)}"
            left = ", ".join(local[value.name] for value in op.results)
            space[f"f{i}"] = self._semantics(op, into=reused.get(i))
            if len(op.results) == 1 and op.result.name in constants:
                space[local[op.result.name]] = space[f"f{i}"]()
            else:
                text.add(f"    {left} = f{i}({operands})", op)
            if gone := [local[name] for name in dropped if name not in constants]:
                text.add(f"    del {', '.join(gone)}")
        roots = alias_roots(function)
        shared = constants | {value.name for value in function.params}
        out = []
        for value in function.results:  # no result may share memory with anything
            out.append(local[value.name] + (".clone()" if roots[value.name] & shared else ""))
            shared |= roots[value.name]
        text.add(f"    return {', '.join(out)},")
        self.globals[name] = text.function(space, name)
        return name


def _is_constant(op: Op) -> bool:
    return op.name in OPS and OPS[op.name].family == "creation" and not op.operands


def _only(call: Callable[..., Any], *operands: Tensor) -> Tensor:
    """The result of a call that may return a tuple of one."""
    out = call(*operands)
    tensor: Tensor = out[0] if isinstance(out, (tuple, list)) else out
    return tensor


def _together(
    actions: Sequence[tuple[int, Op]], start: int
) -> tuple[list[Op], list[tuple[int, Op]]]:
    """The in-place updates from `start` on that can run as one, and the frees between them."""
    group, frees = [actions[start][1]], []
    key = update_key(group[0])
    made = {value.name for value in group[0].results}
    for index, op in actions[start + 1 :]:
        if op.name == "free":
            frees.append((index, op))
            continue
        if not op.attrs.get("inplace") or update_key(op) != key:
            break
        if any(value.name in made for value in op.operands):
            break
        group.append(op)
        made.update(value.name for value in op.results)
    return group, frees
