"""Op and collective times: positive, monotone, and split as the algebra says."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.costmodel.cluster import meshes, parse_cluster
from weft.costmodel.collectives import collective_cost, collective_time_us, spread_of
from weft.costmodel.estimate import op_time_us
from weft.ir.builder import Builder
from weft.ir.module import Op
from weft.ir.types import Mesh, TensorType

CLUSTER = parse_cluster("1x4:h100")
MESH = Mesh((("x", 2), ("y", 2)), "h100")


def matmul(m: int, k: int, n: int, dtype: str = "f32") -> Op:
    b = Builder()
    x, w = b.param(TensorType(dtype, (m, k))), b.param(TensorType(dtype, (k, n)))
    b.one("einsum", [x, w], {"spec": "m k, k n -> m n"})
    return b.ops[0]


def test_local_steps_are_cheap_and_cached_functions_are_shared() -> None:
    cost = collective_cost(CLUSTER, MESH)
    assert cost("shard", 1e9, 2, "x") == CLUSTER.device.launch_us
    assert cost("partial", 1e6, 2, "x") < cost("all_reduce", 1e6, 2, "x")
    assert collective_cost(CLUSTER, MESH) is cost


@settings(deadline=None)
@given(m=st.integers(1, 4096), k=st.integers(1, 4096), n=st.integers(1, 4096))
def test_op_times_never_fall_when_a_dim_doubles(m: int, k: int, n: int) -> None:
    time_us = op_time_us(matmul(m, k, n), ("", ""), MESH, CLUSTER)
    assert time_us >= CLUSTER.device.launch_us
    for wider in (matmul(2 * m, k, n), matmul(m, 2 * k, n), matmul(m, k, 2 * n)):
        assert op_time_us(wider, ("", ""), MESH, CLUSTER) >= time_us


def test_a_split_divides_the_work_and_an_unused_axis_repeats_it() -> None:
    op, launch = matmul(8192, 8192, 8192, "bf16"), CLUSTER.device.launch_us
    whole = op_time_us(op, ("", ""), MESH, CLUSTER) - launch
    at_peak_us = 2 * 8192**3 / 989e12 * 1e6
    assert at_peak_us < whole < 2 * at_peak_us
    for states, parts in ((("m", ""), 2), (("m", "n"), 4), (("k", "k"), 4), (("", "n"), 2)):
        part = op_time_us(op, states, MESH, CLUSTER) - launch
        assert at_peak_us / parts < part and part == pytest.approx(whole / parts, rel=0.4)


def test_a_cpu_has_the_rates_of_its_table() -> None:
    cluster, mesh = parse_cluster("1x1:cpu"), Mesh((), "cpu")
    took = op_time_us(matmul(1024, 1024, 1024), (), mesh, cluster) - cluster.device.launch_us
    assert took == pytest.approx(2 * 1024**3 / 1.4e11 * 1e6, rel=0.1)


def test_uneven_parts_cost_as_much_as_the_largest() -> None:
    uneven = op_time_us(matmul(5, 4096, 4096), ("m", ""), MESH, CLUSTER)
    assert uneven == op_time_us(matmul(6, 4096, 4096), ("m", ""), MESH, CLUSTER)


def test_low_precision_is_faster_and_memory_bound_ops_do_not_care_for_flops() -> None:
    fast, slow = (op_time_us(matmul(4096, 4096, 4096, d), ("", ""), MESH, CLUSTER)
                  for d in ("bf16", "f32"))  # fmt: skip
    assert fast < slow / 5
    b = Builder()
    x = b.param(TensorType("f32", (1 << 24,)))
    b.one("neg", [x])
    moved_us = 2 * 4 * (1 << 24) / 3.35e12 * 1e6
    assert moved_us < op_time_us(b.ops[0], ("", ""), MESH, CLUSTER) - 4.0 < 2.5 * moved_us


def test_a_split_of_an_lse_dim_pays_for_its_fix_up() -> None:
    b = Builder()
    q = b.param(TensorType("bf16", (2, 8, 2048, 64)))
    b.many("attention", [q, q, q], {"causal": True, "scale": 0.125})
    op = b.ops[0]
    split_t, split_s = (op_time_us(op, (s, ""), MESH, CLUSTER) for s in ("t", "s"))
    lse_bytes, spread = 2 * 8 * 2048 * 4, spread_of(CLUSTER, MESH, "x")
    assert split_t > split_s + collective_time_us("lse_combine", lse_bytes, spread, CLUSTER)


def test_calls_and_constants_are_free_and_unknown_ops_are_not() -> None:
    b = Builder()
    b.constant(1.0, TensorType("f32", (1 << 20,)))
    assert op_time_us(b.ops[0], ("", ""), MESH, CLUSTER) == 0
    x = b.param(TensorType("f32", (1 << 20,)))
    b.many("aten", [x], {"target": "aten.erfinv.default"}, types=[x.type])
    assert op_time_us(b.ops[1], ("", ""), MESH, CLUSTER) > CLUSTER.device.launch_us


@pytest.mark.parametrize("text", ["1x1:cpu", "2x2:cpu", "4x8:h100", "3x5:a100"])
def test_every_axis_of_every_mesh_has_a_price(text: str) -> None:
    cluster = parse_cluster(text)
    for mesh in meshes(cluster):
        cost = collective_cost(cluster, mesh)
        for axis, size in mesh.axes:
            assert cost("all_reduce", 1e6, size, axis) > 0
