"""The split of a text: every document is always in the same part."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from btlm_jax.data.split import SplitPart, check_fraction

fractions = st.floats(0, 1, exclude_min=True, exclude_max=True)


def both_parts(fraction: float, one_document: bool) -> tuple[SplitPart, SplitPart]:
    """Returns the training part and the held-out part."""
    return tuple(SplitPart(fraction, held_out, one_document) for held_out in (False, True))


@given(text=st.text(min_size=1), fraction=fractions, larger=fractions)
def test_a_document_is_in_one_part(text, fraction, larger):
    train, held_out = (part.select(text) for part in both_parts(fraction, one_document=False))
    assert {train, held_out} == {text, ""}
    if larger >= fraction and held_out:  # a larger fraction holds out the same documents, and more
        assert SplitPart(larger, True, False).select(text) == text


@given(text=st.text(min_size=1), fraction=fractions)
def test_a_single_document_is_cut(text, fraction):
    train, held_out = (part.select(text) for part in both_parts(fraction, one_document=True))
    assert train + held_out == text
    assert abs(len(held_out) - fraction * len(text)) <= 0.5


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 0.9])
def test_the_fraction_of_documents_is_held_out(fraction):
    """Tolerates five standard deviations of a fair draw of 20,000."""
    n = 20_000
    held_out = sum(bool(SplitPart(fraction, True, False).select(f"document {i}")) for i in range(n))
    assert abs(held_out - n * fraction) < 5 * math.sqrt(n * fraction * (1 - fraction))


def test_the_choice_never_changes():
    """Another hash would move documents from the training text into the held-out text."""
    held_out = [i for i in range(100) if SplitPart(0.1, True, False).select(f"document {i}")]
    assert held_out == [40, 44, 59, 70, 81]


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 1.5, math.nan, math.inf])
def test_fractions_outside_of_zero_to_one_are_refused(fraction):
    with pytest.raises(ValueError, match=r"held_out: found .*, expected more than 0 and less than"):
        check_fraction(fraction)
