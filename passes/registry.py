"""The one list of passes.

To add a pass: write it in a file of its own, import it here, and put it into `_ORDER`.
"""

from __future__ import annotations

from .base import Pass
from .coalesce import Coalesce
from .fuse import Fuse
from .inline import Inline
from .lower import Lower
from .outline import Outline
from .place import Place
from .random_place import RandomPlace
from .schedule import Schedule
from .simplify import Simplify

#: in the order in which a program meets them
_ORDER: tuple[type[Pass], ...] = (
    Simplify,
    Outline,
    Inline,
    Place,
    RandomPlace,
    Lower,
    Fuse,
    Coalesce,
    Schedule,
)

#: every pass by its name
PASSES: dict[str, type[Pass]] = {cls.name: cls for cls in _ORDER}
if len(PASSES) != len(_ORDER):
    raise ValueError("two passes have the same name")
