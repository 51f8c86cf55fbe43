"""An artifact that is ready to run on this rank: `weft.load("out/")`.

Needs the folder, torch and this floor: the compiler is not loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from ..ir.errors import RunError
from .artifact import Artifact
from .checkpoint import Checkpoints
from .comm import TIMEOUT_S, Comm
from .kernel_manifest import kernel_folder
from .kernels import load_kernels
from .launch import init_from_env
from .program import Program
from .stage_map import ranks_of


class Executable:
    """A plan on this rank of the world that torchrun started, or alone.

    All ranks make the same calls in the same order. Use as a context manager, or call `close`.

    Attributes:
        artifact: the folder it came from.
        program: the plan on this rank.
        checkpoints: saves and loads its state.
        rank, world_size: this rank's place.

    Raises RunError W0801 when the world does not fit the plan.
    """

    def __init__(
        self, artifact: Artifact, *, timeout_s: float = TIMEOUT_S, check_finite: bool = False,
        cpu_backend: str = "eager",
    ) -> None:  # fmt: skip
        self.artifact = artifact
        modules = artifact.schedules()
        ranks = ranks_of(modules)
        kinds = {mesh.device for mesh in ranks.meshes}
        kind = "cpu" if "cpu" in kinds else ranks.meshes[0].device  # gloo where some stage has no GPU
        with ExitStack() as stack:
            world = stack.enter_context(init_from_env(kind, timeout_s=timeout_s))
            self.rank, self.world_size = world.rank, world.size
            if world.size != ranks.size:
                raise world_mismatch(artifact.path, ranks.size, world.size)
            comm = Comm(ranks.meshes, timeout_s=timeout_s)
            on_gpu = world.device.type == "cuda"
            folder = kernel_folder(artifact.path, len(modules), comm.stage)
            kernels = load_kernels(folder, world.device) if on_gpu else None
            self.program = Program(
                modules, comm, world.device, kernels=kernels, timeout_s=timeout_s,
                check_finite=check_finite, cpu_backend=cpu_backend,
            )  # fmt: skip
            self.checkpoints = stack.enter_context(Checkpoints(self.program))
            self._exit = stack.pop_all()

    def load_weights(self) -> None:
        """Load the weights stored in the artifact. Raises RunError W0701 when it has none."""
        weights = self.artifact.tensors("weights")
        if not weights:
            raise RunError(
                "W0701",
                f"{self.artifact.path} holds no weights",
                reason="the program was traced without data",
                hint="pass your own with exe.program.load_state(...)",
            )
        self.program.load_state(weights)

    def example_inputs(self) -> list[Tensor]:
        """The example inputs stored in the artifact, in the entry's order; [] without any."""
        stored = self.artifact.tensors("inputs")
        names = [name for name, _ in self.program.map.inputs]
        return [stored[name] for name in names] if set(names) <= set(stored) else []

    def step(
        self, *inputs: Tensor, lr: float | Sequence[float] | None = None, seed: int | None = None
    ) -> list[Tensor]:
        """One step on whole inputs; see `Program.step`. `lr` defaults to the example's."""
        rates = self.artifact.info["meta"].get("lr") if lr is None else lr
        return self.program.step(*inputs, lr=rates, seed=seed)

    def state_dict(self) -> dict[str, Tensor]:
        """All state by the user's names, whole; all ranks must call."""
        return self.program.state_dict()

    def save(
        self, path: str | Path, step: int, *, asynchronous: bool = False, keep: int = 2
    ) -> None:
        """Write a checkpoint into a folder; see `Checkpoints.save`. All ranks must call."""
        self.checkpoints.save(path, step, asynchronous=asynchronous, keep=keep)

    def load(self, path: str | Path, *, strict: bool = True) -> int:
        """Load the latest checkpoint of a folder; its step. See `Checkpoints.load`."""
        return self.checkpoints.load(path, strict=strict)

    def close(self) -> None:
        """Wait for the other ranks and leave the world."""
        self._exit.close()

    def __enter__(self) -> Executable:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> Any:
        return self._exit.__exit__(kind, value, traceback)


def world_mismatch(path: Path, needed: int, present: int) -> RunError:
    """The diagnostic W0801 for an artifact started on the wrong number of ranks."""
    return RunError(
        "W0801",
        f"{path} is a plan for {needed} ranks, but {present} were started",
        reason="the world size does not match the plan",
        hint=f"torchrun --nproc-per-node {needed} -m weft run {path}, or compile for --cluster "
        f"1x{present}:KIND",
    )


def load(
    path: str | Path, *, timeout_s: float = TIMEOUT_S, check_finite: bool = False,
    cpu_backend: str = "eager",
) -> Executable:  # fmt: skip
    """Open an artifact on this rank. Raises RunError W0701, W0702, W0801, CompileError W0902.

    Args:
        timeout_s: how long a collective may wait for the other ranks.
        check_finite: trace NaN and Inf to the action that made them; slow.
        cpu_backend: `inductor` compiles the actions between transfers on a CPU; `eager` does not.
    """
    artifact = Artifact.open(path)
    return Executable(
        artifact, timeout_s=timeout_s, check_finite=check_finite, cpu_backend=cpu_backend
    )


__all__ = ["Executable", "load", "world_mismatch"]
