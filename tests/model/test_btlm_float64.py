"""The model against a float64 reference, on random configurations."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from btlm_jax import BTLM, BTLMConfig
from btlm_jax.config import Positions
from support import golden, reference_numpy
from support.golden import max_error, random_weights


@st.composite
def small_configs(draw):
    heads = draw(st.sampled_from([1, 2, 3, 4, 6, 12]))
    alibi = draw(st.booleans())
    scalings = [None, {"type": "linear", "factor": 2.5}, {"type": "linear", "train_seq_len": 7}]
    return {
        "vocab_size": draw(st.integers(5, 40)),
        "n_positions": 64,
        "n_embd": heads * draw(st.sampled_from([2, 5, 8])),
        "n_layer": draw(st.integers(1, 3)),
        "n_head": heads,
        "n_inner": draw(st.sampled_from([None, 7, 24])),
        "activation_function": draw(st.sampled_from(["swiglu", "gelu", "gelu_new"])),
        "position_embedding_type": "alibi" if alibi else "learned",
        "alibi_scaling": draw(st.sampled_from(scalings)) if alibi else None,
        "scale_attn_weights": draw(st.booleans()),
        "tie_word_embeddings": draw(st.booleans()),
        "mup_scale_qk_dot_by_d": draw(st.booleans()),
        "mup_width_scale": draw(st.sampled_from([1.0, 0.25])),
        "mup_embeddings_scale": draw(st.sampled_from([1.0, 10.0])),
        "mup_output_alpha": 2.0,
        "layer_norm_epsilon": 1e-5,
        "initializer_range": 0.1,
    }


COMPLETEP = [{}, {"completep_base_layers": 2}, dict(completep_base_layers=5, completep_alpha=0.75)]


@settings(max_examples=12)
@given(
    config=small_configs(),
    depth=st.sampled_from(COMPLETEP),
    seed=st.integers(0, 2**16),
    packed=st.booleans(),
)
def test_logits_equal_float64(config, depth, seed, packed):
    rng = np.random.default_rng(seed)
    c = dataclasses.replace(BTLMConfig.from_hf(config), **depth)
    params = random_weights(c, rng)
    ids = rng.integers(0, c.vocab_size, (2, 12))
    extra = {}
    if packed:
        extra["segment_ids"] = np.sort(rng.integers(1, 4, ids.shape), 1)
        if c.positions is not Positions.ALIBI:
            extra["positions"] = rng.integers(0, 64, ids.shape)
    named = golden.by_hf_name(c, params)
    theirs = {k.replace("positions", "position_ids"): v for k, v in extra.items()}
    expected = reference_numpy.forward(named, config | depth, ids, **theirs)["logits"]
    got = BTLM(c, compute_dtype=jnp.float32).apply(params, ids, **extra)
    # fp32 rounding grows with the logits; measured 8.5e-7 of the largest.
    assert max_error(got, expected) < 1e-5 * max(1.0, np.abs(expected).max())
