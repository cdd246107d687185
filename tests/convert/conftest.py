"""Fixtures of the conversion tests: uninterrupted conversions, and one model in every format."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from btlm_jax import cli
from support import checkpoint_forms, conversion_runs


@pytest.fixture(scope="session")
def conversions(tmp_path_factory) -> conversion_runs.Conversions:
    """Two sources, and their checkpoints and exports from uninterrupted runs."""
    return conversion_runs.make_conversions(tmp_path_factory.mktemp("conversions"))


@pytest.fixture(scope="session")
def forms(tmp_path_factory) -> dict[str, Path]:
    """The same weights in every format, from the .bin files that torch wrote."""
    return checkpoint_forms.make_forms(tmp_path_factory.mktemp("forms"))


@pytest.fixture
def run_verify(capsys):
    """Runs `btlm verify`; returns exit code, standard output and standard error."""
    package = logging.getLogger("btlm_jax")
    settings = package.handlers, package.propagate, package.level

    def call(*argv):
        try:
            code = cli.main(["verify", *map(str, argv)])
        except SystemExit as e:  # from the argument parser
            code = e.code
        out = capsys.readouterr()
        assert "Traceback" not in out.out + out.err
        return code, out.out, out.err

    yield call
    package.handlers, package.propagate, package.level = settings


@pytest.fixture
def package_log(caplog):
    """The log of this package, from INFO on, even if a test of the command line redirected it."""
    package = logging.getLogger("btlm_jax")
    propagate = package.propagate
    package.propagate = True
    with caplog.at_level("INFO", "btlm_jax"):
        yield caplog
    package.propagate = propagate
