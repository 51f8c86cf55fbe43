"""Peak memory of one train step, as the allocator sees it; a process of its own for each figure.

    python benchmarks/step_memory.py NAME eager|weft     # prints JSON, in bytes
    torchrun --nproc-per-node N benchmarks/step_memory.py FOLDER   # of a saved plan for Llama

`live` is what tensors hold between steps, `rise` the most that a step allocates on top of it,
`resident` the growth of the resident set from before the model was made to its peak.
"""

from __future__ import annotations

import gc
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from train_steps import SHARDED_ROWS, runner, token_ids


def live_bytes() -> int:
    """Bytes of the distinct storages of all tensors that Python can reach."""
    sizes: dict[int, int] = {}
    for item in gc.get_objects():
        if type(item) in (torch.Tensor, torch.nn.Parameter) and item.device.type == "cpu":
            storage = item.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def rise_bytes(run: Callable[[], object]) -> int:
    """The largest number of bytes that a call holds at once on top of what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    results = profiler.profiler.kineto_results  # type: ignore[union-attr]
    held = peak = 0
    events = [event for event in results.events() if event.name() == "[memory]"]  # type: ignore[union-attr]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def measure_rank(folder: Path) -> dict[str, int]:
    """The figures of this rank of a saved plan."""
    import weft

    torch.set_num_threads(1)
    ids = token_ids(SHARDED_ROWS)
    executable = weft.load(folder)
    executable.load_weights()

    def run() -> object:
        return executable.step(ids, lr=1e-3, seed=0)

    for _ in range(3):
        run()
    gc.collect()
    figures = {"live": live_bytes(), "rise": rise_bytes(run)}
    (folder / f"memory{executable.rank}.json").write_text(json.dumps(figures))
    executable.close()
    return figures


def measure(name: str, side: str) -> dict[str, int]:
    """The figures of one side in this process."""
    torch.set_num_threads(1)
    if side == "weft":
        import weft  # an eager process does without it

        wrap = weft.compile
    else:
        wrap = lambda step: step  # noqa: E731
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run = runner(name, wrap)
    for _ in range(3):
        run()
    gc.collect()
    live = live_bytes()
    return {
        "live": live, "rise": rise_bytes(run),
        "resident": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024,
    }  # fmt: skip


def in_child(name: str, side: str) -> dict[str, int]:
    """The figures of one side, from a new process."""
    command = [sys.executable, str(Path(__file__).resolve()), name, side]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    figures: dict[str, int] = json.loads(output.splitlines()[-1])
    return figures


if __name__ == "__main__":
    if len(sys.argv) > 2:
        print(json.dumps(measure(sys.argv[1], sys.argv[2])))
    else:
        measure_rank(Path(sys.argv[1]))
