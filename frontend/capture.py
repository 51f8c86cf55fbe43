"""torch.export with everything weft asks of it: an ATen graph, or an error in the user's terms."""

from __future__ import annotations

import gc
import logging
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)
from torch.export import Dim, ExportedProgram, default_decompositions, export
from torch.export.graph_signature import ExportGraphSignature
from torch.fx import Graph, GraphModule, Interpreter, _lazy_graph_module
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.fx.proxy import TracerBase
from torch.overrides import TorchFunctionMode

from ..ir.errors import CompileError
from ..ir.verify import user_span as place
from . import (
    aten_contract,
    aten_create,
    aten_index,
    aten_loss,
    aten_move,
    aten_norm,
    aten_pointwise,
    aten_pool,
    aten_reduce,
)
from .aten import TABLE
from .locate import user_frames, user_span, user_traceback
from .repeats import Repeats
from .repeats_graph import Unfaithful, write_repeats
from .stops import mark_stops
from .tied import untie

#: importing them fills TABLE
_ENTRIES = (
    aten_contract, aten_create, aten_index, aten_loss, aten_move, aten_norm, aten_pointwise,
    aten_pool, aten_reduce,
)  # fmt: skip

_DATA_DEPENDENT = (
    GuardOnDataDependentSymNode, DataDependentOutputException, DynamicOutputShapeException,
)  # fmt: skip
_TRACING = (UnsupportedFakeTensorException, UnsupportedOperatorException)
#: `torch.nn.RNNBase` has its parameters in a list too; an attribute of the user's is warned of
_RECURRENT_WEIGHTS = r"The tensor attributes? (self\.[\w.]*_flat_weights\[\d+\](, )?)+ w"


@lru_cache(maxsize=1)
def decompositions() -> Mapping[Any, Callable[..., Any]]:
    """What torch decomposes: its default table, less the operators that weft has entries for."""
    table: Any = default_decompositions().items()  # type: ignore[no-untyped-call]
    return {op: rule for op, rule in table if str(op) not in TABLE}


#: private to torch; without it, tracing takes a little longer
_lazily: Any = getattr(_lazy_graph_module, "_use_lazy_graph_module", None)
#: traces until repeated modules of all classes that cannot be repeated are known
_ATTEMPTS = 3
#: for each input tensor, the dims whose size may vary, with least and largest size (None: any)
VaryingDims = Sequence[Mapping[int, tuple[int, int | None]]]


@dataclass(frozen=True)
class AtenProgram:
    """What capturing leaves of `torch.export.ExportedProgram`; the fields are its own."""

    graph: Graph
    graph_signature: ExportGraphSignature
    state_dict: Mapping[str, Any]
    constants: Mapping[str, Any]


def capture(
    root: torch.nn.Module, tensors: Sequence[Tensor], varying: VaryingDims = ()
) -> AtenProgram:
    """The ATen graph of `root(*tensors)`: functional, with the operators that weft knows whole.

    Values under no_grad and behind detach carry `weft::stop_gradient`. Needs no data: meta
    tensors will do. A dim of `varying` is a symbol in the graph, unless the program fixes it.

    Raises CompileError W0301, W0302; an exception of the user's program passes through.
    """
    if any(varying):
        return _captured(root, tensors, varying)
    apart: set[type] = set()
    for _ in range(_ATTEMPTS):
        repeats = Repeats(root, frozenset(apart))
        try:
            return _captured(root, tensors, varying, repeats)
        except Unfaithful as found:
            apart |= found.kinds
        except Exception:
            if not repeats.agains:
                raise
            break  # whatever it is, it is to be told of the program as it is
        finally:
            repeats.forget()
    return _captured(root, tensors, varying)


def _captured(
    root: torch.nn.Module, tensors: Sequence[Tensor], varying: VaryingDims,
    repeats: Repeats | None = None,
) -> AtenProgram:  # fmt: skip
    with _lean():
        return _exported(root, tensors, varying, repeats)


def _exported(
    root: torch.nn.Module, tensors: Sequence[Tensor], varying: VaryingDims,
    repeats: Repeats | None,
) -> AtenProgram:  # fmt: skip
    dims = (tuple(_hints(row) for row in varying),) if any(varying) else None
    with diagnosed(), _places(), nullcontext() if repeats is None else _while_running(root, repeats):
        program: ExportedProgram = export(root, tuple(tensors), dynamic_shapes=dims, strict=False)
    if repeats is not None and repeats.unfaithful:
        raise Unfaithful(repeats.unfaithful)
    with diagnosed():
        untie(program)
        mark_stops(program.graph_module)
        _run_by_node(program.graph_module)
        decomposed: ExportedProgram = program.run_decompositions(dict(decompositions()))
    if repeats is not None:
        write_repeats(decomposed.graph, repeats)
    return AtenProgram(
        decomposed.graph, decomposed.graph_signature, decomposed.state_dict, decomposed.constants
    )


@contextmanager
def _lean() -> Iterator[None]:
    """Without what takes a third of the time of a long trace: collecting garbage, of which tracing
    makes little, and writing Python for graphs that are not run."""
    collects = gc.isenabled()
    gc.disable()
    try:
        with nullcontext() if _lazily is None else _lazily(True):
            yield
    finally:
        if collects:
            gc.enable()


@contextmanager
def _while_running(root: torch.nn.Module, repeats: Repeats) -> Iterator[None]:
    """Find repeated modules while the root runs, inside of what torch puts around modules."""
    forward = root.forward

    def run(*tensors: Tensor) -> Any:
        with repeats.recording():
            return forward(*tensors)

    root.forward = run
    try:
        yield
    finally:
        del root.forward


def _hints(row: Mapping[int, tuple[int, int | None]]) -> dict[int, Any]:
    """Dims as torch.export takes them: what the program fixes becomes a number, not an error."""
    return {dim: Dim.AUTO(min=low or None, max=high) for dim, (low, high) in row.items()}


@contextmanager
def _places() -> Iterator[None]:
    """Let torch record where in the user's program an op stands: it keeps frames of functions
    called `forward` only, which leaves out train steps and helpers."""
    original = getattr(TracerBase, "_filter_traceback_frames", None)
    if original is None:  # private to torch; without it, places are coarser
        yield
        return
    TracerBase._filter_traceback_frames = lambda self, stack: user_frames(stack)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        TracerBase._filter_traceback_frames = original  # type: ignore[method-assign]


class RefuseReads(TorchFunctionMode):
    """Refuses `.item()` and the like: what Python does with the number would silently not happen
    when the plan runs."""

    _READS = frozenset({
        torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.__float__, torch.Tensor.__int__,
        torch.Tensor.numpy,
    })  # fmt: skip

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Call `func`, unless it takes numbers out of a tensor that is not a constant."""
        if func is torch.Tensor.numpy:
            raise _read()
        result = func(*args, **(kwargs or {}))
        if func in self._READS and _is_symbol(result):
            raise _read()
        return result


def _is_symbol(value: Any) -> bool:
    if isinstance(value, list):
        return any(map(_is_symbol, value))
    return isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool))


def _read() -> CompileError:
    frames = user_frames(traceback.extract_stack())
    frame = frames[-1] if frames else None
    return CompileError(
        "W0301", "the program takes a number out of a tensor (.item(), float(), .numpy())",
        span=None if frame is None else place(frame.filename, frame.lineno or 0),
        reason="a plan runs without Python, which would not see the number",
        hint="return the tensor, and call .item() on the compiled program's result",
    )  # fmt: skip


def _run_by_node(module: GraphModule) -> None:
    """Let the bodies of regions (autocast, no_grad) run node by node while they are decomposed:
    run as a whole, their ops would have the place of the region, not their own."""
    for inner in module.modules():
        if isinstance(inner, GraphModule) and inner is not module:
            inner.forward = Interpreter(inner).run


class diagnosed:
    """Turn failures of tracing into diagnostics, and shorten tracebacks of the user's own.

    A class, since a generator's context manager would put the long traceback back.
    """

    def __enter__(self) -> None:
        self._quiet = _quiet()
        self._quiet.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:  # fmt: skip
        self._quiet.__exit__(None, None, None)
        if isinstance(error, CompileError) or not isinstance(error, Exception):
            return
        if isinstance(error, _DATA_DEPENDENT):
            raise _data_dependent(error) from None
        kept = user_traceback(tb)
        if isinstance(error, _TRACING) or kept is None or _is_torch_bug(error):
            raise _untraceable(error) from error
        # the user's own exception, without the frames of torch and weft in between
        error.__suppress_context__ = True
        raise error.with_traceback(kept)


def _is_torch_bug(error: Exception) -> bool:
    # by name: importing torch._dynamo takes longer than all of weft
    inside = ("torch._export", "torch._dynamo", "torch._functorch")
    return any(cls.__module__.startswith(inside) for cls in type(error).__mro__)


def first_line(error: BaseException) -> str:
    """The first line of a message; the name of the error where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _data_dependent(error: Exception) -> CompileError:
    return CompileError(
        "W0301",
        "the program's control flow depends on the values of a tensor",
        span=user_span(error.__traceback__),
        reason="weft plans one program for all batches, before it sees the data "
               f"({first_line(error)})",
        hint="use torch.where, a mask, or torch.cond in place of `if`, `.item()` and `while` "
             "on tensor values",
    )  # fmt: skip


def _untraceable(error: Exception) -> CompileError:
    return CompileError(
        "W0302", "the program cannot be traced", span=user_span(error.__traceback__),
        reason=f"{type(error).__name__}: {first_line(error)}",
        hint="move what torch.export does not support out of the compiled function",
    )  # fmt: skip


@contextmanager
def _quiet() -> Iterator[None]:
    """Torch logs failures of shape functions at length; the diagnostic says it once. It also warns
    of a deprecated class of its own when it copies the structure of inputs, and of the list in
    which its recurrent layers hold their parameters a second time when tracing replaces those."""
    names = ("torch._subclasses.fake_tensor", "torch.fx.experimental.symbolic_shapes")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)", FutureWarning)
            warnings.filterwarnings("ignore", _RECURRENT_WEIGHTS, UserWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
