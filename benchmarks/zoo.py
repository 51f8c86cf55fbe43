"""Twenty architectures of transformers: are a traced train step and its plans equal to eager?

    python benchmarks/zoo.py [--quick] [--json FILE]

Each model is small (two blocks, width 32), in float32. Measured are the relative error of the
loss and of the outputs of the forward program, the error of the train step's gradients relative to
each gradient's largest element (at least 1e-3: smaller ones are rounding), the same error of all
results of two plans for 4 ranks (a random legal placement and the searched one) run by the multi-rank
interpreter in float64, the ops that fell back to ATen, and the seconds to trace and differentiate
the step. The errors' targets are the project's, 1e-5 and 1e-4.
"""

from __future__ import annotations

import copy
import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random

import torch
from rows import Row, arguments, finish, timed

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.frontend.stepping import RATE, Stepper, entry_values
from tests.frontend.zoo import ALL, SLOW, Example, build, tensors_of

from weft.frontend.pass_table import ALL_PASSES
from weft.frontend.structure import flatten
from weft.frontend.trace import trace_forward
from weft.frontend.train_step import TracedStep, loss_of, trace_module_train
from weft.frontend.verify import random_inputs, widen
from weft.ir.errors import CompileError
from weft.passes.apply import apply
from weft.passes.lower import lower
from weft.passes.manager import PassManager
from weft.passes.pipeline import parse_pipeline
from weft.passes.random_place import parse_mesh, random_choices
from weft.runtime.interpreter import evaluate

QUICK = ["llama", "bert", "resnet", "mixtral", "mamba"]
TARGETS = {"loss": 1e-5, "outputs": 1e-4, "gradients": 1e-4, "random plan": 1e-9,
           "searched plan": 1e-9}  # fmt: skip


@dataclass
class Found:
    """What was measured of one model: errors by name, fallbacks of its train step, seconds."""

    errors: dict[str, float]
    fallbacks: list[str]
    trace_s: float
    dtype: str = "f32"


def relative(mine: torch.Tensor, theirs: torch.Tensor, least: float = 1e-12) -> float:
    """The largest difference over the largest element; 0 for tensors without elements."""
    if not theirs.numel():
        return 0.0
    gap = (mine.double() - theirs.double()).abs().max().item()
    return gap / max(theirs.double().abs().max().item(), least)


def worst(mine: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> float:
    """The largest error of several tensors."""
    return max(relative(a, b, 1e-3) for a, b in zip(mine, theirs, strict=True) if b.numel())


#: makes a model and its inputs, the same each time
Make = Callable[[], Example]


def forward_error(make: Make) -> float:
    """The largest error of the forward program's floating-point outputs."""
    model, inputs = make()
    traced = trace_forward(model, (), inputs)
    tensors = list(tensors_of(inputs).values())
    results = evaluate(traced.module, entry_values(traced.module, dict(traced.tensors), tensors))
    attrs = traced.module.entry.result_attrs
    mine = [v for v, a in zip(results, attrs, strict=True) if a["role"] == "output"]
    theirs = flatten(copy.deepcopy(model)(**inputs))[0]
    return max(relative(a, b) for a, b in zip(mine, theirs, strict=True) if _counts(b))


def _counts(x: torch.Tensor) -> bool:
    return x.is_floating_point() and x.numel() > 0


def step_errors(make: Make, traced: TracedStep) -> dict[str, float]:
    """Errors of the loss and of the gradients of one train step."""
    model, inputs = make()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    stepper = Stepper(traced)
    loss = stepper(list(tensors_of(inputs).values()))
    expected = loss_of(model(**inputs))
    expected.backward()
    gradients = max(
        relative((before[n] - stepper.state[n]) / RATE, p.grad, 1e-3)
        for n, p in model.named_parameters() if p.grad is not None
    )  # fmt: skip
    return {"loss": relative(loss.detach(), expected.detach()), "gradients": gradients}


def plan_errors(make: Make, traced: TracedStep, number: int) -> dict[str, float]:
    """Errors of two plans for 4 ranks against the logical program, in float64."""
    _, inputs = make()
    given = {k: v.detach() for k, v in {**traced.tensors, **tensors_of(inputs)}.items()}
    module = widen(traced.module)
    values = random_inputs(module, given)
    wanted = evaluate(module, values)
    mesh = parse_mesh(("4", "2x2")[number % 2])
    random = lower(apply(module, mesh, random_choices(module, mesh, Random(number))))
    with tempfile.TemporaryDirectory() as folder:
        cluster = Path(folder, "slow.toml")
        cluster.write_text(SLOW)
        text = f"simplify,place[cluster={json.dumps(str(cluster))} mesh=4],lower"
        searched = PassManager(parse_pipeline(text, ALL_PASSES)).run(module)
    return {"random plan": worst(evaluate(random, values), wanted),
            "searched plan": worst(evaluate(searched, values), wanted)}  # fmt: skip


def measure(make: Make, number: int) -> Found:
    """All figures of one model; `number` picks its random placement."""
    model, inputs = make()
    seconds, traced = timed(
        lambda: trace_module_train(model, (), inputs, optimizer="sgd", lr=RATE)
    )
    targets = [str(op.attrs["target"]) for _, op in traced.module.walk() if op.name == "aten"]
    errors = {**step_errors(make, traced), "outputs": forward_error(make),
              **plan_errors(make, traced, number)}  # fmt: skip
    return Found(errors, targets, seconds)


def rows_of(name: str, found: Found | None) -> list[Row]:
    """Rows of a model; a model that is not compiled has one that fails."""
    if found is None:
        return [Row(f"{name}: models not compiled", 1, "", 0)]
    references = {"random plan": "logical program", "searched plan": "logical program"}
    rows = [
        Row(f"{name} {what} error", found.errors[what], "relative", target,
            references.get(what, "eager"))
        for what, target in TARGETS.items()
    ]  # fmt: skip
    fallbacks = " ".join(sorted(set(found.fallbacks)))
    rows.append(Row(f"{name} ATen fallbacks", len(found.fallbacks), "ops", 0, fallbacks))
    return [*rows, Row(f"{name} trace", found.trace_s, "s")]


def main() -> int:
    """Measure, print, write; 1 when a target is missed."""
    parser = arguments(__doc__, "five models")
    parser.add_argument("--only", help="one model, by name")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    rows: list[Row] = []
    print(f"{'model':9}" + "".join(f"{what:>14}" for what in TARGETS) + f"{'trace s':>9}  fallbacks")
    for number, name in enumerate(ALL):
        if options.only not in (None, name) or (options.quick and name not in QUICK):
            continue
        try:
            found = measure(partial(build, name), number)
        except CompileError as error:
            rows += rows_of(name, None)
            print(f"{name:9}  {error.code}: {error.message}", flush=True)
            continue
        rows += rows_of(name, found)
        figures = "".join(f"{found.errors[what]:14.1e}" for what in TARGETS)
        print(f"{name:9}{figures}{found.trace_s:9.1f}  "
              f"{len(found.fallbacks)} {' '.join(sorted(set(found.fallbacks)))}", flush=True)  # fmt: skip
    return finish(rows, options.json)


if __name__ == "__main__":
    sys.exit(main())
