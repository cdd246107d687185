"""`score` against full logits."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from scipy.special import log_softmax

from btlm_jax import BTLM, BTLMConfig, make_mesh, score
from btlm_jax.utils.compile_cache import count_compilations
from support import golden


@pytest.mark.parametrize("name", ["e_alibi_dynamic16", "f_learned_gelu_mup"])
def test_scores_are_the_log_softmax_of_the_original_logits(name):
    c = golden.load(name)
    logits = np.asarray(c["plain/logits_f64"], np.float64)
    ids = c["plain/input_ids"]
    got = score(c.model, c.params, ids)
    expected = np.take_along_axis(log_softmax(logits, -1)[:, :-1], ids[:, 1:, None], -1)[..., 0]
    assert np.isnan(got[:, 0]).all()
    np.testing.assert_allclose(got[:, 1:], expected, atol=1e-4)  # logits differ by up to 5e-5


def test_padding_and_length_do_not_matter(tiny):
    model, params = tiny
    ids = np.random.default_rng(0).integers(0, 512, (2, 150))  # several chunks
    unpadded = score(model, params, ids)
    assert np.isnan(unpadded).sum() == 2
    mask = np.ones((2, 150), int)
    mask[1, :50] = 0
    padded = score(model, params, ids, attention_mask=mask)
    assert np.isnan(padded[1, :51]).all()
    np.testing.assert_allclose(padded[0], unpadded[0], atol=2e-5)
    alone = score(model, params, ids[1:, 50:])
    np.testing.assert_allclose(padded[1, 51:], alone[0, 1:], atol=2e-5)


def test_one_program_per_bucket(tiny):
    model, params = tiny
    ids = np.ones((1, 64), int)
    score(model, params, ids[:, :57])
    with count_compilations() as compiled:
        score(model, params, ids[:, :64])
        score(model, params, ids[:, :60])
    assert compiled.count == 0


def test_a_mesh_gives_the_same_scores():
    model = BTLM(BTLMConfig.preset("tiny"))
    ids = np.random.default_rng(0).integers(0, 512, (3, 45))
    expected = score(model, model.init(jax.random.key(0)), ids)
    for axes in (dict(fsdp=4, tensor=2), dict(context=4, data=2)):
        params = model.init(jax.random.key(0), mesh=make_mesh(**axes))
        np.testing.assert_allclose(score(model, params, ids), expected, atol=2e-5)
