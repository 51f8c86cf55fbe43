"""What the simulator asks the cost model: local shapes, transfers as actions of their own, kernels."""

from __future__ import annotations

import pytest
from tests.runtime.random_schedules import MESHES
from tests.runtime.schedules import random_schedule

from weft.costmodel.cluster import parse_cluster
from weft.costmodel.estimate import op_time_us
from weft.costmodel.simulate_cost import ModelCosts, Scaled, Transfer
from weft.ir.module import Op
from weft.ir.opdef import OPS
from weft.ir.parser import parse_module
from weft.ir.types import Mesh


def test_the_largest_shard_costs_what_the_split_costs_but_for_its_collectives() -> None:
    compared, larger = 0, 0
    for seed in range(40):
        mesh = MESHES[seed % len(MESHES)]
        module = random_schedule(seed, mesh).schedule
        cluster = parse_cluster(f"1x{mesh.size}:h100")
        costs = ModelCosts(mesh, cluster, {f.name: f for f in module.functions[1:]})
        for op in (op for function in module.functions for op in function.ops):
            if OPS[op.name].signature is None or OPS[op.name].family == "creation":
                continue
            found = costs.action_us(op, (0,) * len(mesh.axes))
            split = op_time_us(op, [op.split.get(a, "") for a in mesh.names], mesh, cluster)
            if OPS[op.name].lse_results:  # its log-sum-exp over ranks is an action of its own
                assert found <= split * 1.5
                larger += found < split
            else:
                assert found == pytest.approx(split, rel=0.5), op  # a model sees rows and columns elsewhere
                compared += 1
    assert compared > 200 and larger > 0


UNEVEN = """weft 1 schedule
mesh [dp=2] "h100"

func @main(%x: f32[3000, 4096]{S(0)} {role = "input", name = "x"}, %w: f32[4096, 4096]{B} {role = "param", name = "w"}) -> (f32[3000, 4096]{S(0)} {role = "output"}) {
  %y = einsum(%x, %w) {spec = "b k, k n -> b n"} split [dp = b] : f32[3000, 4096]{S(0)}
  %z = call(%y) {callee = "chain"} : f32[3000, 4096]{S(0)}
  free(%y)
  return %z
}

func @chain(%y: f32[3000, 4096]{S(0)}) -> (f32[3000, 4096]{S(0)}) attrs {kernel = "chain"} {
  %a = gelu(%y) split [dp = a0] : f32[3000, 4096]{S(0)}
  %b = mul(%a, %y) split [dp = a0] : f32[3000, 4096]{S(0)}
  %z = exp(%b) split [dp = a0] : f32[3000, 4096]{S(0)}
  return %z
}
"""


def test_a_smaller_shard_is_not_priced_as_the_largest() -> None:
    module = parse_module(UNEVEN.replace("3000", "3"))
    costs = ModelCosts(module.mesh or Mesh(), parse_cluster("1x2:cpu"), {})
    einsum = module.entry.ops[0]
    assert costs.action_us(einsum, (0,)) > costs.action_us(einsum, (1,)) > 0  # 2 rows and 1


def test_a_kernel_streams_its_operands_and_results_once_where_there_is_a_kernel() -> None:
    module = parse_module(UNEVEN)
    functions = {f.name: f for f in module.functions[1:]}
    call, body = module.entry.ops[1], module.functions[1].ops

    def times(cluster: str) -> tuple[float, float, float]:
        costs = ModelCosts(module.mesh or Mesh(), parse_cluster(cluster), functions)
        parts = [costs.action_us(op, (0,)) for op in body]
        return costs.action_us(call, (0,)), max(parts), sum(parts)

    kernel, _, parts = times("1x2:h100")
    bytes_moved = 2 * 1500 * 4096 * 4
    assert bytes_moved / 3.35e12 * 1e6 < kernel < 0.6 * parts
    alone, _, parts = times("1x2:cpu")
    assert alone == pytest.approx(parts)


def test_scaled_costs_are_exact() -> None:
    mesh = Mesh((("dp", 4),))
    costs = ModelCosts(mesh, parse_cluster("2x2:h100"), {})
    near, far = Transfer("all_reduce", 1 << 20, 4, 4, "dp"), Transfer("all_reduce", 1 << 20, 4, 2, "dp")
    assert 0 < costs.transfer_us(near)[1] <= costs.transfer_us(near)[0] < costs.transfer_us(far)[0]
    for part, scaled in (("intra", near), ("inter", far)):
        faster = Scaled(costs, part, 4.0)
        for transfer in (near, far):
            factor = 4.0 if transfer is scaled else 1.0
            assert faster.transfer_us(transfer) == tuple(t / factor for t in costs.transfer_us(transfer))
    neg = Op("neg", (), ())
    assert Scaled(Constant(), "device", 4.0).action_us(neg, ()) == 2.0
    assert Scaled(Constant(), "inter", 4.0).action_us(neg, ()) == 8.0


class Constant:
    """8 us for everything."""

    def action_us(self, op: Op, coord: tuple[int, ...]) -> float:
        return 8.0

    def transfer_us(self, transfer: Transfer) -> tuple[float, float]:
        return 8.0, 8.0
