"""The placement search: equal to enumeration, equal to the price of what it writes down."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from tests.passes.equality import assert_close
from tests.passes.place_oracle import Exhaustive, TooLarge, random_program
from tests.passes.place_programs import Entry, f32, llama_step, mlp_step

from weft.costmodel.cluster import Cluster, meshes, parse_cluster
from weft.costmodel.collectives import collective_cost
from weft.ir.builder import Builder
from weft.ir.errors import CompileError
from weft.ir.module import Module, Value
from weft.ir.types import B, Mesh, S, TensorType
from weft.ir.verify import verify
from weft.passes.apply import Choices, FunctionChoices, apply
from weft.passes.joined import joins
from weft.passes.lower import lower
from weft.passes.place import Place, PlacementResult, search, search_mesh
from weft.passes.place_runs import executions
from weft.passes.place_states import State, states_of
from weft.passes.price import price
from weft.passes.reshard import Placements, StepCost, legal_placements, reshard_cost_us
from weft.runtime.interpreter import evaluate

CPU = parse_cluster("2x2:cpu")


class Enumeration:
    """The least time of a flat program or of a program with callees, by trying everything.

    Only parameters of the entry are not enumerated jointly: given all else, each has its own best
    placement.
    """

    def __init__(self, module: Module, mesh: Mesh, cluster: Cluster) -> None:
        self.module, self.mesh = module, mesh
        self.cost, self.joins = collective_cost(cluster, mesh), joins(module)
        self.runs = executions(module)
        self.whole = (B,) * len(mesh.axes)
        self.ops = [(f, i) for f in module.functions for i, op in enumerate(f.ops)
                    if op.name != "call"]  # fmt: skip
        self.states = [states_of(f.ops[i], mesh, cluster) for f, i in self.ops]
        self.ends = [
            (f.name, table, i, legal_placements(v.type, mesh, ("sum",)))
            for f in module.functions[1:]
            for table, values in (("params", f.params), ("results", f.results))
            for i, v in enumerate(values)
        ]

    @property
    def size(self) -> int:
        total = 1
        for options in (*self.states, *(end[3] for end in self.ends)):
            total *= len(options)
        return total

    def least_us(self) -> float:
        best = float("inf")
        for states in product(*self.states):
            picked = {(f.name, i): s for (f, i), s in zip(self.ops, states, strict=True)}
            for placements in product(*(end[3] for end in self.ends)):
                ends = {end[:3]: p for end, p in zip(self.ends, placements, strict=True)}
                best = min(best, self.total_us(picked, ends))
        return best

    def total_us(
        self,
        picked: dict[tuple[str, int], State],
        ends: dict[tuple[str, str, int], Placements],
    ) -> float:
        total = 0.0
        for function in self.module.functions:
            entry = function is self.module.entry
            held: dict[str, Placements] = {}
            needs: dict[str, set[Placements]] = {}
            one_run = 0.0
            if not entry:
                held |= {p.name: ends[function.name, "params", i]
                         for i, p in enumerate(function.params)}  # fmt: skip
            for index, op in enumerate(function.ops):
                if op.name == "call":
                    callee = str(op.attrs["callee"])
                    ins = [ends[callee, "params", i] for i in range(len(op.operands))]
                    outs = [ends[callee, "results", i] for i in range(len(op.results))]
                else:
                    state = picked[function.name, index]
                    ins, outs = list(state.operands), list(state.results)
                    one_run += state.time_us
                for value, need in zip(op.operands, ins, strict=True):
                    needs.setdefault(value.name, set()).add(need)
                held |= {v.name: p for v, p in zip(op.results, outs, strict=True)}
            updates: dict[str, list[Value]] = {}
            for index, (value, attrs) in enumerate(
                zip(function.results, function.result_attrs, strict=True)
            ):
                if "updates" in attrs:
                    updates.setdefault(str(attrs["updates"]), []).append(value)
                else:
                    need = self.whole if entry else ends[function.name, "results", index]
                    needs.setdefault(value.name, set()).add(need)
            types = {v.name: v.type for v in function.params}
            types |= {v.name: v.type for op in function.ops for v in op.results}
            updated = {v.name for values in updates.values() for v in values}
            for name, wanted in needs.items():
                if name in held and name not in updated:
                    cost = self.joins.cost(name, self.cost) if entry else self.cost
                    one_run += self.reshards_us(types[name], held[name], wanted, cost)
            if entry:
                for param in function.params:
                    one_run += self.parameter_us(param, needs, held, updates.get(param.name, []))
            total += self.runs[function.name] * one_run
        return total

    def parameter_us(
        self,
        param: Value,
        needs: dict[str, set[Placements]],
        held: dict[str, Placements],
        updates: list[Value],
    ) -> float:
        best = float("inf")
        for own in legal_placements(param.type, self.mesh, ()):
            wanted = needs.get(param.name, set())
            cost = self.reshards_us(param.type, own, wanted, self.joins.cost(param.name, self.cost))
            for value in updates:
                wanted = needs.get(value.name, set()) | {own}
                moving = self.joins.cost(value.name, self.cost)
                cost += self.reshards_us(value.type, held[value.name], wanted, moving)
            best = min(best, cost)
        return best

    def reshards_us(
        self, type: TensorType, held: Placements, wanted: set[Placements], cost: StepCost
    ) -> float:
        """One reshard for each distinct placement that is asked for."""
        return sum(reshard_cost_us(type, self.mesh, held, p, cost) for p in wanted if p != held)


def check_price(module: Module, result: PlacementResult, cluster: Cluster) -> None:
    verify(result.placed)
    again = price(apply(module, result.mesh, result.choices), cluster)
    assert again.total_us == pytest.approx(result.objective_us, rel=1e-9, abs=1e-6)


def cases(axes: int, count: int, most: int) -> Iterator[tuple[Module, Mesh, Cluster, Enumeration]]:
    """Random programs small enough to enumerate, on meshes of an axis count."""
    rng = random.Random(axes)
    while count:
        cluster = parse_cluster(rng.choice(["2x2:cpu", "2x4:h100", "1x8:a100"]))
        mesh = Mesh(tuple((f"axis{i}", rng.choice([2, 4])) for i in range(axes))[:3])
        if mesh.size > cluster.ranks:
            continue
        module = random_program(rng, rng.randint(1, 4 if axes == 1 else 2))
        full = Enumeration(module, mesh, cluster)
        if full.size <= most:
            count -= 1
            yield module, mesh, cluster, full


@pytest.mark.parametrize(("sizes", "count"), [((2,), 12), ((2, 2), 10), ((2, 2, 2), 3)])
def test_the_search_equals_an_exhaustive_one_on_programs_of_up_to_seven_ops(
    sizes: tuple[int, ...], count: int
) -> None:
    """`benchmarks/placement_exact.py` does this for 500 programs."""
    rng = random.Random(sum(sizes))
    mesh = Mesh(tuple((f"axis{i}", size) for i, size in enumerate(sizes)))
    while count:
        cluster = parse_cluster(rng.choice(["2x4:cpu", "2x4:h100", "1x8:a100"]))
        module = random_program(rng, rng.randint(4, 7))
        result = search_mesh(module, mesh, cluster)
        assert result is not None and result.report[0].gap == 0
        try:
            least = Exhaustive(module, mesh, cluster, 20_000).least_us(
                result.objective_us * (1 + 1e-9) + 1e-6
            )
        except TooLarge:
            continue
        count -= 1
        assert result.objective_us == pytest.approx(least, rel=1e-6)
        assert result.lower_bound_us <= least * (1 + 1e-9) + 1e-6


@pytest.mark.parametrize(("axes", "count", "most"), [(1, 60, 800), (2, 20, 1500)])
def test_the_search_equals_enumeration_on_random_programs(axes: int, count: int, most: int) -> None:
    for module, mesh, cluster, full in cases(axes, count, most):
        result = search_mesh(module, mesh, cluster)
        assert result is not None and result.report[0].gap == 0
        assert result.objective_us == pytest.approx(full.least_us(), rel=1e-6)
        check_price(module, result, cluster)


def chain(rows: int, columns: int, calls: int, *, twice: bool) -> Module:
    """x -> f -> f -> ... -> sum, with f(x) = exp(x + x) or exp(x)."""
    inner = Builder()
    p = inner.param(f32(rows, columns), "p")
    inside = inner.one("add", [p, p]) if twice else p
    f = inner.function("f", [inner.one("exp", [inside])])
    e = Entry()
    x = e.b.param(f32(rows, columns), "x", role="input", name="x")
    for _ in range(calls):
        x = e.b.one("call", [x], {"callee": "f"}, types=[x.type])
    loss = e.b.one("reduce_sum", [x], {"dims": (0, 1)})
    return Module("logical", (e.b.function("main", [loss], [{"role": "loss"}]), f))


def unshared(module: Module) -> Module:
    """The same program with a function for each call."""
    ops, copies = [], []
    for index, op in enumerate(module.entry.ops):
        if op.name == "call":
            name = f"{op.attrs['callee']}{index}"
            copies.append(module.function(str(op.attrs["callee"])).with_(name=name))
            op = op.with_(attrs={"callee": name})
        ops.append(op)
    return Module("logical", (module.entry.with_(ops=tuple(ops)), *copies))


@pytest.mark.parametrize(("calls", "twice"), [(1, True), (2, False)])
@pytest.mark.parametrize("shape", [(1024, 4096), (4, 4), (3, 2048)])
def test_each_call_of_a_function_has_a_placement_of_its_own(
    shape: tuple[int, int], calls: int, twice: bool
) -> None:
    module = chain(*shape, calls, twice=twice)
    mesh = Mesh((("x", 4),), "cpu")
    result = search_mesh(module, mesh, CPU)
    assert result is not None
    assert result.objective_us == pytest.approx(Enumeration(unshared(module), mesh, CPU).least_us())
    check_price(module, result, CPU)


def test_a_plan_with_copies_of_a_function_computes_what_the_program_does() -> None:
    module = chain(8, 12, 2, twice=True)
    mesh = Mesh((("x", 2),), "cpu")
    one = FunctionChoices((("a0",), ("a0",)), ((S(0),),), ((S(0),),))
    two = FunctionChoices((("a1",), ("a1",)), ((S(1),),), ((S(1),),))
    choices = Choices({"f": one, "f_2": two}, {"f_2": "f"}, {("main", 1): "f_2"})
    placed = apply(module, mesh, choices)
    verify(placed)
    assert [f.name for f in placed.functions] == ["main", "f", "f_2"]
    x = torch.randn(8, 12, dtype=torch.float64)
    inputs = [torch.tensor(0.0), torch.tensor(0.0), x.float()]
    assert_close(evaluate(module, inputs), evaluate(lower(placed), inputs), tolerance=1e-5)


SMALL = dict(batch=8, seq=128, width=256, heads=8, kv=4, ffn=768, vocab=256)


@pytest.mark.parametrize("text", ["2x2:cpu", "1x8:h100"])
def test_a_transformer_is_placed_exactly_and_priced_as_promised(text: str) -> None:
    cluster = parse_cluster(text)
    module = llama_step(layers=3, **SMALL)
    result = search(module, cluster)
    assert all(report.gap == 0 for report in result.report)
    assert result.mesh.size == cluster.ranks
    check_price(module, result, cluster)
    alone = search_mesh(module, Mesh((), cluster.device.kind), cluster)
    assert alone is not None and result.objective_us < alone.objective_us


def test_a_transformer_on_four_cpu_ranks_uses_all_of_them_and_shards_its_states() -> None:
    module = llama_step(layers=2, **{**SMALL, "batch": 64})
    result = search(module, CPU)
    heavy = [op for _, op in result.placed.walk()
             if op.name in ("einsum", "attention", "attention_backward")]  # fmt: skip
    assert all(len(op.split) == len(result.mesh.axes) for op in heavy if op.name != "einsum")
    used = sum(len(op.split) for op in heavy) / (len(heavy) * len(result.mesh.axes))
    assert used > 0.9
    whole = sum(v.type.bytes for v, a in zip(
        module.entry.params, module.entry.param_attrs, strict=True) if a["role"] == "state")
    local = [v.type for v, a in zip(result.placed.entry.params, result.placed.entry.param_attrs,
                                    strict=True) if a["role"] == "state"]  # fmt: skip
    held = sum(t.bytes for t in local if t.placement == (B,) * len(result.mesh.axes))
    assert held < whole / 2


def test_a_searched_plan_computes_what_the_program_does() -> None:
    fast = parse_cluster("2x2:h100")  # with slow memory, so that a small program is split as well
    cluster = replace(fast, device=replace(fast.device, dram_bytes_per_s=1e8))
    module = llama_step(layers=2, batch=8, seq=16, width=64, heads=4, kv=2, ffn=128, vocab=32)
    placed = search_mesh(module, meshes(cluster)[0], cluster)
    assert placed is not None
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randint(0, 32, v.type.shape, generator=generator) if v.type.dtype == "i64"
        else torch.rand(v.type.shape, generator=generator, dtype=torch.float64).to(
            torch.float64 if v.type.dtype == "f64" else torch.float32)
        for v in module.entry.params
    ]  # fmt: skip
    spmd = lower(placed.placed)
    assert {"all_reduce", "reduce_scatter", "all_gather"} & {op.name for _, op in spmd.walk()}
    assert_close(evaluate(module, inputs), evaluate(spmd, inputs), tolerance=1e-3)


def test_the_layers_in_the_middle_of_a_deep_model_share_a_function() -> None:
    mesh = meshes(CPU)[0]
    result = search_mesh(llama_step(layers=9, **SMALL), mesh, CPU)
    assert result is not None and result.report[0].gap == 0
    assert len(result.placed.functions) <= 1 + 2 * 3  # first, middle and last, forward and backward
    check_price(llama_step(layers=9, **SMALL), result, CPU)


def test_a_large_batch_is_split_and_a_large_layer_is_split_otherwise() -> None:
    cluster = parse_cluster("1x4:h100")
    (mesh, *_) = meshes(cluster)
    tall = search_mesh(mlp_step(1 << 16, 1024, 1024), mesh, cluster)
    wide = search_mesh(mlp_step(64, 8192, 32768), mesh, cluster)
    assert tall is not None and wide is not None
    first = [next(op for op in r.placed.entry.ops if op.name == "einsum") for r in (tall, wide)]
    assert first[0].split == {"dev": "b"} and first[1].split == {"dev": "n"}


def test_data_parallel_optimizer_states_are_sharded_where_that_saves_time() -> None:
    """ZeRO falls out: scatter the gradient, update a part, gather; an all-reduce costs the same."""
    cluster = parse_cluster("1x4:h100")
    result = search_mesh(mlp_step(1 << 18, 4096, 4096), meshes(cluster)[0], cluster)
    assert result is not None
    named = {str(a.get("name")): v.type.placement for v, a in zip(
        result.placed.entry.params, result.placed.entry.param_attrs, strict=True)}  # fmt: skip
    assert {named["mw1"], named["vw1"]} <= {(S(0),), (S(1),)}


def _cluster_with_memory(folder: Path, memory_bytes: float) -> Cluster:
    path = folder / "small.toml"
    path.write_text(
        '[[groups]]\ndevice = "h100"\nhosts = 1\ndevices = 4\n'
        f"[device]\nmemory_bytes = {memory_bytes}\n"
    )
    return parse_cluster(str(path))


def test_memory_that_does_not_fit_is_bought_back_with_time(tmp_path: Path) -> None:
    module = llama_step(
        layers=2, batch=64, seq=64, width=1024, heads=8, kv=8, ffn=4096, vocab=512
    )
    rich = parse_cluster("1x4:h100")
    mesh = meshes(rich)[0]
    free = search_mesh(module, mesh, rich)
    assert free is not None
    tight = _cluster_with_memory(tmp_path, 0.92 * free.price.peak_bytes / 0.9)
    result = search_mesh(module, mesh, tight)
    assert result is not None and result.report[0].fits
    assert result.price.peak_bytes <= 0.92 * free.price.peak_bytes
    assert result.objective_us >= free.objective_us * (1 - 1e-9)
    assert result.report[0].us_per_byte > 0
    check_price(module, result, tight)


def test_parameters_that_fit_nowhere_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CompileError, match="do not fit") as error:
        search(mlp_step(64, 1024, 1024), _cluster_with_memory(tmp_path, 1e6))
    assert error.value.code == "W0402"


def test_descent_over_pairs_of_axes_keeps_its_promises() -> None:
    cluster = parse_cluster("2x4:cpu")
    mesh = Mesh((("a", 2), ("b", 2), ("c", 2)), "cpu")
    module = mlp_step(256, 512, 1024)
    result = search_mesh(module, mesh, cluster)
    assert result is not None
    check_price(module, result, cluster)
    assert result.lower_bound_us <= result.objective_us
    pair = search_mesh(module, Mesh((("a", 2), ("b", 2)), "cpu"), cluster)
    assert pair is not None and result.objective_us <= pair.objective_us * 1.2


def test_an_op_without_a_signature_stays_whole() -> None:
    b = Builder()
    x = b.param(f32(4096, 4096), "x", role="input", name="x")
    y = b.one("aten", [b.one("exp", [x])], {"target": "aten.erfinv.default"}, types=[x.type])
    module = Module("logical", (b.function("main", [b.one("neg", [y])], [{"role": "output"}]),))
    result = search(module, CPU)
    check_price(module, result, CPU)
    (op,) = [op for op in result.placed.entry.ops if op.name == "aten"]
    assert not op.split and op.result.type.placement == (B,) * len(result.mesh.axes)


def test_one_rank_needs_no_placement() -> None:
    module = mlp_step(8, 16, 16)
    result = search(module, parse_cluster("1x1:cpu"))
    assert result.mesh == Mesh((), "cpu") and result.price.reshard_us == 0
    check_price(module, result, parse_cluster("1x1:cpu"))


def test_the_pass_reads_its_cluster_from_the_option_or_the_module() -> None:
    module = mlp_step(64, 64, 64)
    placed = Place(cluster="2x2:cpu", mesh="4").run(module)
    assert placed.level == "placed" and placed.mesh is not None and placed.mesh.sizes == (4,)
    assert placed.attrs["cluster"] == "2x2:cpu"
    assert Place().run(module.with_(attrs={"cluster": "1x2:cpu"})).mesh == Mesh(
        (("dev", 2),), "cpu")  # fmt: skip
    assert Place(cluster="2x4:cpu", mesh="4x2").run(module).mesh == Mesh(
        (("axis0", 4), ("axis1", 2)), "cpu")  # fmt: skip
    for wrong in (Place(), Place(cluster="2x2:cpu", mesh="3"), Place(cluster="2x2:cpu", mesh="ax2")):
        with pytest.raises(CompileError) as error:
            wrong.run(module)
        assert error.value.code == "W0501"


def test_only_placed_modules_have_a_price() -> None:
    with pytest.raises(CompileError, match="must be placed"):
        price(mlp_step(8, 8, 8), CPU)
