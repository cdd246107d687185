"""The decoding loop that is timed."""

from __future__ import annotations

import pytest

from btlm_jax.train.bench.decode_loop import DecodeLoop
from btlm_jax.train.bench.random_model import make_random_model


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("scheme", ["float32", "bfloat16", "int8", "int4"])
def test_decoding_copies_no_weights(scheme, batch_size):
    """In most formulations, XLA's CPU backend copies one matrix, or all of them.

    Some copies of every row's logits are left; the smallest kernel has D x D entries. int4 weights
    are unpacked to int8 and then to bf16, one matrix at a time.
    """
    model, params = make_random_model("btlm-450m", 2, scheme)
    config = model.config
    loop = DecodeLoop(model, params, batch_size=batch_size, context=16, steps=1, rounds=1)
    logits = 8 * batch_size * config.vocab_size * 4
    unpacked = 4 * config.n_inner * config.n_embd if scheme == "int4" else 0
    assert loop.temporary_bytes < logits + unpacked + config.n_embd**2 / 2
