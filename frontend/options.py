"""All options in one place; the environment is read once, here.

Precedence: a keyword of `weft.compile` or a flag of the command line, then the environment, then
the default.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from pathlib import Path

from ..ir.errors import CompileError

#: types in words, for messages
_WORDS: dict[type, str] = {
    str: "a text", bool: "True or False", os.PathLike: "a path", tuple: "a tuple", list: "a list",
}  # fmt: skip


def _cache_dir(environ: Mapping[str, str]) -> Path:
    if "WEFT_CACHE" in environ:
        return Path(environ["WEFT_CACHE"])
    base = environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "weft"


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def expect(value: object, kinds: type | tuple[type, ...], what: str) -> None:
    """Raise CompileError W1001 where a value of an argument is of another type."""
    if isinstance(value, kinds):
        return
    known = kinds if isinstance(kinds, tuple) else (kinds,)
    wanted = " or ".join(_WORDS.get(kind, kind.__name__) for kind in known)
    raise CompileError(
        "W1001", f"{what} must be {wanted}", reason=f"it is of type {type(value).__name__}",
        hint="docs/tutorial.md shows what each argument takes",
    )  # fmt: skip


@dataclass(frozen=True)
class Options:
    """Options of a compilation.

    Attributes:
        cluster: shorthand or TOML path; empty means the torchrun world, or this one device.
        pipeline: text of the pass pipeline; empty means the default.
        verify_each: check the module's rules after every pass.
        cache: folder for things that can be rebuilt.
        logs: names of what to log (`WEFT_LOGS=trace,place`); `nan` checks every action.
        progress: show progress on anything that takes over two seconds.
        full_tracebacks: show weft's own frames in tracebacks (`WEFT_TRACEBACKS=full`).
        cpu_backend: what runs the actions between transfers on a CPU: `eager`, one by one, or
            `inductor`, compiled (`WEFT_CPU_BACKEND`).
        stages: pipeline stages that the devices are dealt out to.
        micro: micro-batches that a batch is computed in.
        order: of the micro-batches on each stage: `1f1b`, `gpipe` or `interleaved`.
        chunks: parts of the program on each stage, for `interleaved`.
        meshes: the mesh of each stage, joined by `+`: `2x2+4`, or `dp=2,tp=2+tp=4`. Stages then have
            as many devices as their meshes, one behind the other.
        budget: time of a search for stages, micro-batches, order and meshes together, `10s` for
            example or `inf`; empty places the program on all devices without one.
        calibration: file of `weft calibrate` that plans are priced with (`WEFT_CALIBRATION`).
    """

    cluster: str = ""
    pipeline: str = ""
    verify_each: bool = True
    cache: Path = field(default_factory=lambda: _cache_dir(os.environ))
    logs: tuple[str, ...] = ()
    progress: bool = True
    full_tracebacks: bool = False
    cpu_backend: str = "eager"
    calibration: str = ""
    stages: int = 1
    micro: int = 1
    order: str = "1f1b"
    chunks: int = 1
    meshes: str = ""
    budget: str = ""

    def __post_init__(self) -> None:
        """Raises CompileError W1001 for a value of another type; texts are taken for `logs`, `cache`."""
        for name in ("cluster", "pipeline", "cpu_backend", "calibration", "order", "budget", "meshes"):
            expect(getattr(self, name), str, f"the option {name}")
        for name in ("verify_each", "progress", "full_tracebacks"):
            expect(getattr(self, name), bool, f"the option {name}")
        for name in ("stages", "micro", "chunks"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise CompileError(
                    "W1001", f"the option {name} must be a whole number from 1 on",
                    reason=f"it is {value!r}"[:80], hint=f"leave it out for {name}=1",
                )  # fmt: skip
        expect(self.cache, (str, os.PathLike), "the option cache")
        logs = _names(self.logs) if isinstance(self.logs, str) else self.logs
        expect(logs, (tuple, list), "the option logs")
        for log in logs:
            expect(log, str, "each of the option logs")
        object.__setattr__(self, "logs", tuple(logs))
        object.__setattr__(self, "cache", Path(self.cache))
        if self.cpu_backend != Options.cpu_backend:
            from ..runtime.inductor import check_backend  # torch takes a second to load

            check_backend(self.cpu_backend)

    @property
    def trace_nan(self) -> bool:
        """Are NaN and Inf to be traced to the action that made them (`WEFT_LOGS=nan`)?"""
        return any(name.lstrip("+") == "nan" for name in self.logs)

    @staticmethod
    def from_environment(environ: Mapping[str, str]) -> Options:
        """The defaults under an environment. Raises CompileError for a value that is no option."""
        return Options(
            cluster=environ.get("WEFT_CLUSTER", ""),
            verify_each=environ.get("WEFT_VERIFY", "1") != "0",
            cache=_cache_dir(environ),
            logs=_names(environ.get("WEFT_LOGS", "")),
            progress=environ.get("WEFT_PROGRESS", "1") != "0",
            full_tracebacks=environ.get("WEFT_TRACEBACKS", "") == "full",
            cpu_backend=environ.get("WEFT_CPU_BACKEND", "eager"),
            calibration=environ.get("WEFT_CALIBRATION", ""),
        )

    def with_(self, changes: Mapping[str, object]) -> Options:
        """These options with some replaced. Raises CompileError for an unknown name."""
        known = [f.name for f in fields(self)]
        for name in changes:
            if name not in known:
                near = get_close_matches(name, known, 1)
                raise CompileError(
                    "W1001",
                    f"unknown option {name!r}",
                    reason=f"the options are {', '.join(known)}",
                    hint=f"did you mean {near[0]!r}?" if near else "",
                )
        return replace(self, **changes)  # type: ignore[arg-type]


#: read once
OPTIONS = Options.from_environment(os.environ)
