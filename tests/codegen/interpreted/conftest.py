"""These tests run in a process of their own: Triton decides at import whether it interprets."""

from __future__ import annotations

import numpy as np

from weft.codegen import interp

collect_ignore_glob = [] if interp.enabled() else ["test_*.py"]
interp.install()
np.seterr(all="ignore")  # a device divides by zero without a word
