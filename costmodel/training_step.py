"""Time of a whole training step of a transformer, composed from its kernels and collectives.

Per layer and micro-batch: matrix products in waves of tiles, attention, memory traffic of what lies
between them, collectives of tensor, context and expert parallelism, and the time that the host
needs to launch all that. Stages are composed by 1F1B (Megatron-LM, 2021): `m - 1` times the slowest
stage, plus one pass through all; `v` virtual stages shorten the fill by `v`. Exposed gradient
exchange and the optimizer follow.

What cannot be known from datasheets (efficiencies, what the training framework adds) is fitted by
`benchmarks/fit_steps.py` to published steps and read from `weights/training_step.json`. Which kernels
a library picks for a shape cannot be known either, and moves a layer by up to 20 %: where steps with
the same layer on the same ranks were measured (`layer_key`), their mean ratio to the model corrects it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from ..ir.errors import CompileError
from .datasheet import Datasheet
from .transformer import TrainingPlan, Transformer

#: fraction of the DRAM bandwidth that streaming kernels reach (BabelStream on A100 and H100)
_DRAM = 0.85
#: bytes of an operand's element per format; f4 with its block scales
_BYTES = {"f16": 2.0, "bf16": 2.0, "f8": 1.0, "f4": 0.5625}
#: least time of a kernel on the device in a stream of kernels
_KERNEL_MS = 0.002
#: (rows, columns, rate over the largest tile's) of the tiles that libraries choose from
_TILES = ((128, 256, 1.0), (128, 128, 0.9))
#: from this many waves on the last one is hidden by the others' uneven ends
_FEW_WAVES = 8

#: Megatron's fused softmax of scores takes batches of heads in multiples of this
_FUSED_SCORES = 4

Parameters = Mapping[str, float]


@dataclass(frozen=True)
class Fabric:
    """Bandwidths per device and direction, in bytes per second, by datasheet."""

    intra_bytes_per_s: float
    inter_bytes_per_s: float


@dataclass(frozen=True)
class StepEstimate:
    """Predicted time of a step in ms, and what it consists of.

    Attributes:
        time_ms: the step.
        pipeline_ms: compute and exposed communication of all micro-batches, bubble not counted.
        bubble_ms: fill and drain of the pipeline.
        gradients_ms: exposed exchange of gradients.
        optimizer_ms: the update.
        fixed_ms: what a step costs whatever its size.
    """

    time_ms: float
    pipeline_ms: float
    bubble_ms: float
    gradients_ms: float
    optimizer_ms: float
    fixed_ms: float


@cache
def parameters(software: str) -> Parameters:
    """Fitted parameters for a training framework; CompileError W1001 for one that is unknown."""
    fitted = json.loads((files(__package__) / "weights/training_step.json").read_text("utf-8"))
    known = fitted["software"]
    if software not in known:
        raise CompileError(
            "W1001",
            f"no measured profile of the training framework {software!r}",
            hint=f"one of {', '.join(sorted(known))}",
        )
    return {**fitted["shared"], **known[software]}


def training_step(
    model: Transformer,
    plan: TrainingPlan,
    device: Datasheet,
    fabric: Fabric,
    software: str = "megatron-bridge",
) -> StepEstimate:
    """Estimate a training step (forward, backward, update).

    Raises CompileError W1001 for an unknown framework, W0402 for a plan that does not divide.
    """
    return composed(model, plan, device, fabric, parameters(software))


def layer_key(model: Transformer, plan: TrainingPlan, device: Datasheet) -> str:
    """Names what one layer computes on a rank: plans with the same key run the same kernels.

    The name of a parameter: the factor by which measured layers are slower than the model says.
    """
    heads = f"{model.heads}/{model.kv_heads}x{model.head_dim}"
    sizes = f"h{model.hidden} {heads} ffn{model.ffn} seq{plan.seq} mb{plan.micro_batch}"
    ways = f"tp{plan.tp} cp{plan.cp} ep{plan.ep} {plan.precision} {plan.recompute}"
    experts = f" experts{model.experts.count}" if model.experts else ""
    return f"layer {device.name} {sizes} {ways}{experts}"


def composed(
    model: Transformer,
    plan: TrainingPlan,
    device: Datasheet,
    fabric: Fabric,
    fitted: Parameters,
) -> StepEstimate:
    """The estimate under given parameters: what the fit calls."""
    return _Step(model, plan, device, fabric, fitted).estimate()


class _Step:
    """One step's terms, in ms."""

    def __init__(
        self,
        model: Transformer,
        plan: TrainingPlan,
        device: Datasheet,
        fabric: Fabric,
        fitted: Parameters,
    ) -> None:
        self.model, self.plan, self.device, self.p = model, plan, device, fitted
        self.generation = int(device.cc) if 8 <= device.cc < 11 else (8 if device.cc < 8 else 10)
        self.dram = device.mem_gbs * 1e6 * _DRAM  # bytes per ms
        self.intra = fabric.intra_bytes_per_s / 1e3 * fitted["intra_efficiency"]
        self.inter = fabric.inter_bytes_per_s / 1e3 * fitted["inter_efficiency"]
        #: tokens of a micro-batch on one rank
        self.tokens = plan.micro_batch * plan.seq / plan.cp
        #: format of attention and of the head
        self.high = "f16" if plan.precision == "f16" else "bf16"

    def estimate(self) -> StepEstimate:
        """Compose stages, gradients and optimizer."""
        plan, m = self.plan, self.plan.micro_batches
        stage = self._stage()
        last = stage + self._head()
        work = m * last
        bubble = (plan.pp - 1) * stage / plan.vp
        gradients, optimizer = self._gradients(), self._optimizer()
        fixed = self.p["step"]
        total = work + bubble + gradients + optimizer + fixed
        return StepEstimate(total, work, bubble, gradients, optimizer, fixed)

    def _matmul(self, m: float, n: float, k: float, form: str, count: float = 1.0) -> float:
        """`count` products of [m, k] by [k, n]: waves of tiles, or the traffic."""
        d, slots = self.device, self.device.sms
        peak = d.peak_flops_per_s(form) / 1e3
        best = math.inf
        for rows, columns, rate in _TILES:
            waves = math.ceil(m / rows) * math.ceil(n / columns) * count / slots
            waves = math.ceil(waves) if waves < _FEW_WAVES else waves + 0.5
            best = min(best, waves * slots * 2 * rows * columns * k / (peak * rate))
        moved = count * (_BYTES[form] * (m * k + n * k) + 2 * m * n) / self.dram
        return max(best / self.p[f"matmul_{self.generation}_{form}"], moved) + _KERNEL_MS

    def _feed_forward(self) -> tuple[float, float]:
        """(dense block, experts' block), forward; 0 for the one that no layer has."""
        model, plan, p, form = self.model, self.plan, self.p, self.plan.precision
        h, t, tp = model.hidden, self.tokens, plan.tp
        moe = model.experts
        dense = 0.0
        if moe is None or moe.dense_layers:
            width = model.ffn * (2 if model.gated else 1)
            dense = self._matmul(t, width / tp, h, form) + self._matmul(t, h, model.ffn / tp, form)
            dense += 2.5 * 2 * t * width / tp / self.dram
        if moe is None:
            return dense, 0.0
        rows, local = t * moe.per_token, max(1.0, moe.count / plan.ep)
        products = self._matmul(rows / local, 2 * moe.ffn, h, form, local)
        products += self._matmul(rows / local, h, moe.ffn, form, local)
        block = products / p["grouped"] + rows * h * 2 * p["expert_passes"] / self.dram
        if moe.shared_ffn:
            block += self._matmul(t, 2 * moe.shared_ffn, h, form)
            block += self._matmul(t, h, moe.shared_ffn, form)
        return dense, block

    def _exchange(self) -> float:
        """Dispatch and combine of expert parallelism, one direction of the pass."""
        moe, plan = self.model.experts, self.plan
        if moe is None or plan.ep == 1:
            return 0.0
        rate = self.intra if plan.ep <= plan.gpus_per_node else self.inter
        sent = self.tokens * moe.per_token * self.model.hidden * 2 * (plan.ep - 1) / plan.ep
        return 2 * sent / rate * self.p["exchange_exposed"]

    def _attention(self) -> tuple[float, float]:
        """(forward, backward) of the scores and their product with the values."""
        model, plan, p = self.model, self.plan, self.p
        heads = model.heads / plan.tp
        peak = self.device.peak_flops_per_s(self.high) / 1e3 * p[f"attention_{self.generation}"]
        pairs = plan.micro_batch * heads * plan.seq * plan.seq / plan.cp
        flops = 4 * pairs * model.head_dim
        if p["score_passes"]:  # scores in memory, both triangles
            forward = flops / peak + pairs * 2 * p["score_passes"] / self.dram
            return forward, 2 * forward
        return flops / 2 / peak, 2.5 * flops / 2 / peak

    def _tensor_parallel(self) -> float:
        """The two reductions of a layer, one direction of the pass, in ms."""
        plan, p = self.plan, self.p
        if plan.tp == 1:
            return 0.0
        sent = self.tokens * self.model.hidden * 2
        inside = min(plan.tp, plan.gpus_per_node)
        hosts = plan.tp / inside
        time = p["reduce_ms"] + 2 * (inside - 1) / inside * sent / self.intra * p["reduce_exposed"]
        if hosts > 1:
            # each device exchanges its part with its peers on the other hosts
            time += 2 * (hosts - 1) / hosts * sent / inside / self.inter
        return 2 * time

    def _layer(self, feed_forward: float, experts: bool) -> float:
        """Forward and backward of a layer for one micro-batch."""
        model, plan, p = self.model, self.plan, self.p
        t, h, tp, form = self.tokens, model.hidden, plan.tp, plan.precision
        projections = model.head_dim * (model.heads + 2 * model.kv_heads)
        matmuls = self._matmul(t, projections / tp, h, form) + feed_forward
        matmuls += self._matmul(t, h, model.heads * model.head_dim / tp, form)
        passes = p["passes"] * (p["passes_experts"] if experts else 1.0)
        stream = t * h * 2 * passes / (tp if plan.sequence_parallel else 1) / self.dram
        communication = self._tensor_parallel() + (self._exchange() if experts else 0.0)
        scores, scores_backward = self._attention()
        forward = matmuls + scores + stream + communication
        backward = 2 * matmuls + scores_backward + 1.5 * stream + communication
        again = {"none": 0.0, "selective": scores, "full": forward}[plan.recompute]
        host = p["host_ms"] + (p["host_experts_ms"] if experts else 0.0)
        if p["score_passes"] and plan.micro_batch * model.heads % (_FUSED_SCORES * tp):
            host += p["host_unfused_ms"]
        host *= 1 + p["host_per_rank"] * (tp - 1) ** 2
        launches = host * p["host_backward"] * (2 if plan.recompute == "full" else 1)
        return _larger(forward, host) + _larger(backward + again, launches)

    def _stage(self) -> float:
        """One micro-batch through the layers of a stage, both directions."""
        model, plan = self.model, self.plan
        dense, experts = self._feed_forward()
        moe = model.experts
        below = 0 if moe is None else min(moe.dense_layers, model.layers)
        layer = self._layer(experts if moe else dense, moe is not None)
        if below:
            layer += (self._layer(dense, False) - layer) * below / model.layers
        if plan.fsdp:
            layer = self._gathered(layer)
        layer *= self.p.get(layer_key(model, plan, self.device), 1.0)
        time = layer * model.layers / plan.pp
        if plan.pp > 1:
            apart = plan.gpus // plan.pp >= plan.gpus_per_node
            # each tensor-parallel rank sends its part, the receivers gather inside the host
            # (Narayanan et al., 2021, section 4.1)
            sent = self.tokens * model.hidden * 2 / plan.tp
            exposed = self.p["transfer_exposed"] * (0.5 if plan.vp > 1 else 1.0)
            time += 2 * sent / (self.inter if apart else self.intra) * exposed
        return time

    def _gathered(self, layer: float) -> float:
        """Parameters gathered twice and gradients scattered once, beside the compute of a layer."""
        plan, model = self.plan, self.model
        moved = 3 * 2 * (model.attention_params + model.dense_ffn_params)
        rate = self.intra if plan.gpus <= plan.gpus_per_node else self.inter * plan.gpus_per_node
        return _larger(layer, moved / rate, 3.0)

    def _head(self) -> float:
        """Logits and loss of one micro-batch."""
        model, plan = self.model, self.plan
        columns = model.vocab / plan.tp
        loss = self.tokens * columns * self.p["loss_bytes"] / self.dram
        return 3 * self._matmul(self.tokens, columns, model.hidden, self.high) + loss

    def _local_params(self) -> tuple[float, float]:
        """(dense, experts') parameters that a rank holds, not counting a split over data."""
        model, plan = self.model, self.plan
        moe = model.experts
        per_layer = model.attention_params
        per_layer += 3 * model.hidden * moe.shared_ffn if moe else model.dense_ffn_params
        dense = (per_layer * model.layers / plan.pp + model.vocab * model.hidden) / plan.tp
        return dense, model.expert_params * model.layers / plan.pp / plan.ep

    def _gradients(self) -> float:
        """Exposed all-reduce of gradients over the data-parallel ranks."""
        plan = self.plan
        ranks = plan.dp * plan.cp
        if ranks == 1 or plan.fsdp:
            return 0.0
        together = plan.gpus <= plan.gpus_per_node or plan.tp * ranks <= plan.gpus_per_node
        sent = 2 * (ranks - 1) / ranks * self._local_params()[0] * 2
        # a group with several members on a host uses the network cards of all of them
        members = max(1, plan.gpus_per_node // plan.tp)
        rate = self.intra if together else min(self.intra, self.inter * members)
        return sent / rate * self.p["gradients_exposed"]

    def _optimizer(self) -> float:
        """Traffic of the update."""
        plan = self.plan
        dense, experts = self._local_params()
        if self.p["sharded_optimizer"]:
            dense /= plan.dp * plan.cp
            experts /= max(1.0, plan.dp * plan.cp / plan.ep)
        return (dense + experts) * self.p["optimizer_bytes"] / self.dram


def _larger(a: float, b: float, sharpness: float = 12.0) -> float:
    """A maximum with a rounded corner: work that overlaps well, not perfectly."""
    return float((a**sharpness + b**sharpness) ** (1 / sharpness))
