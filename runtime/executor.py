"""One rank's execution of a schedule.

The schedule is compiled once to straight-line Python (`wrapper.py`). The rank's parameters, buffers
and optimizer states live here as local shards; inputs come as whole tensors and are cut here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from types import TracebackType

import torch
from torch import Tensor

from ..ir.errors import RunError
from ..ir.module import Function, Module, Op, Value
from ..ir.types import DTYPES, Mesh, local_shape
from .comm import COMMUNICATION, Comm
from .context import TORCH_DTYPES
from .inductor import Inductor, check_backend
from .lifetimes import PERSISTENT, alias_roots, last_readers
from .schedule_check import check
from .sections import Section
from .shards import local
from .trace import Trace
from .watch import first_line, together
from .wrapper import Kernel, Wrapper

#: What an action can raise on its own; programming errors of other kinds pass through unchanged.
ACTION_ERRORS = (
    RuntimeError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError,
    AssertionError, MemoryError, OSError,
)  # fmt: skip


class Executor:
    """Runs one rank's actions.

    Args:
        module: a schedule-level module; its static check is run first.
        rank: this rank; that of `comm` by default.
        comm: this rank's communication; made from torch.distributed by default.
        device: where this rank's tensors live.
        kernels: compiled kernels by name; kernel functions without one run their body.
        check_finite: trace NaN and Inf to the action that made them; slow.
        cpu_backend: `inductor` compiles the actions between transfers on a CPU (`inductor.py`),
            `eager` runs them one by one.
        stages: the schedules of all pipeline stages, where `module` is one of several.

    Attributes:
        state: the local shards of the entry parameters with the roles param, buffer and state, in
            their order. A step replaces them, or writes them in place.

    Raises RunError W0801 when the world does not fit the mesh, W0802 when the check fails, W0804
    when the module is not at the schedule level; CompileError W0902 when there is no C++ compiler
    for `inductor`, W1001 for another backend.
    """

    def __init__(
        self,
        module: Module,
        rank: int | None = None,
        *,
        comm: Comm | None = None,
        device: torch.device | str = "cpu",
        kernels: Mapping[str, Kernel] | None = None,
        check_finite: bool = False,
        cpu_backend: str = "eager",
        stages: Sequence[Module] = (),
    ) -> None:
        check_backend(cpu_backend)
        if module.level != "schedule":
            raise RunError(
                "W0804", f"a rank runs a schedule, this module is at the {module.level} level",
                hint="lower it first: weft opt FILE --pass lower --pass schedule",
            )  # fmt: skip
        self.module, self.function = module, module.entry
        self.mesh = module.mesh or Mesh()
        if len(stages) > 1:
            meshes = [stage.mesh or Mesh() for stage in stages]
            entries = [s.entry for s, m in zip(stages, meshes, strict=True) for _ in range(m.size)]
            check(dict(enumerate(entries)), meshes)
        else:
            check(module, self.mesh)
        self.comm = comm or Comm(self.mesh, rank)
        self.rank = self.comm.rank if rank is None else rank
        self.device = torch.device(device)
        compiler = None
        if cpu_backend == "inductor" and self.device.type == "cpu" and not check_finite:
            compiler = Inductor(module, self.mesh, self.comm.coord, self.device)
        self.wrapper = Wrapper(module, self.comm, self.device, kernels, check_finite, compiler)
        self.fed: list[Value] = []  # entry parameters that each step is given
        self.kept: list[Value] = []  # entry parameters that live here
        for value in self.function.params:
            lasts = self.wrapper.roles[value.name] in PERSISTENT
            (self.kept if lasts else self.fed).append(value)
        self.state = [self._empty(value) for value in self.kept]
        self._handed: list[Tensor] | None = None

    def _empty(self, value: Value) -> Tensor:
        shape = local_shape(value.type, self.mesh, self.comm.coord)
        return torch.zeros(shape, dtype=TORCH_DTYPES[value.type.dtype], device=self.device)

    @property
    def source(self) -> str:
        """The generated Python, for reading."""
        return "\n".join(section.source for section in self.wrapper.sections)

    def place(self, tensor: Tensor, value: Value) -> Tensor:
        """This rank's shard of a whole tensor, on this rank's device. May be a view."""
        shard = local(tensor, value.type, self.mesh, self.comm.coord)
        return shard.to(self.device, non_blocking=True)

    def run(self, inputs: Sequence[Tensor], *, trace: Trace | None = None) -> list[Tensor]:
        """One step: whole inputs in, whole results (all but the updates) out.

        Args:
            inputs: for each of `fed`, a whole tensor.
            trace: takes the times of all actions.

        Raises RunError W0803 when an action fails. The state is then undefined.
        """
        if len(self.wrapper.sections) != 1:
            raise RunError("W0804", "this plan has two halves", hint="call begin() and finish()")
        results, _ = self._run(self.wrapper.sections[0], inputs, [], trace, self.fed)
        return results

    def begin(self, inputs: Sequence[Tensor], *, trace: Trace | None = None) -> list[Tensor]:
        """The first half of a step with tangents, up to the outputs. As `run`."""
        fed = [v for v in self.fed if self.wrapper.roles[v.name] != "tangent"]
        results, self._handed = self._run(self.wrapper.sections[0], inputs, [], trace, fed)
        return results

    def hand_over(self) -> list[Tensor] | None:
        """What the last `begin` left for its second half, to be given back to `finish`: so other
        first halves may run in between."""
        handed, self._handed = self._handed, None
        return handed

    def finish(
        self,
        tangents: Sequence[Tensor],
        *,
        handed: list[Tensor] | None = None,
        trace: Trace | None = None,
    ) -> list[Tensor]:
        """The second half: gradients of the outputs in, gradients out. As `run`.

        Args:
            handed: what `hand_over` gave after the first half; by default that of the last one.

        Raises RunError W0804 when there was no `begin`.
        """
        if handed is not None:
            self._handed = handed
        if self._handed is None or len(self.wrapper.sections) != 2:
            raise RunError("W0804", "finish() without begin()")
        fed = [v for v in self.fed if self.wrapper.roles[v.name] == "tangent"]
        handed, self._handed = self._handed, None
        results, _ = self._run(self.wrapper.sections[1], tangents, handed, trace, fed)
        return results

    def _run(
        self,
        section: Section,
        inputs: Sequence[Tensor],
        handed: list[Tensor],
        trace: Trace | None,
        fed: Sequence[Value],
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Results, and values for the next section."""
        shards = [self.place(tensor, value) for tensor, value in zip(inputs, fed, strict=True)]
        with torch.no_grad():
            try:
                if trace is None:
                    assert section.run is not None
                    results, left = section.run(self.state, shards, handed, None)
                else:
                    traced = self.wrapper.traced(section)
                    cuda = self.device.type == "cuda"
                    with trace.step(self.function, self.comm, cuda) as clock:
                        results, left = traced(self.state, shards, handed, clock)
            except ACTION_ERRORS as error:
                raise self._failed(error) from error
            types = [self.function.results[position].type for position in section.returned]
            pairs = zip(results, types, strict=True)
            with together("gathers the results of its step"):
                return [self.comm.gather(tensor, type) for tensor, type in pairs], left

    def _failed(self, error: BaseException) -> RunError:
        """The diagnostic for an error that an action raised."""
        op = self._action(error.__traceback__)
        if op is None:
            return RunError("W0803", f"rank {self.rank} failed", reason=first_line(error))
        shown = self._transfer(op)
        what = f"{op.name} ({', '.join(map(str, op.results))})" if op.results else op.name
        if shown is not op:
            what = f"{what} for {shown.name} over {shown.attrs.get('axis', 'its peer')}"
        place = f" of {shown.loc}" if str(shown.loc) else ""
        reason, hint = first_line(error), ""
        if op.name in COMMUNICATION or op.name == "wait":
            culprits = self.comm.roll_call(f"{what}{place}: {reason}")
            reason = "; ".join([*culprits, reason])
            hint = "look at the output of the rank named first" if culprits else ""
        else:
            self.comm.report(f"in {what}{place}: {reason}")
        message = f"rank {self.rank} failed in {what}{place}"
        return RunError("W0803", message, reason=reason, hint=hint)

    def _transfer(self, op: Op) -> Op:
        """The action that started what a `wait` waits for; other actions are their own."""
        if op.name != "wait":
            return op
        handle = op.operands[0].name
        starts = (o for o in self.function.ops for v in o.results if v.name == handle)
        return next(starts, op)

    def _action(self, traceback: TracebackType | None) -> Op | None:
        """The innermost action on a traceback."""
        found = None
        while traceback is not None:
            key = (traceback.tb_frame.f_code.co_filename, traceback.tb_lineno)
            found = self.wrapper.lines.get(key, found)
            traceback = traceback.tb_next
        return found

    # -- memory -------------------------------------------------------------------------------

    def state_bytes(self) -> int:
        """Bytes of the parameters, buffers and optimizer states on this rank."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.state)

    def planned_bytes(self) -> int:
        """The largest number of live bytes during a step: state, inputs, constants and values."""
        fixed = sum(t.numel() * t.element_size() for t in self.wrapper.constants.values())
        return fixed + peak_bytes(
            self.function, self.mesh, self.comm.coord, frozenset(self.wrapper.constants)
        )


def peak_bytes(
    function: Function,
    mesh: Mesh,
    coord: tuple[int, ...],
    skip: frozenset[str] = frozenset(),
) -> int:
    """The largest number of bytes that a rank's live values take, as the frees say.

    Views take none; what they look at lives as long as they do. An in-place update takes none, nor
    does an all_reduce that is the last to read its operand, nor a send.
    `skip` names values that are counted elsewhere.
    """
    roots = alias_roots(function)
    sizes: dict[str, int] = {}
    holders: dict[str, set[str]] = {}
    live = peak = 0

    def bytes_of(value: Value) -> int:
        return prod(local_shape(value.type, mesh, coord)) * DTYPES[value.type.dtype]

    def hold(value: Value) -> None:
        nonlocal live
        for root in roots[value.name]:
            if root not in sizes:
                sizes[root] = bytes_of(value)
                live += sizes[root]
            holders.setdefault(root, set()).add(value.name)

    for param in function.params:
        hold(param)
    last = last_readers(function)
    sent: set[str] = set()  # a send gives its operand again, which lives until it is waited for
    for index, op in enumerate(function.ops):
        if op.name == "send" or (op.name == "wait" and op.operands[0].name in sent):
            sent.update(value.name for value in op.results)
            continue
        if op.name == "free":
            for value in op.operands:
                for root in roots[value.name]:
                    users = holders.get(root, set())
                    users.discard(value.name)
                    if not users:
                        live -= sizes.pop(root, 0)
            continue
        if op.name == "all_reduce" and index in last:
            (root,) = roots[op.operands[0].name]
            (new,) = roots[op.results[0].name]
            sizes[new], sizes[root] = sizes.get(root, 0), 0  # it takes its operand's memory
            holders[new] = {op.results[0].name}
        elif not op.attrs.get("inplace"):
            for value in op.results:
                if value.name not in skip:
                    hold(value)
        peak = max(peak, live)
    return max(peak, live)
