"""Environment, hypothesis profiles and scheduling of the tests; fixtures: support/fixtures.py."""

from __future__ import annotations

import logging
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


# Files that take minutes start first, so that no worker is left with one at the end.
_LONG_FILES = (
    "generation/test_generate.py",
    "train/test_processes.py",
    "train/test_loop.py",
    "test_notebooks.py",
    "mup_study/test_transfer.py",
    "train/aot/test_compile.py",
    "generation/test_continuous_batching.py",
    "model/test_btlm_original.py",
    "mup_study/test_coord_check.py",
    "train/demo/test_quickstart.py",
    "model/test_mup.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sorts files that take long to the front and keeps the order of all others."""
    names = {item.path: item.path.as_posix() for item in items}

    def rank(item: pytest.Item) -> int:
        matches = [i for i, end in enumerate(_LONG_FILES) if names[item.path].endswith(end)]
        return matches[0] if matches else len(_LONG_FILES)

    items.sort(key=rank)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Gives a worker whole files: tests of one file share compiled programs and fixtures."""
    from xdist.scheduler import LoadFileScheduling

    config.option.loadscopereorder = False
    return LoadFileScheduling(config, log)


@pytest.fixture(autouse=True)
def _restore_logging():
    """Undoes what a command does to the package's logger, whose records `caplog` would miss.

    A fixture of a wider scope may have run one before this.
    """
    package = logging.getLogger("btlm_jax")
    settings = package.handlers, package.level
    package.propagate = True
    yield
    package.handlers, package.level = settings


@pytest.fixture(autouse=True, scope="module")
def _forget_programs():
    """Frees compiled programs after every file.

    Each takes some hundred memory mappings, of which Linux gives a process 65,530; XLA crashes
    when they run out.
    """
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
