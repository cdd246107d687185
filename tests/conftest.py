"""Environment, hypothesis profiles and scheduling of the tests; fixtures: support/fixtures.py."""

from __future__ import annotations

import os
import sys

import pytest
from hypothesis import settings

from support import compiling

# Before JAX is imported for the first time, by the fixtures and the modules that are collected.
_OWN_CACHE = compiling.set_environment()
pytest_plugins = ["support.fixtures"]

# Compiling dwarfs everything else, so there is no deadline. The default examples are the same in
# every run, so that CI is repeatable; HYPOTHESIS_PROFILE=thorough draws fresh ones, and more.
settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=50)
settings.register_profile("thorough", deadline=None, max_examples=500)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


def pytest_unconfigure() -> None:
    compiling.remove_cache(_OWN_CACHE)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Gives a worker whole files: tests of one file share compiled programs and fixtures."""
    from xdist.scheduler import LoadFileScheduling

    return LoadFileScheduling(config, log)


@pytest.fixture(autouse=True, scope="module")
def _forget_programs():
    """Frees compiled programs after every file.

    Each takes some hundred memory mappings, of which Linux gives a process 65,530; XLA crashes
    when they run out.
    """
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
