"""The op table. Importing this package fills `OPS`; one module per group of families."""

from ..opdef import OPS
from . import attention, collective, contraction, creation, indexing, movement, optimizer  # noqa: F401
from . import pointwise, reduction, row  # noqa: F401

__all__ = ["OPS"]
