"""Options of the test run."""

from __future__ import annotations

import os

import pytest
from hypothesis import settings

# CI judges a change, so it draws the same examples each time; elsewhere every run draws new ones.
settings.register_profile("ci", derandomize=True, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden",
        action="store_true",
        help="rewrite the expected part of golden files instead of comparing with it",
    )
