"""All passes by name: those of the floor below, and this floor's own, loaded when it is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ..passes.base import Pass
from ..passes.registry import PASSES

#: the pass of this floor: it needs torch, which takes a second to load
_OWN = "differentiate"


class _Table(Mapping[str, type[Pass]]):
    def __getitem__(self, name: str) -> type[Pass]:
        if name == _OWN:
            from .differentiate import Differentiate

            return Differentiate
        return PASSES[name]

    def __iter__(self) -> Iterator[str]:
        yield from PASSES
        yield _OWN

    def __len__(self) -> int:
        return len(PASSES) + 1

    def __contains__(self, name: object) -> bool:
        return name == _OWN or name in PASSES


#: what a pipeline's text may name
ALL_PASSES: Mapping[str, type[Pass]] = _Table()

__all__ = ["ALL_PASSES"]
