"""What stands aside while garbage is collected comes back."""

from __future__ import annotations

import gc

import pytest

from weft.frontend.garbage import heap_aside


def test_what_was_there_is_left_alone_and_comes_back() -> None:
    before = gc.get_freeze_count()
    with heap_aside():
        assert gc.get_freeze_count() > before
    assert gc.get_freeze_count() == 0
    with pytest.raises(KeyError), heap_aside():
        raise KeyError
    assert gc.get_freeze_count() == 0
