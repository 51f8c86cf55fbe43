"""What experts do by hand comes out of the search: which collectives of how many bytes are there.

Nothing here fixes a placement. Programs and clusters have the proportions for which the form was
published; the assertions are on the lowered forward pass.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod

import pytest
import torch
from tests.passes.expert_programs import experts_step, in_bf16
from tests.passes.place_programs import llama_step
from tests.passes.search_models import stack

from weft.costmodel.cluster import meshes, parse_cluster
from weft.ir.module import Function, Module, Op
from weft.ir.types import DTYPES, Placement, S, local_bytes
from weft.ir.verify import verify
from weft.passes.lower import lower
from weft.passes.place import search_mesh
from weft.passes.place_states import states_of
from weft.passes.search import search_plan

HOST = "1x8:h100"
RANKS = 8
_MOVES = ("all_reduce", "reduce_scatter", "all_gather", "all_to_all", "lse_combine")
#: shapes of the attention and feed-forward matrices of Llama-70B; few tokens meet large weights
WIDE = dict(layers=2, batch=1, seq=512, width=8192, heads=64, kv=8, ffn=28672, vocab=32000)
#: many tokens meet weights of medium size
TALL = dict(layers=2, batch=64, seq=2048, width=2048, heads=16, kv=16, ffn=8192, vocab=32000)
#: one long sequence with many heads, and a longer one with fewer heads than ranks
MANY_HEADS = dict(layers=1, batch=1, seq=32768, width=2048, heads=16, kv=16, ffn=8192, vocab=4096)
FEW_HEADS = dict(layers=1, batch=1, seq=262144, width=1024, heads=4, kv=4, ffn=4096, vocab=4096)
SMALL = dict(layers=2, batch=64, seq=2048, width=512, heads=8, kv=8, ffn=1536, vocab=1024)


@dataclass(frozen=True)
class Found:
    """A placed step of the search, as collectives.

    Attributes:
        spmd: the lowered module.
        forward: the functions that forward calls of the block became; one that layers share is there
            once.
    """

    spmd: Module

    @property
    def forward(self) -> list[Function]:
        return [f for f in self.spmd.functions[1:] if "backward" not in f.name]

    @property
    def backward(self) -> list[Function]:
        return [f for f in self.spmd.functions[1:] if "backward" in f.name]

    def bytes(self, op: Op) -> int:
        """What a rank holds of the operand of a collective."""
        assert self.spmd.mesh is not None
        return local_bytes(op.operands[0].type, self.spmd.mesh)

    def moves(self, function: Function) -> list[tuple[str, int]]:
        """Collectives of a function, with the bytes that a rank holds before them."""
        return [(op.name, self.bytes(op)) for op in function.ops if op.name in _MOVES]

    def stored(self) -> dict[str, tuple[tuple[int, ...], Placement]]:
        """Shape of each parameter, and how it is stored."""
        out = {}
        entry = self.spmd.entry
        for value, attrs in zip(entry.params, entry.param_attrs, strict=True):
            if attrs["role"] == "param":
                assert value.type.placement is not None
                out[str(attrs["name"])] = value.type.shape, value.type.placement[0]
        return out


def searched(module: Module) -> Found:
    cluster = parse_cluster(HOST)
    result = search_mesh(module, meshes(cluster)[0], cluster)
    assert result is not None and result.report[0].fits
    spmd = lower(result.placed.with_(attrs={"cluster": HOST}))
    verify(spmd)
    return Found(spmd)


@lru_cache(maxsize=None)
def llama(dtype: str, **shape: int) -> Found:
    """The searched plan of a Llama step on eight GPUs of one host."""
    step = llama_step(**shape)
    return searched(in_bf16(step) if dtype == "bf16" else step)


def splits(function: Function, name: str) -> list[str]:
    """How the ops of a name are split over the only axis, in order."""
    return [op.split.get("dev", "") for op in function.ops if op.name == name]


def test_megatron_two_all_reduces_in_the_forward_of_a_block() -> None:
    """Shoeybi et al., 2019: column then row split, twice; one all_reduce of the activations each."""
    found = llama("bf16", **WIDE)
    activations = WIDE["seq"] * WIDE["width"] * 2
    for block in found.forward:
        assert splits(block, "einsum") == ["n", "n", "n", "k", "n", "n", "k"]
        assert splits(block, "attention") == ["g"]
        assert found.moves(block) == [("all_reduce", activations)] * 2
    for shape, stored in (v for k, v in found.stored().items() if k.endswith(("wq", "wu", "wd", "wo"))):
        assert stored.kind == "S" and len(shape) == 2


def test_megatron_with_sequence_sharded_norms() -> None:
    """Korthikanti et al., 2022: each all_reduce as reduce_scatter and all_gather over the sequence,
    the norms between them on parts of it. Here the norms of float32 cost enough for that."""
    found = llama("f32", **WIDE)
    activations = WIDE["seq"] * WIDE["width"] * 4
    last = found.forward[-1]
    assert splits(last, "einsum") == ["n", "n", "n", "k", "n", "n", "k"]
    assert splits(last, "rms_norm") == ["a1", "a1"]
    pair = [("all_gather", activations // RANKS), ("reduce_scatter", activations)]
    assert found.moves(last) == pair * 2


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_vocabulary_parallel_loss(dtype: str) -> None:
    """The logits are split over the vocabulary and never moved; a number per token is."""
    found = llama(dtype, **WIDE)
    entry, tokens = found.spmd.entry, WIDE["batch"] * WIDE["seq"]
    assert splits(entry, "cross_entropy") == ["n"] and splits(entry, "cross_entropy_backward") == ["n"]
    assert found.stored()["head"] == ((WIDE["width"], WIDE["vocab"]), S(1))
    moved = [op for op in entry.ops if op.name in _MOVES]
    assert [found.bytes(op) for op in moved if op.name == "lse_combine"] == [tokens * 4]
    assert not [op for op in moved if WIDE["vocab"] in op.operands[0].type.shape]


def test_fsdp_where_the_batch_is_large() -> None:
    """Zhao et al., 2023: the batch is split, matrices are stored in parts, gathered whole for the
    block, and their gradients scattered; no activation moves within a block."""
    found = llama("bf16", **TALL)
    for block in found.forward:
        assert {*splits(block, "einsum"), *splits(block, "attention")} == {"b"}
        assert found.moves(block) == []
    matrices = {
        name: shape for name, (shape, stored) in found.stored().items()
        if name.startswith("layers") and len(shape) == 2 and stored.kind == "S"
    }  # fmt: skip
    assert len(matrices) == 7 * TALL["layers"]
    entry = found.spmd.entry
    names = {f"{name.replace('.', '_')}" for name in matrices}
    gathered = [op for op in entry.ops if op.name == "all_gather" and op.operands[0].name in names]
    assert sum(found.bytes(op) for op in gathered) * RANKS == 2 * sum(map(prod, matrices.values()))
    scattered = [op for op in every(found) if op.name == "reduce_scatter"]
    shapes = Counter(op.operands[0].type.shape for op in scattered)
    assert not Counter(matrices.values()) - shapes


def every(found: Found) -> list[Op]:
    """The ops of a step, those of functions as often as they are called."""
    runs = Counter(str(op.attrs["callee"]) for op in found.spmd.entry.ops if op.name == "call")
    inner = [op for f in found.spmd.functions[1:] for _ in range(runs[f.name]) for op in f.ops]
    return [*found.spmd.entry.ops, *inner]


def test_pure_data_parallelism_where_everything_fits() -> None:
    """Each gradient is reduced once and nothing moves within a block."""
    found = llama("f32", **SMALL)
    for function in found.spmd.functions[1:]:
        assert set(splits(function, "einsum")) == {"b"}
        assert found.moves(function) == []
    reduced = [op for op in found.spmd.entry.ops if op.name in ("all_reduce", "reduce_scatter")]
    weights = Counter(shape for shape, _ in found.stored().values())
    assert Counter(op.operands[0].type.shape for op in reduced) == weights + Counter([()])
    moved = {op.operands[0].type.shape for op in every(found) if op.name in _MOVES}
    assert moved <= {*weights, ()}


def test_ulysses_at_many_heads_and_moderate_length() -> None:
    """Jacobs et al., 2023: the sequence is split but within attention, where the heads are; four
    all_to_alls, of queries, keys, values and the result."""
    found = llama("bf16", **MANY_HEADS)
    (block,) = found.forward
    assert splits(block, "attention") == ["g"]
    assert set(splits(block, "einsum")) == {"s"} and splits(block, "rms_norm") == ["a1", "a1"]
    part = MANY_HEADS["seq"] * MANY_HEADS["width"] * 2 // RANKS
    assert found.moves(block) == [("all_to_all", part)] * 4


def test_context_parallelism_at_very_long_context() -> None:
    """More ranks than heads: queries stay, keys and values are gathered (Llama 3, 2024; what a ring
    passes on step by step, Liu et al., 2023, in one go)."""
    found = llama("bf16", **FEW_HEADS)
    (block,) = found.forward
    assert splits(block, "attention") == ["s"]
    assert set(splits(block, "einsum")) == {"s"} and splits(block, "rms_norm") == ["a1", "a1"]
    part = FEW_HEADS["seq"] * FEW_HEADS["width"] * 2 // RANKS
    assert found.moves(block) == [("all_gather", part)] * 2


@pytest.mark.parametrize("experts", [16, 64])
def test_expert_parallelism_for_many_experts(experts: int) -> None:
    """Lepikhin et al., 2021: tokens go to their experts by an all_to_all, and come back by one."""
    groups, capacity, width = 32, 2048 // experts, 1024
    found = searched(in_bf16(experts_step(
        groups=groups, seq=1024, experts=experts, capacity=capacity, width=width, hidden=4096
    )))  # fmt: skip
    entry, stored = found.spmd.entry, found.stored()
    assert stored["up"][1] == stored["down"][1] == S(0)
    exchanged = [op for op in entry.ops if op.name == "all_to_all"]
    ends = [(op.attrs["source"], op.attrs["target"]) for op in exchanged]
    assert ends == [(1, 0), (0, 1)] * 2  # forward, and the same backward
    part = experts * groups * capacity * width * DTYPES["bf16"] // RANKS
    assert [found.bytes(op) for op in exchanged] == [part] * 4
    others = [op for op in entry.ops if op.name in _MOVES and op.name != "all_to_all"]
    assert {op.operands[0].type.shape for op in others} == {(width, width), ()}


@pytest.mark.parametrize(("bytes_per_s", "stages"), [(1e9, 2), (None, 1)])
def test_a_pipeline_across_slow_links_and_none_across_fast_ones(
    bytes_per_s: float | None, stages: int
) -> None:
    """Narayanan et al., 2021: tensor or data parallelism inside a host, a pipeline between hosts."""
    cluster = parse_cluster("2x2:a100")
    if bytes_per_s is not None:
        inter = replace(cluster.inter, bytes_per_s=bytes_per_s, latency_s=5e-5)
        cluster = replace(cluster, inter=inter)
    blocks = stack(4, 1024, 64, torch.float32, "meta")[0]
    found = search_plan(blocks, cluster).best.pipeline.stages
    assert len(found) == stages
    assert {stage.mesh.size for stage in found} == {4 // stages}


def test_a_part_of_the_keys_of_causal_attention_is_no_faster_than_a_part_of_the_heads() -> None:
    """Of the first keys every later query sees all: that rank has most to do."""
    step = in_bf16(llama_step(**{**MANY_HEADS, "heads": 16}))
    cluster = parse_cluster(HOST)
    for name in ("attention", "attention_backward"):
        op = next(op for _, op in step.walk() if op.name == name)
        times = {s.states[0]: s.time_us for s in states_of(op, meshes(cluster)[0], cluster)}
        assert times["t"] > 1.2 * times["g"] and times["s"] > 1.2 * times["g"]
