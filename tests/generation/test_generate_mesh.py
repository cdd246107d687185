"""`generate` on meshes gives the tokens of one device."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from btlm_jax import BTLM, BTLMConfig, generate, make_mesh
from btlm_jax.model import sharding, weights
from btlm_jax.model.params import flatten_tree, unflatten_tree
from support import golden
from support.generation_rules import BEAMS


@pytest.fixture(scope="module")
def sharded_case():
    """i_untied on a mesh: its vocabulary of 97 is padded to 98, a batch of 3 to 4."""
    case = golden.load("i_untied")
    mesh, model = make_mesh(fsdp=4, tensor=2), case.model
    pad = sharding.param_padding(model.config, mesh)
    shardings = flatten_tree(sharding.param_shardings(model.config, mesh, pad=pad))
    sharded = {}
    for w in weights.weight_table(model.config):
        x = np.asarray(flatten_tree(case.params)[w.path])
        target = weights.stacked_shape(w, model.config, pad)
        x = np.pad(x, [(0, n - m) for m, n in zip(x.shape, target, strict=True)])
        sharded[w.path] = jax.device_put(x, shardings[w.path])
    return case, unflatten_tree(sharded)


@pytest.mark.parametrize("options", [{}, BEAMS], ids=["greedy", "beams"])
def test_a_mesh_gives_the_same_tokens(sharded_case, options):
    case, sharded = sharded_case
    output = generate(
        case.model,
        sharded,
        case["gen/prompt_batch"],
        attention_mask=case["gen/prompt_batch_mask"],
        eos_token_id=int(case["gen/eos_used"]),
        **dict(pad_token_id=96) | options,
    )
    name = "beam5_ngram2_batch_eos" if options else "greedy_batch_eos"
    np.testing.assert_array_equal(
        output.sequences if options else output, case[f"gen/{name}/sequences"]
    )


def test_padding_rows_do_not_prolong_a_batch():
    model = BTLM(BTLMConfig.preset("tiny"))
    options = dict(max_new_tokens=30, do_sample=True, temperature=3.0, eos_token_id=list(range(40)))
    off, on = (model.init(jax.random.key(0), mesh=m) for m in (None, make_mesh(fsdp=8)))
    for seed in range(4):
        alone = generate(model, off, np.array([[5, 6]]), seed=seed, **options)
        np.testing.assert_array_equal(
            generate(model, on, np.array([[5, 6]]), seed=seed, **options), alone
        )


def test_several_rows_of_a_prompt_on_a_mesh_with_a_context_axis():
    """Decoding does not use the context axis."""
    model, ids = BTLM(BTLMConfig.preset("tiny")), np.array([[5, 6, 7], [8, 9, 10], [1, 2, 3]])
    mesh = make_mesh(context=2, data=2, tensor=2)
    off, on = (model.init(jax.random.key(0), mesh=m) for m in (None, mesh))
    options = dict(max_new_tokens=6, do_sample=True, num_return_sequences=3, eos_token_id=None)
    np.testing.assert_array_equal(
        generate(model, on, ids, **options), generate(model, off, ids, **options)
    )
