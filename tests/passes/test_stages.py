"""Micro-batches and stages compute what the whole program computes."""

from __future__ import annotations

from random import Random

import pytest
import torch
from tests.passes.pipeline_models import STEPS, contrastive, logical, normalized
from tests.passes.pipeline_oracle import Pipeline

from weft.ir.errors import CompileError
from weft.ir.module import Module
from weft.passes.micro import LOOP, TimeSplit, time_split
from weft.passes.stages import cut
from weft.runtime.interpreter import evaluate


def random_stages(split: TimeSplit, stages: int, rng: Random) -> list[int]:
    """Convex stages: the forward ops that depend on a parameter, in a random order that the program
    allows, cut in pieces; the others follow."""
    entry = split.module.entry
    trained = {v.name for v, a in zip(entry.params, entry.param_attrs, strict=True) if a["role"] == "param"}
    for op in entry.ops:
        if any(value.name in trained for value in op.operands):
            trained.update(value.name for value in op.results)
    forward = [
        i for i, (op, phase) in enumerate(zip(entry.ops, split.phases, strict=True))
        if phase == "forward" and op.results[0].name in trained
        and split.time(op.results[0]).kind != "P"  # sums follow their terms
    ]  # fmt: skip
    makers = {value.name: i for i in forward for value in entry.ops[i].results}
    waits = {i: {makers[v.name] for v in entry.ops[i].operands if v.name in makers} for i in forward}
    order: list[int] = []
    while len(order) < len(forward):
        ready = [i for i in forward if i not in order and waits[i] <= set(order)]
        order.append(rng.choice(ready[:2]))
    cuts = sorted(rng.sample(range(1, len(order)), stages - 1))
    out = [-1] * len(entry.ops)
    for place, index in enumerate(order):
        out[index] = sum(place >= at for at in cuts)
    return out


def assert_equal(module: Module, split: TimeSplit, stage_of: list[int], tensors: list[torch.Tensor]) -> None:
    names = {str(a.get("name")): v.name for v, a in zip(
        module.entry.params, module.entry.param_attrs, strict=True)}  # fmt: skip
    given = dict(zip((v.name for v in module.entry.params), tensors, strict=True))
    for value, attrs in zip(split.module.entry.params, split.module.entry.param_attrs, strict=True):
        given[value.name] = given[names[str(attrs.get("name"))]]
    wanted = evaluate(module, tensors)
    results, updates = Pipeline(split, stage_of).run(given)
    for number, (attrs, tensor) in enumerate(zip(module.entry.result_attrs, wanted, strict=True)):
        got = updates[str(attrs["updates"])] if "updates" in attrs else results[str(number)]
        torch.testing.assert_close(got, tensor, rtol=1e-9, atol=1e-10)
    assert len(results) + len(updates) == len(wanted)


@pytest.mark.parametrize("name", sorted(STEPS))
@pytest.mark.parametrize("micro", [1, 2, 3])
def test_stages_of_micro_batches_train_as_the_whole(name: str, micro: int) -> None:
    rng = Random(f"{name} {micro}")
    module, tensors = logical(STEPS[name])
    split = time_split(module, micro)
    assert set(split.phases) & LOOP
    for stages in (1, 2, 4):
        assert_equal(module, split, random_stages(split, stages, rng), tensors)


def test_random_numbers_are_those_of_the_whole_batch() -> None:
    module, tensors = logical(STEPS["tied, clipped, dropout"])
    other = [t + 1 if a.get("role") == "seed" else t for t, a in zip(
        tensors, module.entry.param_attrs, strict=True)]  # fmt: skip
    assert not torch.equal(evaluate(module, tensors)[0], evaluate(module, other)[0])


def test_what_inputs_alone_decide_is_computed_once_for_the_whole_batch() -> None:
    module, _ = logical(STEPS["tied"])
    split = time_split(module, 2)
    before = [op.name for op, phase in zip(
        split.module.entry.ops, split.phases, strict=True) if phase == "before"]  # fmt: skip
    assert "reduce_sum" in before  # the number of labels that count
    names = [a.get("name") for a in split.module.entry.param_attrs if a.get("role") == "input"]
    assert len(names) == len(set(names)) + 1  # the labels as a whole, and in parts


def test_a_tied_parameter_is_sent_once_and_its_gradient_comes_back_once() -> None:
    module, _ = logical(STEPS["tied"])
    split = time_split(module, 2)
    calls = [i for i, (op, phase) in enumerate(zip(
        split.module.entry.ops, split.phases, strict=True)) if phase == "forward" and op.name == "call"]  # fmt: skip
    stage_of = [-1] * len(split.phases)
    for i, phase in enumerate(split.phases):
        if phase == "forward":
            stage_of[i] = int(i >= calls[1])
    first, second = cut(split, stage_of)
    assert [(t.value, t.phase) for t in second.receives if t.phase != "forward"] == [
        ("words.weight", "before")
    ]
    backward = [t for t in second.sends if t.phase == "backward"]
    late = [t for t in second.sends if t.phase == "update"]
    assert len(backward) == 1 and len(late) == 1
    value = next(v for v in second.module.entry.results if v.name == late[0].value)
    assert value.type.shape == (11, 6)
    owned = [v.name for v, a in zip(
        second.module.entry.params, second.module.entry.param_attrs, strict=True)
        if a["role"] == "param"]  # fmt: skip
    assert "words.weight" not in owned and "words.weight" in [v.name for v in first.module.entry.params]


@pytest.mark.parametrize(
    ("case", "micro", "message"),
    [
        (contrastive, 2, "cannot be computed in 2 micro-batches because of"),
        (normalized, 2, "because of channel_squares"),
        (STEPS["tied"], 6, "a batch of 5 cannot be cut into 6"),
        (STEPS["tied"], 0, "cannot be cut into 0"),
    ],
)
def test_what_needs_the_whole_batch_is_refused(case: object, micro: int, message: str) -> None:
    module, _ = logical(case)  # type: ignore[arg-type]
    with pytest.raises(CompileError, match=message) as caught:
        time_split(module, micro)
    assert caught.value.code == "W0404" and caught.value.reason
    if micro == 2:
        assert caught.value.span is not None and "pipeline_models" in caught.value.span.file


def test_stages_that_wait_for_each_other_are_refused() -> None:
    module, _ = logical(STEPS["skips"])
    split = time_split(module, 1)
    calls = [i for i, (op, phase) in enumerate(zip(
        split.module.entry.ops, split.phases, strict=True)) if phase == "forward" and op.name == "call"]  # fmt: skip
    stage_of = [0 if phase == "forward" else -1 for phase in split.phases]
    stage_of[calls[1]] = 1
    with pytest.raises(CompileError, match="not convex"):
        cut(split, stage_of)
    with pytest.raises(CompileError, match="nothing to compute"):
        cut(split, [3 if s == 1 else s for s in stage_of])
