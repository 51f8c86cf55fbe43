"""What the stages of a pipeline mean together: every op in an order that its operands allow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from weft.ir.module import Function, Module, Op
from weft.ir.types import B, Placement
from weft.ir.verify import verify
from weft.passes.micro import TimeSplit
from weft.passes.micro_shapes import at_row
from weft.passes.stages import cut
from weft.runtime.interpreter import run_function

Values = dict[str, Tensor]


def combined(one: Tensor, two: Tensor, placement: Placement) -> Tensor:
    """Two micro-batches' terms."""
    join = {"sum": torch.add, "max": torch.maximum, "min": torch.minimum}
    return join[placement.combine](one, two)


class Pipeline:
    """Runs the stages of a split program on whole inputs, micro-batch by micro-batch."""

    def __init__(self, split: TimeSplit, stage_of: Sequence[int]) -> None:
        self.split = split
        by_size = {rows: split.sizes.index(rows) for rows in split.sizes}
        self.stages = {rows: cut(split, stage_of, k) for rows, k in by_size.items()}
        for stages in self.stages.values():
            for stage in stages:
                verify(stage.module)
        self.any = self.stages[split.sizes[0]]

    def run(self, inputs: Mapping[str, Tensor]) -> tuple[Values, Values]:
        """(results by number, updates by parameter), from entry parameters by value name.

        What is returned by several stages must be equal.
        """
        self.inputs = inputs
        self.once: list[Values] = [
            {v.name: inputs[v.name] for v, a in zip(
                s.module.entry.params, s.module.entry.param_attrs, strict=True)
             if a["role"] != "received" and s.held[v.name] == B} for s in self.any]  # fmt: skip
        self.sums: list[Values] = [{} for _ in self.any]
        self.parts: dict[str, list[Tensor]] = {}
        self._drain("before", 0, self.once)
        for k in range(self.split.count):
            self._micro(k)
        for values, sums in zip(self.once, self.sums, strict=True):
            values.update(sums)
        self._drain("update", 0, self.once)
        return self._collect()

    def _micro(self, k: int) -> None:
        stages = self.stages[self.split.sizes[k]]
        values = [dict(once) for once in self.once]
        for stage, known in zip(stages, values, strict=True):
            for value in stage.module.entry.params:
                held = stage.held[value.name]
                if value.name in self.inputs and held.kind == "S":
                    size = value.type.shape[held.dim]
                    total = self.inputs[value.name].shape[held.dim]
                    start = total * self.split.start(k) // self.split.batch
                    known[value.name] = self.inputs[value.name].narrow(held.dim, start, size)
        self._drain("forward", k, values)
        self._drain("backward", k, values)
        for stage, known, sums in zip(stages, values, self.sums, strict=True):
            for name, tensor in known.items():
                held = stage.held.get(name, B)
                if held.kind == "P":
                    old = sums.get(name)
                    sums[name] = tensor if old is None else combined(old, tensor, held)
            entry = stage.module.entry
            for value, attrs in zip(entry.results, entry.result_attrs, strict=True):
                if stage.held[value.name].kind == "S" and attrs["role"] != "sent":
                    self.parts.setdefault(value.name, []).append(known[value.name])

    def _drain(self, phase: str, k: int, values: list[Values]) -> None:
        """Run all ops of a phase, each as soon as its operands are there."""
        stages = self.stages[self.split.sizes[k]]
        move = at_row(self.split.start(k), self.split.batch)
        moved = [
            s.module.with_(functions=tuple(
                f.with_(ops=tuple(map(move, f.ops))) for f in s.module.functions))
            for s in stages
        ]  # fmt: skip
        left = [
            [op for op, p in zip(m.entry.ops, s.phases, strict=True) if p == phase]
            for m, s in zip(moved, stages, strict=True)
        ]
        progress = True
        while progress:
            progress = False
            for stage, module, known, ops in zip(stages, moved, values, left, strict=True):
                for transfer in stage.receives:
                    if transfer.value in values[transfer.source]:
                        known.setdefault(transfer.value, values[transfer.source][transfer.value])
                while ops and all(v.name in known for v in ops[0].operands):
                    self._run(module, ops.pop(0), known)
                    progress = True
        assert not any(left), "the stages wait for each other"

    @staticmethod
    def _run(module: Module, op: Op, known: Values) -> None:
        operands = tuple(dict.fromkeys(op.operands))
        one = Function("one", operands, (op,), op.results)
        out = run_function(module, one, [known[v.name] for v in operands])
        known.update((v.name, t) for v, t in zip(op.results, out, strict=True))

    def _collect(self) -> tuple[Values, Values]:
        results: Values = {}
        updates: Values = {}
        for stage, known in zip(self.any, self.once, strict=True):
            entry = stage.module.entry
            for value, attrs in zip(entry.results, entry.result_attrs, strict=True):
                if attrs["role"] == "sent":
                    continue
                held = stage.held[value.name]
                tensor = known.get(value.name)
                if held.kind == "S":
                    tensor = torch.cat(self.parts[value.name], held.dim)
                assert tensor is not None
                if "updates" in attrs:
                    old = updates.setdefault(str(attrs["updates"]), tensor)
                    assert torch.equal(old, tensor)
                else:
                    assert str(attrs["number"]) not in results
                    results[str(attrs["number"])] = tensor
        return results, updates
