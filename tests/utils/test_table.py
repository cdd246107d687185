"""Tables to print."""

from __future__ import annotations

import pytest

from btlm_jax.utils.table import aligned


def test_aligned():
    assert aligned([("", "n"), ("long name", "1"), ("b", "1,000")]) == [
        "               n",
        "long name      1",
        "b          1,000",
    ]
    with pytest.raises(ValueError):
        aligned([("a", "b"), ("c",)])
