"""The one list of passes, and the default pipeline.

To add a pass: write it in a file of its own, import it here, and put it into `PASSES`.
"""

from __future__ import annotations

from .base import Pass
from .fuse import Fuse
from .inline import Inline
from .outline import Outline
from .schedule import Schedule

#: every pass, in the order in which a program meets them
PASSES: tuple[type[Pass], ...] = (Inline, Fuse, Schedule)

#: name -> pass
TABLE: dict[str, type[Pass]] = {cls.name: cls for cls in PASSES}
if len(TABLE) != len(PASSES):
    raise ValueError("two passes have the same name")
