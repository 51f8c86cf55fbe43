"""`weft.load`: an artifact that is ready to run, with what the environment says."""

from __future__ import annotations

from pathlib import Path

from ..runtime.comm import TIMEOUT_S
from ..runtime.executable import Executable
from ..runtime.executable import load as load_artifact
from .options import OPTIONS


def load(
    path: str | Path,
    *,
    timeout_s: float = TIMEOUT_S,
    check_finite: bool | None = None,
    cpu_backend: str | None = None,
) -> Executable:
    """Open an artifact on this rank. Raises RunError W0701, W0702, W0801, CompileError W0902.

    Args:
        timeout_s: how long a collective may wait for the other ranks.
        check_finite: trace NaN and Inf to the action that made them; slow. By default where
            `WEFT_LOGS` names `nan`.
        cpu_backend: `inductor` compiles the actions between transfers on a CPU, `eager` does not;
            by default what `WEFT_CPU_BACKEND` says.
    """
    if OPTIONS.logs:
        from .logs import configure  # knows all passes: a machine that only runs plans needs none

        configure(OPTIONS.logs)
    return load_artifact(
        path, timeout_s=timeout_s,
        check_finite=OPTIONS.trace_nan if check_finite is None else check_finite,
        cpu_backend=OPTIONS.cpu_backend if cpu_backend is None else cpu_backend,
    )  # fmt: skip


__all__ = ["load"]
