"""The op table. Importing this package fills `OPS`; one module per group of families."""

from ..opdef import OPS
from . import (  # noqa: F401
    attention,
    channel,
    collective,
    contraction,
    creation,
    grouped,
    indexing,
    movement,
    optimizer,
    pointwise,
    pool,
    reduction,
    row,
)

__all__ = ["OPS"]
