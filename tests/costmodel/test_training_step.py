"""Whole-step estimates: the identities of 1F1B, monotone in work, refusals."""

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.costmodel.datasheet import datasheets
from weft.costmodel.training_step import Fabric, training_step
from weft.costmodel.transformer import Experts, TrainingPlan, Transformer
from weft.ir.errors import CompileError

A100 = datasheets()["A100-SXM4-80GB"]
FABRIC = Fabric(300e9, 25e9)
GPT = Transformer(24, 2048, 16, 16, 128, 8192, 51200)
MOE = replace(GPT, gated=True, experts=Experts(64, 4, 1024, shared_ffn=1024, dense_layers=1))

plans = st.builds(
    lambda tp, pp, dp, batch, m, seq, recompute, parallel, precision: TrainingPlan(
        gpus=tp * pp * dp,
        seq=seq,
        micro_batch=batch,
        global_batch=batch * m * dp,
        tp=tp,
        pp=pp,
        recompute=recompute,
        sequence_parallel=parallel,
        precision=precision,
    ),
    *[st.sampled_from([1, 2, 4, 8])] * 5,
    st.sampled_from([512, 2048, 8192]),
    st.sampled_from(["none", "selective", "full"]),
    st.booleans(),
    st.sampled_from(["bf16", "f16", "f8", "f4"]),
)
models = st.sampled_from([GPT, MOE])
software = st.sampled_from(["megatron", "llm-foundry", "megatron-bridge"])


@settings(max_examples=300, deadline=None)
@given(models, plans, software, st.sampled_from(sorted(datasheets())))
def test_estimates_are_finite_positive_and_the_sum_of_their_parts(model, plan, software, device):
    step = training_step(model, plan, datasheets()[device], FABRIC, software)
    parts = (step.pipeline_ms, step.bubble_ms, step.gradients_ms, step.optimizer_ms, step.fixed_ms)
    assert math.isfinite(step.time_ms) and step.time_ms > 0
    assert all(part >= 0 for part in parts)
    assert step.time_ms == pytest.approx(sum(parts))


@settings(max_examples=300, deadline=None)
@given(models, plans, software)
def test_more_work_never_takes_less_time(model, plan, software):
    def time(model, plan):
        return training_step(model, plan, A100, FABRIC, software).time_ms

    base = time(model, plan)
    assert time(model, replace(plan, global_batch=2 * plan.global_batch)) >= base
    assert time(model, replace(plan, seq=2 * plan.seq)) >= base
    assert time(replace(model, layers=2 * model.layers), plan) >= base
    assert time(replace(model, hidden=2 * model.hidden), plan) >= base
    assert time(replace(model, vocab=2 * model.vocab), plan) >= base
    assert time(model, replace(plan, recompute="full")) >= base


@given(st.sampled_from([2, 4, 8]), st.sampled_from([1, 2, 8, 64]))
def test_the_bubble_of_equal_stages_is_that_of_1f1b(stages, micro_batches):
    headless = replace(GPT, vocab=1)
    plan = TrainingPlan(stages, 1024, 4, 4 * micro_batches, pp=stages)
    step = training_step(headless, plan, A100, FABRIC, "megatron")
    fraction = (stages - 1) / (micro_batches + stages - 1)
    assert step.bubble_ms / (step.bubble_ms + step.pipeline_ms) == pytest.approx(fraction, rel=0.02)


def test_virtual_stages_divide_the_bubble():
    plan = TrainingPlan(8, 1024, 1, 64, pp=8)
    bubbles = [
        training_step(GPT, replace(plan, vp=vp), A100, FABRIC).bubble_ms * vp for vp in (2, 4)
    ]
    assert bubbles[0] == pytest.approx(bubbles[1])


def test_slower_fabric_costs_where_it_is_used():
    # one member of a gradient group per host: its own card alone carries the exchange
    plan = TrainingPlan(16, 2048, 4, 64, tp=8)
    fast = training_step(GPT, plan, A100, FABRIC)
    slow_hosts = training_step(GPT, plan, A100, Fabric(300e9, 5e9))
    slow_links = training_step(GPT, plan, A100, Fabric(60e9, 25e9))
    assert slow_hosts.gradients_ms == pytest.approx(5 * fast.gradients_ms)
    assert slow_hosts.pipeline_ms == pytest.approx(fast.pipeline_ms)
    assert slow_links.pipeline_ms > fast.pipeline_ms
    assert slow_links.gradients_ms == pytest.approx(fast.gradients_ms)


def test_sharded_parameters_replace_the_exchange_of_gradients():
    plan = TrainingPlan(64, 2048, 4, 256)
    replicated = training_step(GPT, plan, A100, FABRIC, "llm-foundry")
    sharded = training_step(GPT, replace(plan, fsdp=True), A100, FABRIC, "llm-foundry")
    assert replicated.gradients_ms > 0 and sharded.gradients_ms == 0
    assert sharded.pipeline_ms > replicated.pipeline_ms


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tp": 3}, "do not divide"),
        ({"micro_batch": 0}, "micro_batch is 0"),
        ({"recompute": "some"}, "recompute"),
    ],
)
def test_plans_that_do_not_divide_are_refused(change, words):
    with pytest.raises(CompileError, match=words) as caught:
        TrainingPlan(**{"gpus": 8, "seq": 128, "micro_batch": 1, "global_batch": 8, **change})
    assert caught.value.code == "W0402" and caught.value.hint


def test_an_unknown_framework_is_refused_with_the_known_ones():
    with pytest.raises(CompileError, match="no measured profile") as caught:
        training_step(GPT, TrainingPlan(8, 128, 1, 8), A100, FABRIC, "handmade")
    assert "megatron" in caught.value.hint
