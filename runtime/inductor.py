"""Segments of a schedule compiled with torch's Inductor, for CPUs.

The reference semantics of a segment's ops are traced once, on fake tensors with this rank's local
shapes, and Inductor makes C++ of the result. Equal segments (the same ops on the same local types
and strides, as in repeated layers) are one function. What a compiled function returns has the
strides that the ops themselves would give it, and shares memory only where they would.

A segment that cannot be compiled runs its ops one by one, with a warning W0902; it is an error when
there is no C++ compiler at all.
"""

from __future__ import annotations

import logging
import operator
import time
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor

from ..ir.errors import CompileError
from ..ir.module import Function, Module, Op, Value
from ..ir.ops import OPS
from ..ir.types import Mesh, local_shape
from .context import TORCH_DTYPES, OpContext, results_of
from .pairs import both_gradients, image_and_kernel, pairs
from .segments import Action, Piece, Segment, segments

log = logging.getLogger("weft.inductor")

#: what tracing or Inductor can raise on an op that it does not take
_FAILURES = (
    RuntimeError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError,
    AssertionError, OSError, ImportError,
)  # fmt: skip
#: ops whose results are views or numbers: nothing to compile
_FREE = frozenset({"movement", "creation"})
#: an alignment check, a dispatch and a few allocations: about 30 us for each call of a compiled
#: function (measured), which one op alone does not win back
_WORTH_OPS = 2

Run = Callable[..., Sequence[Tensor]]
Meta = tuple[torch.dtype, tuple[int, ...], tuple[int, ...]]  # dtype, shape, strides


#: what runs the actions of a rank on a CPU
BACKENDS = ("eager", "inductor")


def check_backend(name: str) -> None:
    """Raises CompileError W1001 for a name that is no CPU backend."""
    if name not in BACKENDS:
        raise CompileError(
            "W1001", f"unknown cpu_backend {name!r}", reason=f"there are {' and '.join(BACKENDS)}"
        )


def require_compiler() -> None:
    """Raises CompileError W0902 where Inductor finds no C++ compiler."""
    from torch._inductor.cpp_builder import get_cpp_compiler  # Inductor takes a second to load
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, OSError) as error:
        raise CompileError(
            "W0902", "cpu_backend=\"inductor\" needs a C++ compiler, and there is none",
            reason=(str(error).strip() or type(error).__name__).splitlines()[0],
            hint='install g++, or set CXX to the path of one, or use cpu_backend="eager"',
        ) from None  # fmt: skip


class _Program(torch.nn.Module):
    """The ops of a segment as a function of tensors: what is traced."""

    def __init__(self, rows: Sequence[_Row], gives: Sequence[int]) -> None:
        super().__init__()
        self.rows, self.gives = rows, gives

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        slots = list(tensors)
        for run, places in self.rows:
            slots.extend(run(*(slots[place] for place in places)))
        return tuple(slots[place] for place in self.gives)


#: what runs an op, and the slots of its operands; its results take the next slots
_Row = tuple[Run, tuple[int, ...]]


class Inductor:
    """Compiles the segments of one rank.

    Args:
        module: the schedule.
        mesh, coord: where this rank is.
        device: where its tensors live.
    """

    def __init__(
        self, module: Module, mesh: Mesh, coord: tuple[int, ...], device: torch.device
    ) -> None:
        from torch._subclasses.fake_tensor import FakeTensorMode

        require_compiler()
        self.module, self.mesh, self.coord, self.device = module, mesh, coord, device
        self.mode = FakeTensorMode()
        self.fakes: dict[str, Tensor] = {}
        self.compiled: dict[object, Run | None] = {}
        self.seconds = 0.0

    def pieces(
        self,
        actions: Sequence[Action],
        kept: Collection[str],
        constants: Mapping[str, Op],
        roots: Mapping[str, frozenset[str]],
    ) -> list[Piece]:
        """The actions with compiled segments where that is worth it.

        Args:
            kept: values that are read after the actions.
            constants: values that a segment may make itself, and the ops without operands that do.
            roots: for each value, the values whose memory it may be.
        """
        found: list[Piece] = []
        for piece in segments(actions, kept):
            if isinstance(piece, Segment):
                if piece.gives and self.worth(piece):
                    piece.run = self.compile(piece, constants, roots)
                if piece.run is None:
                    piece = piece.actions
            if not isinstance(piece, Segment):
                for _, op in piece:
                    self.follow(op)
            if isinstance(piece, list) and found and isinstance(found[-1], list):
                found[-1].extend(piece)
            else:
                found.append(piece)
        log.info("%d segments compiled as %d functions in %.1f s", sum(
            isinstance(piece, Segment) for piece in found), len(self.compiled), self.seconds)
        return found

    # -- what values look like ------------------------------------------------------------------

    def fake(self, value: Value) -> Tensor:
        """A fake tensor with the local type of a value; contiguous unless a segment made it."""
        found = self.fakes.get(value.name)
        if found is None:
            shape = local_shape(value.type, self.mesh, self.coord)
            dtype = TORCH_DTYPES[value.type.dtype]
            with self.mode:
                found = torch.empty(shape, dtype=dtype, device=self.device)
            self.fakes[value.name] = found
        return found

    def follow(self, op: Op) -> None:
        """Note what the results of an action outside of all segments look like."""
        if op.name not in OPS or OPS[op.name].signature is None:
            return  # a transfer: it gives contiguous tensors, or they are made so
        try:
            with self.mode, torch.no_grad():
                made = self.run_op(op)(*map(self.fake, op.operands))
        except _FAILURES:
            return  # contiguous, or made so
        self.fakes.update((v.name, t) for v, t in zip(op.results, made, strict=True))

    # -- running ops ----------------------------------------------------------------------------

    def run_op(self, op: Op) -> Run:
        """What runs an op, or the body of a kernel function, on tensors that it does not write."""
        if op.name == "call":
            body = self.module.function(str(op.attrs["callee"]))
            return _Program(*self._rows(body.ops, [v.name for v in body.params], body))
        context = OpContext(op, self.mesh, self.coord, device=self.device, fused=True)
        semantics = OPS[op.name].ref
        return lambda *operands: results_of(op, semantics(context, *operands))

    def _rows(
        self, ops: Sequence[Op], params: Sequence[str], gives: Function | Sequence[str]
    ) -> tuple[list[_Row], list[int]]:
        slots = {name: place for place, name in enumerate(params)}
        rows: list[_Row] = []
        paired = pairs(list(enumerate(ops)))
        done = set(paired.values())
        for number, op in enumerate(ops):
            if number in done:
                continue
            operands, results, run = op.operands, op.results, None
            if number in paired:
                image, kernel = image_and_kernel(op, ops[paired[number]])
                operands = (op.operands[0], kernel.operands[1], image.operands[1])
                results, run = (image.result, kernel.result), both_gradients(op)
            places = tuple(slots[value.name] for value in operands)
            rows.append((run or self.run_op(op), places))
            for value in results:
                slots[value.name] = len(slots)
        names = [v.name for v in gives.results] if isinstance(gives, Function) else gives
        return rows, [slots[name] for name in names]

    # -- compiling ------------------------------------------------------------------------------

    def worth(self, segment: Segment) -> bool:
        """Does a segment have anything that a compiler could make faster?"""
        ops = [op for _, op in segment.actions]
        bodies = [self.module.function(str(op.attrs["callee"])).ops if op.name == "call" else (op,)
                  for op in ops]  # fmt: skip
        families = [OPS[op.name].family for body in bodies for op in body]
        return sum(family not in _FREE for family in families) >= _WORTH_OPS

    def compile(
        self, segment: Segment, constants: Mapping[str, Op], roots: Mapping[str, frozenset[str]]
    ) -> Run | None:
        """A function of the values that a segment takes; None where it cannot be compiled.

        Args:
            constants: ops without operands whose results the segment may make itself.
            roots: for each value, the values whose memory it may be.
        """
        values = {v.name: v for _, op in segment.actions for v in (*op.operands, *op.results)}
        own = [constants[name] for name in segment.takes if name in constants]
        segment.takes = [name for name in segment.takes if name not in constants]
        ops = [*own, *(op for _, op in segment.actions)]
        takes = [self.fake(values[name]) for name in segment.takes]
        metas = [_meta(tensor) for tensor in takes]
        key = _key(ops, segment, metas)
        start = time.perf_counter()
        program = _Program(*self._rows(ops, segment.takes, segment.gives))
        try:
            with self.mode, torch.no_grad():
                made = program(*takes)
            if key not in self.compiled:
                self.compiled[key] = _compile(program, takes)
        except _FAILURES as error:
            self.compiled[key] = None
            loc = next((str(op.loc) for op in ops if str(op.loc)), "")
            log.warning(
                "[W0902] %d actions%s run one by one: Inductor does not compile them: %s",
                len(segment.actions), f" from {loc}" if loc else "",
                (str(error).strip() or type(error).__name__).splitlines()[0],
            )  # fmt: skip
            return None
        finally:
            self.seconds += time.perf_counter() - start
        compiled = self.compiled[key]
        if compiled is None:
            return None
        self.fakes.update(zip(segment.gives, made, strict=True))
        shared = [[roots[a] & roots[b] for b in (*segment.takes, *segment.gives)]
                  for a in segment.gives]  # fmt: skip
        return _Guarded(compiled, metas, shared)


def _key(ops: Sequence[Op], segment: Segment, metas: Sequence[Meta]) -> object:
    """Segments with equal keys are the same function."""
    slots = {name: place for place, name in enumerate(segment.takes)}
    rows = []
    for op in ops:
        places = tuple(slots[value.name] for value in op.operands)
        for value in op.results:
            slots[value.name] = len(slots)
        types = tuple(value.type for value in (*op.operands, *op.results))
        rows.append((op.name, tuple(sorted(op.attrs.items())), tuple(sorted(op.split.items())),
                     places, types))  # fmt: skip
    return tuple(rows), tuple(slots[name] for name in segment.gives), tuple(metas)


def _meta(tensor: Tensor) -> Meta:
    return tensor.dtype, tuple(tensor.shape), tuple(tensor.stride())


def _compile(program: _Program, takes: Sequence[Tensor]) -> Run:
    """The program through Inductor."""
    from torch._functorch import config as functorch_config
    from torch._inductor.compile_fx import compile_fx

    graph = torch.fx.Graph()
    inputs = tuple(graph.placeholder(f"x{place}") for place in range(len(takes)))
    made = graph.call_module("program", inputs)
    graph.output(tuple(
        graph.call_function(operator.getitem, (made, place))
        for place in range(len(program.gives))
    ))  # fmt: skip
    module = torch.fx.GraphModule({"program": program}, graph)
    # its cache looks at the graph above, which does not say what the program does
    with functorch_config.patch(enable_autograd_cache=False), torch.no_grad():
        compiled = compile_fx(module, list(takes))
    assert callable(compiled)  # text only where it compiles ahead of time
    return compiled


class _Guarded:
    """A compiled function, on tensors of any strides, with results that share no more memory than
    those of the ops it stands for.

    Inductor may return one tensor for two results with equal elements. Which results share memory
    is the same in every call, so the first one tells which are to be copied.
    """

    def __init__(
        self, run: Run, metas: Sequence[Meta], shared: Sequence[Sequence[frozenset[str]]]
    ) -> None:
        self.run, self.shared = run, shared
        self.strides = [meta[2] for meta in metas]
        self.copied: list[int] | None = None

    def __call__(self, *operands: Tensor) -> Sequence[Tensor]:
        strides = [tensor.stride() for tensor in operands]
        if strides != self.strides:
            operands = tuple(map(_restrided, operands, self.strides))
        results = list(self.run(*operands))
        if self.copied is None:
            self.copied = self._too_close(operands, results)
        for place in self.copied:
            results[place] = results[place].clone()
        return results

    def _too_close(self, operands: Sequence[Tensor], results: Sequence[Tensor]) -> list[int]:
        """Results that share memory with an operand or an earlier result, and may not."""
        tensors = [*operands, *results]
        memory = [tensor.untyped_storage().data_ptr() for tensor in tensors]
        found = []
        for place in range(len(results)):
            number = len(operands) + place
            same = (other for other in range(number) if memory[other] == memory[number])
            if memory[number] and any(not self.shared[place][other] for other in same):
                found.append(place)
        return found


def _restrided(tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
    """The tensor, or a copy with other strides."""
    rows = zip(tensor.shape, tensor.stride(), strides, strict=True)
    if all(has == wanted or size <= 1 for size, has, wanted in rows):
        return tensor
    return torch.empty_strided(
        tensor.shape, strides, dtype=tensor.dtype, device=tensor.device
    ).copy_(tensor)


__all__ = ["BACKENDS", "Inductor", "check_backend", "require_compiler"]
