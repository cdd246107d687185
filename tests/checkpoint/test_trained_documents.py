"""How a training run reads documents, as its checkpoints record it for evaluations."""

from __future__ import annotations

import pytest

from btlm_jax.checkpoint import trained_documents


@pytest.mark.parametrize(
    "origin, measured, expected",
    [
        ({}, "separate", "how it was trained is not recorded"),
        (trained_documents.describe(True, 7), "separate", "as trained"),
        (trained_documents.describe(True, 7), "joined", "trained separate"),
        (trained_documents.describe(False, 7), "joined", "as trained"),
        # Older versions recorded only the recipe.
        ({"recipe": {"data": {"mask_documents": False}}}, "separate", "trained joined"),
        (
            {"recipe": {"data": {"mask_documents": True}}},
            "separate",
            "as trained, by a version that did not train the first token of a document",
        ),
    ],
)
def test_reports_say_how_documents_are_measured_beside_how_they_were_trained(
    origin, measured, expected
):
    record = trained_documents.read_trained_documents(origin)
    assert record.describe(measured) == f"documents: {measured} ({expected})"


def test_the_record_names_the_token_between_documents():
    record = trained_documents.read_trained_documents(trained_documents.describe(True, 7))
    assert record == ("separate", 7, True)
