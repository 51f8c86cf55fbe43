"""Option sets of weft.compile, weft.plan, weft.load and the command line: wrong types, unknown names."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

import weft
from weft.frontend.options import OPTIONS

from .artifacts import invoke
from .values import mutate_text, odd

_NAMES = (
    "cluster", "mesh", "pipeline", "verify_each", "logs", "progress", "full_tracebacks", "cache",
    "optimizer", "options", "lr", "clustr", "trace", "dynamic_shapes", "cpu_backend", "",
)  # fmt: skip
_GOOD: dict[str, tuple[Any, ...]] = {
    "cluster": ("1x1:cpu", "1x2:cpu", "2x2:cpu", ""),
    "mesh": ("", "1", "2", "2x2", "dp=2", "dp=2,tp=2", "3x5", "0x0", "-1", "x=1e9", "1000000x1000000", "a=2,a=2"),
    "pipeline": ("", "simplify", "simplify,outline,lower", "place", "place[mesh=2]", "schedule", "lower,lower",
                 "simplify,outline,random-place[mesh=2 seed=1],lower,fuse,schedule", "place[limit-s=nan]",
                 "place[limit-s=-1 mesh=7]", "random-place[mesh=9999999]", "random-place[seed=-1]"),
    "logs": ((), ("place",), ("+trace", "-passes"), ("help",), ("nothing",), "place"),
    "optimizer": ("", "sgd", "adamw", "Adam", "rmsprop"),
    "lr": (0.1, -1.0, float("nan"), "fast"),
    "cpu_backend": ("eager", "fast", None),
}  # fmt: skip


def _double(x: Tensor) -> Tensor:
    return x * 2


def _value(random: Random, name: str) -> Any:
    if name in _GOOD and random.random() < 0.6:
        value = random.choice(_GOOD[name])
        return mutate_text(random, value) if isinstance(value, str) and random.random() < 0.2 else value
    return random.choice((True, False, odd(random), odd(random), Path("x"), torch.ones(2), object(), print))


def _options(random: Random, names: tuple[str, ...] = _NAMES) -> dict[str, Any]:
    return {name: _value(random, name) for name in random.sample(names, random.choice((1, 1, 2, 3)))}


def _plan(random: Random) -> None:
    model: Any = random.choice((nn.Linear(3, 3), _double, nn.Linear, None, 5, odd(random)))
    inputs: Any = random.choice(((torch.ones(2, 3),), {}, (), odd(random), torch.ones(2, 3), [torch.ones(2, 3)]))
    if isinstance(model, (nn.Module, type(_double))) and random.random() < 0.8:
        inputs = (torch.ones(2, 3),)
    options = _options(random)
    if isinstance(options.get("options"), bool):
        options["options"] = OPTIONS
    weft.plan(model, inputs, **options).summary()


def _compile(random: Random) -> None:
    target: Any = random.choice((nn.Linear(3, 3), _double, nn.Linear, 5, "x", odd(random)))
    compiled = weft.compile(target, **_options(random, tuple(n for n in _NAMES if n not in ("cluster", "mesh"))))
    if isinstance(target, nn.Module) or target is _double:
        with torch.no_grad():
            compiled(torch.ones(2, 3))


def _load(random: Random, bases: Path) -> None:
    path: Any = random.choice((str(bases / "forward"), odd(random), None, bases, "absent"))
    options = {name: odd(random) for name in random.sample(("timeout_s", "check_finite"), random.randrange(3))}
    with weft.load(path, **options) as exe:
        exe.load_weights()
        inputs = exe.example_inputs()
        match random.randrange(5):
            case 0:
                exe.step(*inputs, lr=odd(random), seed=odd(random))
            case 1:
                exe.step(*[odd(random) for _ in range(random.randrange(3))])
            case 2:
                exe.step(*(t.to(random.choice((torch.float64, torch.int64, torch.bool))) for t in inputs))
            case 3:
                exe.step(*(t[:, : random.randrange(3)] for t in inputs))
            case 4:
                exe.program.load_state({str(odd(random, 0)): odd(random)}, strict=random.random() < 0.5)


def _text(random: Random, good: tuple[str, ...]) -> str:
    value = random.choice(good) if random.random() < 0.6 else str(odd(random, 0))
    return value.replace("\0", "\x01")  # no command line can hold it


def _command(random: Random, folder: Path, bases: Path) -> list[str]:
    paths = (str(folder / "a"), str(bases / "forward"), "/dev/null/x", "/proc/x", str(bases), "")
    clusters = tuple(map(str, _GOOD["cluster"]))
    targets = ("tests.frontend.targets:net", "tests.frontend.targets:sgd_step", "tests:nothing", "os:getcwd",
               "tests.frontend.targets:branches", "weft:plan", ":", "a:b:c", "..:x")  # fmt: skip
    dump = str(bases / "train" / "ir" / "00-trace.weft")
    flags: dict[str, tuple[str, ...]]
    match random.randrange(5):
        case 0:
            head = ["compile", _text(random, targets)]
            flags = {"--cluster": clusters, "--train": ("adamw", "sgd", "", "x"), "-o": (str(folder / "a"), *paths[2:]),
                     "--mesh": tuple(map(str, _GOOD["mesh"]))}  # fmt: skip
        case 1:
            head = ["run", str(bases / random.choice(("train", "forward")))]
            if random.random() < 0.3:
                head[1] = _text(random, paths)
            flags = {"--steps": ("1", "0", "-5", "x", ""), "--lr": ("0.1", "nan", "-1", "x", "1e400"),
                     "--seed": ("0", "-1", "99999999999999999999999", "x"), "--trace": paths, "--save": paths[:1] + paths[2:],
                     "--save-every": ("1", "0", "-1", "x"), "--curve": paths[:1] + paths[2:]}  # fmt: skip
        case 2:
            head = ["inspect", _text(random, (str(bases / "train"), *paths))]
            flags = {"--ir": ("0", "place", "99", "schedule"), "--op": ("0", "1.weight", "", "*"),
                     "--limit": ("0", "-1", "5", "x", "10000000000")}  # fmt: skip
        case 3:
            head = ["verify", _text(random, (str(bases / "forward"), *paths))]
            flags = {"--seed": ("0", "-1", "10000000000000000000000000", "x")}
        case _:
            head = ["opt", _text(random, (dump, *paths))]
            flags = {"--pass": tuple(map(str, _GOOD["pipeline"])), "--pipeline": tuple(map(str, _GOOD["pipeline"])),
                     "--print-after": ("simplify", "x"), "-o": (str(folder / "o.weft"), *paths[2:])}  # fmt: skip
    out = list(head)
    for flag in random.sample(sorted(flags), random.randrange(len(flags) + 1)):
        out += [flag] if random.random() < 0.03 else [flag, _text(random, flags[flag])]
    if head[0] == "run":
        if "--steps" not in out:
            out += ["--steps", "1"]
        out += random.choice(([], [], ["--resume"], ["--async-save"]))
    return out


def run(random: Random, folder: Path, bases: Path) -> None:
    """Call something with an odd set of options."""
    match random.randrange(8):
        case 0 | 1:
            _plan(random)
        case 2:
            _compile(random)
        case 3 | 4:
            _load(random, bases)
        case _:
            invoke(_command(random, folder, bases))
