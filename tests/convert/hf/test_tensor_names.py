"""Names that wrappers of a model have changed are restored, or refused with the reason."""

from __future__ import annotations

import pytest

from btlm_jax.convert.hf.tensor_names import model_names

NAMES = ["transformer.wte.weight", "transformer.h.0.ln_1.weight", "transformer.ln_f.bias"]


@pytest.mark.parametrize(
    "prefix",
    [
        "_orig_mod.",
        "module.",
        "model.",
        "base_model.model.",
        "module._orig_mod.",
        "_forward_module.",
    ],
)
def test_a_prefix_that_all_names_carry_is_removed_with_a_notice(prefix):
    names, notice = model_names([prefix + n for n in NAMES])
    assert list(names.values()) == NAMES
    assert notice.startswith("read without")


def test_segments_inside_names_and_missing_roots_are_restored():
    inside = "transformer.h.0._fsdp_wrapped_module._checkpoint_wrapped_module.ln_1.weight"
    assert model_names([inside]).names == {inside: NAMES[1]}
    base = [n.removeprefix("transformer.") for n in NAMES]
    assert list(model_names(base).names.values()) == NAMES
    assert model_names(NAMES).notice == ""


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["module." + NAMES[0], NAMES[1]], "different prefixes: 'module.' on 1, none on 1"),
        (["_orig_mod." + NAMES[0], NAMES[0]], "two tensors"),
        ([NAMES[0], "transformer.h.0.attn.c_attn.lora_A.weight"], "unmerged adapter"),
        ([NAMES[0], "transformer.h.0.attn.c_attn.qweight"], "quantized weights"),
    ],
)
def test_other_names_are_refused(names, message):
    with pytest.raises(ValueError, match=message):
        model_names(names)
