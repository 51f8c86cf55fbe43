"""The least time of a flat program by exhaustive search, apart from the placement search's network.

Depth first over the ops in program order, every state of each; a branch ends only where what it
costs so far, with the least time of each op to come, reaches what is known already. A parameter's
own placement is chosen last, given all that is asked of it.
"""

from __future__ import annotations

import random

from tests.passes.place_programs import Entry, ein, f32

from weft.costmodel.cluster import Cluster
from weft.costmodel.collectives import collective_cost
from weft.ir.module import Function, Module, Op, Value
from weft.ir.types import B, Mesh
from weft.passes.joined import joins
from weft.passes.place_states import State, states_of
from weft.passes.reshard import Placements, legal_placements, reshard_cost_us


class TooLarge(Exception):
    """The search needs more nodes than it may take."""


class Exhaustive:
    """All placements of a flat program on a mesh.

    Args:
        most: nodes of the search.
    """

    def __init__(self, module: Module, mesh: Mesh, cluster: Cluster, most: int = 100_000) -> None:
        self.entry, self.mesh, self.most = module.entry, mesh, most
        self.cost, self.joins = collective_cost(cluster, mesh), joins(module)
        self.whole = (B,) * len(mesh.axes)
        self.states = [
            sorted(states_of(op, mesh, cluster), key=lambda s: s.time_us) for op in self.entry.ops
        ]
        self.rest = [0.0]
        for options in reversed(self.states):
            self.rest.append(self.rest[-1] + options[0].time_us)
        self.rest.reverse()
        self.types = {v.name: v.type for v in self.entry.params}
        self.types |= {v.name: v.type for op in self.entry.ops for v in op.results}
        self.updates: dict[str, str] = {}
        self.final: dict[str, Placements] = {}
        for value, attrs in zip(self.entry.results, self.entry.result_attrs, strict=True):
            if "updates" in attrs:
                self.updates[value.name] = str(attrs["updates"])
            else:
                self.final[value.name] = self.whole
        self.known: dict[tuple[str, Placements, Placements], float] = {}

    def least_us(self, upper_us: float = float("inf")) -> float:
        """The least time below `upper_us`, or that. Raises TooLarge."""
        self.best, self.nodes = upper_us, 0
        self.held: dict[str, Placements] = {}
        self.needs: dict[str, list[Placements]] = {v.name: [] for v in self.entry.params}
        self._visit(0, 0.0)
        return self.best

    def reshard_us(self, name: str, source: Placements, target: Placements) -> float:
        """Time of one reshard of a value."""
        if source == target:
            return 0.0
        key = (name, source, target)
        if key not in self.known:
            cost = self.joins.cost(name, self.cost)
            self.known[key] = reshard_cost_us(self.types[name], self.mesh, source, target, cost)
        return self.known[key]

    def _visit(self, index: int, spent_us: float) -> None:
        self.nodes += 1
        if self.nodes > self.most:
            raise TooLarge
        if index == len(self.states):
            total = spent_us + sum(self._param_us(value) for value in self.entry.params)
            self.best = min(self.best, total)
            return
        op = self.entry.ops[index]
        tried = []
        for state in self.states[index]:
            spent = spent_us + state.time_us + self._reads_us(index, state)
            if spent + self.rest[index + 1] < self.best:
                tried.append((spent, state))
        for spent, state in sorted(tried, key=lambda item: item[0]):
            if spent + self.rest[index + 1] >= self.best:
                break
            for value, placement in zip(op.results, state.results, strict=True):
                self.held[value.name] = placement
                self.needs[value.name] = []
                final = self.final.get(value.name)
                if final is not None:
                    spent += self.reshard_us(value.name, placement, final)
                    self.needs[value.name].append(final)
            for value, placement in zip(op.operands, state.operands, strict=True):
                self.needs[value.name].append(placement)
            self._visit(index + 1, spent)
            for value in op.operands:
                self.needs[value.name].pop()

    def _reads_us(self, index: int, state: State) -> float:
        """Reshards that an op asks for and that nobody before it asked for."""
        total, seen = 0.0, set()
        for value, need in zip(self.entry.ops[index].operands, state.operands, strict=True):
            if value.name not in self.held or self._is_param(value.name):
                continue
            if need in self.needs[value.name] or (value.name, need) in seen:
                continue
            seen.add((value.name, need))
            total += self.reshard_us(value.name, self.held[value.name], need)
        return total

    def _is_param(self, name: str) -> bool:
        return any(value.name == name for value in self.entry.params)

    def _param_us(self, param: Value) -> float:
        """The least time of a parameter's reshards, and of its updates' to where it is stored."""
        best = float("inf")
        for own in legal_placements(param.type, self.mesh, ()):
            total = sum(self.reshard_us(param.name, own, n) for n in set(self.needs[param.name]))
            for name, target in self.updates.items():
                if target == param.name and own not in self.needs[name]:
                    total += self.reshard_us(name, self.held[name], own)
            best = min(best, total)
        return best


def random_program(rng: random.Random, ops: int) -> Module:
    """A small flat program: weights that are updated, an input, a loss."""
    e = Entry()
    b = e.b
    m, n = rng.choice([4, 6, 64, 1024]), rng.choice([4, 512, 2048])
    pool = [b.param(f32(m, n), "x", role="input", name="x"), e.weight("w", m, n)]
    readers: dict[str, int] = {}
    for _ in range(ops):
        x, y = rng.choice(pool), rng.choice(pool)
        kind = rng.choice(["exp", "neg", "add", "mul", "matmul", "softmax"])
        if kind == "matmul":
            z = ein(b, "a k, b k -> a b", x, y)
            z = ein(b, "a b, b k -> a k", z, x) if rng.random() < 0.5 else b.one("add", [x, y])
        elif kind in ("add", "mul"):
            z = b.one(kind, [x, y])
        else:
            z = b.one(kind, [x])
        pool.append(z)
    loss = b.one("reduce_sum", [pool[-1]], {"dims": (0, 1)})
    if rng.random() < 0.5:
        new = b.one("sgd_update", [pool[1], pool[-1], e.step, e.lr])
        e.results.append((new, {"role": "update", "updates": pool[1].name}))
    values, attrs = zip((loss, {"role": "loss"}), *e.results, strict=True)
    function = b.function("main", values, attrs)
    for op in function.ops:
        for name in {value.name for value in op.operands}:
            readers[name] = readers.get(name, 0) + 1
    return Module("logical", (_drop_dead(function),))


def _drop_dead(function: Function) -> Function:
    needed = {value.name for value in function.results}
    kept: list[Op] = []
    for op in reversed(function.ops):
        if any(value.name in needed for value in op.results):
            kept.append(op)
            needed |= {value.name for value in op.operands}
    return function.with_(ops=tuple(reversed(kept)))
