"""What the ranks of test_dynamic_ranks.py run: batches of many sizes under one plan, against eager.

`dynamic_worker.py OUT`; each rank writes OUT.<rank>.json: for each plan its numbers.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from tests.frontend.test_dynamic_programs import step, tagger, tokens
from torch.nn import functional as F

import weft
from weft.runtime.launch import init_from_env

#: 7, 5 and 3 rows do not divide by 4 ranks, 3 and 2 are fewer than there are
SIZES = [(8, 6), (7, 6), (4, 9), (3, 5), (8, 6), (2, 12), (5, 3), (12, 8)]
PLANS = {
    "searched": "",
    "random 0": "simplify,outline,differentiate,simplify,random-place[seed=0 mesh=4],lower,schedule",
    "random 1": "simplify,outline,differentiate,simplify,random-place[seed=1 mesh=2x2],lower,schedule",
}
SHAPES = {"batch": {name: (torch.export.Dim("b"), torch.export.Dim("s"))
                    for name in ("ids", "mask", "labels")}}  # fmt: skip


def worst(pairs: Any) -> float:
    """The largest difference, relative to the largest element."""
    return max(
        float((a - b).detach().abs().max() / b.detach().abs().max().clamp_min(1e-3))
        for a, b in pairs
    )


def steps(pipeline: str) -> dict[str, Any]:
    ours, theirs = tagger(), tagger()
    mine, other = (torch.optim.AdamW(m.parameters(), lr=0.01) for m in (ours, theirs))
    compiled = weft.compile(step, pipeline=pipeline, dynamic_shapes=SHAPES)
    batches = [tokens(b, s) for b, s in SIZES]
    losses = [(compiled(ours, mine, x), step(theirs, other, x)) for x in batches]
    compiled.sync()
    tracings = compiled.step.compiler.tracings
    return {
        "loss": worst(losses),
        "weights": worst(zip(ours.parameters(), theirs.parameters(), strict=True)),
        "states": worst((mine.state[p]["exp_avg"], other.state[q]["exp_avg"])
                        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True)),
        "traces": tracings.count,
        "searches": len(tracings.families[0].placed),
        "plans": len(compiled.step.compiler.entries),
    }  # fmt: skip


def module() -> dict[str, Any]:
    ours, theirs = tagger(), tagger()
    rows = torch.export.Dim("rows")
    compiled = weft.compile(ours, dynamic_shapes={"ids": {0: rows}, "mask": {0: rows}})
    outs = []
    for b in (8, 7, 3):
        x = tokens(b, 6)
        both = [model(x["ids"], x["mask"]) for model in (compiled, theirs)]
        outs.append(both)
        for out in both:
            F.cross_entropy(out.flatten(0, 1), x["labels"].flatten()).backward()
    grads = [(p.grad, q.grad) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True)]
    tracings = compiled.compiler.tracings
    return {"loss": worst(outs), "weights": worst(grads), "states": 0.0, "traces": tracings.count,
            "searches": len(tracings.families[0].placed), "plans": len(compiled.compiler.entries)}  # fmt: skip


if __name__ == "__main__":
    with init_from_env() as world:
        report = {name: steps(pipeline) for name, pipeline in PLANS.items()}
        report["module"] = module()
        Path(f"{sys.argv[1]}.{world.rank}.json").write_text(json.dumps(report))
