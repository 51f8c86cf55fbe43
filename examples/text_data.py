"""Real text that every machine has: the sources of the running interpreter's standard library."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import torch


def standard_library_bytes(limit: int = 2_000_000) -> torch.Tensor:
    """The first `limit` bytes of the standard library's sources, as a uint8 tensor."""
    root = Path(sysconfig.get_path("stdlib"))
    chunks, total = [], 0
    for path in sorted(root.glob("*.py")):
        data = path.read_bytes()
        chunks.append(data)
        total += len(data)
        if total >= limit:
            break
    return torch.frombuffer(bytearray(b"".join(chunks)[:limit]), dtype=torch.uint8)


def batch(text: torch.Tensor, step: int, rows: int, length: int) -> torch.Tensor:
    """The batch of a step, i64[rows, length]: the same on every rank and in every run."""
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(0, text.numel() - length, (rows,), generator=generator)
    return torch.stack([text[start : start + length] for start in starts.tolist()]).long()
