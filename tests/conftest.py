"""Puts this folder on the path, so that tests can import their helpers (`ranks`) and processes they start can too."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

sys.path[:0] = [
    path for path in (str(Path(__file__).parent.parent), str(Path(__file__).parent)) if path not in sys.path
]

import seldom  # noqa: E402, F401

_SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
settings.register_profile("ci", deadline=None, derandomize=True, suppress_health_check=_SLOW)
settings.register_profile("hundreds", deadline=None, suppress_health_check=_SLOW, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(scope="session")
def here(tmp_path_factory: pytest.TempPathFactory) -> object:
    """A `commands.Here`: a folder with models, and two plans for one of them."""
    from commands import made_here

    return made_here(tmp_path_factory.mktemp("here"))
