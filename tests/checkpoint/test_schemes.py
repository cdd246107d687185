"""The registry of quantization schemes."""

from __future__ import annotations

import subprocess
import sys

from btlm_jax.checkpoint.schemes import INT4, INT8, SCHEME_HELP, SCHEMES, padded_inputs


def test_every_scheme_has_a_name_of_its_own():
    assert set(SCHEMES.values()) == {INT8, *INT4.values()}
    assert {scheme.name for scheme in SCHEMES.values()} < set(SCHEMES)
    assert all(SCHEMES[scheme.name] is scheme for scheme in SCHEMES.values())
    assert SCHEME_HELP == "int8, int4 (in groups of 64), int4:32, int4:64, int4:128"


def test_int4_inputs_are_padded_to_whole_blocks():
    assert [padded_inputs(n) for n in (1, 128, 129, 256)] == [128, 128, 256, 256]
    for group, scheme in INT4.items():
        assert scheme.parts(171) == (("int4", 128, "uint8"), ("scales", 256 // group, "bfloat16"))
    assert INT8.parts(171) == (("int8", 171, "int8"), ("scales", 1, "float32"))


def test_schemes_are_imported_without_numpy():
    """The command line lists their names in `--help`."""
    code = "import sys, btlm_jax.checkpoint.schemes; sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
