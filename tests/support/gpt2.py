"""A tiny GPT-2 and random generation cases, to compare `generate` with transformers.

A BTLM with learned positions, gelu_new and muP off is a GPT-2, which transformers implements.
`golden/generate_gpt2.json` holds the answers of transformers 5.23; generation/test_transformers.py,
run as a program where transformers is installed, records them again.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from random import Random

import jax.numpy as jnp
import numpy as np

from btlm_jax import BTLM, BTLMConfig, generate
from btlm_jax.model import weights
from btlm_jax.model.params import unflatten_tree

RECORDED = Path(__file__).parents[1] / "golden" / "generate_gpt2.json"
VOCAB = 23
SIZES = dict(vocab_size=VOCAB, n_positions=64, n_embd=16, n_layer=2, n_head=2)
DROPOUT = dict(attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
TOKENS = dict(bos_token_id=None, eos_token_id=None, pad_token_id=None)


@functools.cache
def ours():
    """Returns a model and weights whose logits are far apart and depend on all tokens."""
    config = BTLMConfig.from_hf(
        {"model_type": "btlm", "position_embedding_type": "learned",
         "activation_function": "gelu_new", **SIZES, **DROPOUT, **TOKENS}
    )  # fmt: skip
    rng = np.random.RandomState(0)  # its random stream never changes between NumPy versions
    flat = {
        w.path: jnp.asarray(rng.normal(0, 0.35, weights.stacked_shape(w, config, {})), jnp.float32)
        for w in weights.weight_table(config)
    }
    return BTLM(config, compute_dtype=jnp.float32), unflatten_tree(flat)


def answer(case: dict):
    """Returns our `GenerateOutput` for a case."""
    arguments = dict(return_dict_in_generate=True, output_scores=True, output_logits=True)
    mask = np.array(case["mask"])
    return generate(
        *ours(), np.array(case["ids"]), attention_mask=mask, **case["options"], **arguments
    )


def recorded() -> list[dict]:
    """Returns the cases with transformers' answers."""
    return json.loads(RECORDED.read_text())


def random_case(seed: int, beams: bool) -> dict:
    """Returns prompts, their mask, and options of `generate`."""
    r = Random(seed)
    rng = np.random.default_rng(seed)
    rows, T = r.choice([1, 2, 3]), r.choice([1, 2, 5, 9])
    ids = rng.integers(1, VOCAB, (rows, T))
    pad = r.choice([0, 3])
    mask = np.ones((rows, T), int)
    for row in range(1, rows):
        mask[row, : r.randrange(T)] = 0
    ids[mask == 0] = pad
    eos = r.choice([None, 5, [5, 7], [2, 11, 13]])

    def distinct_ids(n):
        return r.sample(range(VOCAB), n)

    possible = {
        "repetition_penalty": r.choice([0.7, 1.3, 2.0]),
        "no_repeat_ngram_size": r.choice([1, 2, 3]),
        "bad_words_ids": [distinct_ids(r.choice([1, 2, 3])) for _ in range(4)],
        "sequence_bias": [
            [distinct_ids(r.choice([1, 2])), r.choice([-4.0, 3.0])] for _ in range(4)
        ],
        "min_new_tokens": r.choice([3, 7]),
        "min_length": r.choice([4, 12]),
        "max_length": T + r.choice([1, 5, 9]),
        "forced_bos_token_id": 4,
        "forced_eos_token_id": r.choice([6, [6, 9]]),
        "suppress_tokens": distinct_ids(3),
        "begin_suppress_tokens": distinct_ids(6),
        "renormalize_logits": True,
        "exponential_decay_length_penalty": (2, 1.5),
    }
    if eos is None:
        del possible["exponential_decay_length_penalty"]
    chosen = {name: possible[name] for name in r.sample(sorted(possible), r.choice([1, 2, 4, 6]))}
    if "min_length" in chosen:  # transformers warns if both are given
        chosen.pop("min_new_tokens", None)
    if "max_length" in chosen:
        for name in ("min_length", "min_new_tokens"):
            chosen.pop(name, None)
    if {4, 6, 9} & set(chosen.get("suppress_tokens", ())):  # a forced token must not be suppressed
        del chosen["suppress_tokens"]
    if beams:
        # Several forced tokens are exact ties, which torch.topk orders arbitrarily.
        if isinstance(chosen.get("forced_eos_token_id"), list):
            chosen["forced_eos_token_id"] = 6
        chosen["num_beams"] = r.choice([2, 3, 5])
        chosen["num_return_sequences"] = r.randint(1, chosen["num_beams"])
        chosen["early_stopping"] = r.choice([True, False, "never"])
        chosen["length_penalty"] = r.choice([1.0, 1.0, 0.0, 2.0, 0.6, -1.0])
    chosen |= dict(eos_token_id=eos, pad_token_id=pad)
    if "max_length" not in chosen:
        chosen["max_new_tokens"] = 12
    return {"ids": ids.tolist(), "mask": mask.tolist(), "options": chosen}
