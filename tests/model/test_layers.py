"""The model as a Flax Linen module: what a Flax user expects of it agrees with `BTLM`."""

from __future__ import annotations

import dataclasses

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from btlm_jax import BTLM, BTLMConfig, make_mesh
from btlm_jax.model import weights
from btlm_jax.model.layers import Transformer
from btlm_jax.model.params import flatten_tree
from btlm_jax.model.runtime import Runtime

KEY = jax.random.key(0)
INPUTS = {"input_ids": np.arange(6, dtype=np.int32).reshape(1, 6)}
TINY = BTLMConfig.preset("tiny")
UNTIED_AND_LEARNED = BTLMConfig(
    vocab_size=50, n_positions=8, n_embd=16, n_layer=3, n_head=2, activation_function="gelu_new",
    tie_word_embeddings=False, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
)  # fmt: skip


def bound(model: BTLM) -> Runtime:
    """Binds a model to the shapes of its weights."""
    return model.runtime(jax.eval_shape(model.init, KEY))


def shapes_and_dtypes(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype.name), tree)


@pytest.mark.parametrize("config", [TINY, UNTIED_AND_LEARNED], ids=["alibi", "learned, untied"])
def test_the_module_declares_the_tree_of_the_model(config):
    """Names, shapes and dtypes, and only trainable weights."""
    model = BTLM(config)
    abstract = jax.eval_shape(Transformer(bound(model)).init, KEY, INPUTS)
    assert abstract.keys() == {"params"}
    expected = shapes_and_dtypes(jax.eval_shape(model.init, KEY))
    assert shapes_and_dtypes(abstract["params"]) == expected


def test_the_module_draws_from_the_distributions_of_the_table(tiny):
    """The values differ from those of `BTLM.init`: Flax derives a key for every layer itself."""
    model, params = tiny
    module = Transformer(bound(model))
    drawn = flatten_tree(module.init(KEY, INPUTS)["params"])
    for w in weights.weight_table(model.config):
        x = np.asarray(drawn[w.path], np.float64)
        if w.std == 0:
            np.testing.assert_array_equal(x, flatten_tree(params)[w.path])
        else:  # 5 sigma of the sample statistics of a normal
            assert abs(x.mean() - w.mean) < 5 * w.std / np.sqrt(x.size)
            assert abs(x.std() / w.std - 1) < 5 / np.sqrt(2 * x.size)
    kernel = drawn["blocks", "mlp", "c_fc", "kernel"]
    assert abs(np.corrcoef(kernel[0].ravel(), kernel[1].ravel())[0, 1]) < 0.05  # layers differ


def test_the_module_computes_the_hidden_states_of_the_model(tiny):
    """`apply` takes the weights of `BTLM.init`, and captures activations if it is asked to."""
    model, params = tiny
    module = Transformer(bound(model))

    @jax.jit
    def apply(params):
        return module.apply({"params": params}, INPUTS, mutable=["intermediates"])

    (h, cache), state = apply(params)
    assert cache is None
    np.testing.assert_allclose(h, model.hidden(params, INPUTS["input_ids"])[0], atol=1e-6)
    captured = state["intermediates"]["blocks"]
    assert captured["attn"]["attentions"].shape == (2, 1, 4, 6, 6)


def test_the_module_refuses_weights_of_another_shape(tiny):
    model, params = tiny
    module = Transformer(bound(model))
    wrong = params | {"ln_f": params["ln_f"] | {"bias": jnp.zeros(63)}}
    expected = r'"bias" in "/ln_f".* expected to generate shape \(64,\), .* has shape \(63,\)'
    with pytest.raises(flax.errors.ScopeParamShapeError, match=expected):
        jax.eval_shape(module.apply, {"params": wrong}, INPUTS)


def test_the_module_refuses_a_cache_with_stacked_weights(tiny):
    model, params = tiny
    cache = model.init_cache(params, 1, 8)
    with pytest.raises(ValueError, match="cache: found stacked weights, expected unstacked ones"):
        jax.eval_shape(Transformer(bound(model)).apply, {"params": params}, INPUTS, cache)


def test_tabulate_counts_the_parameters_of_the_table():
    model = BTLM(TINY)
    table = nn.tabulate(Transformer(bound(model)), KEY, console_kwargs={"width": 200})(INPUTS)
    assert f"Total Parameters: {weights.count_parameters(TINY):,}" in table
    for path in ("blocks/attn/c_attn", "blocks/mlp/c_proj", "ln_f"):
        assert path in table


def test_a_module_may_contain_the_model():
    """The table is looked up by name, not by where the module stands in a larger one."""
    model = BTLM(dataclasses.replace(TINY, n_layer=1))
    runtime = bound(model)

    class Reward(nn.Module):
        @nn.compact
        def __call__(self, inputs):
            h, _ = Transformer(runtime, name="body")(inputs)
            return nn.Dense(1, name="reward")(h[:, -1])

    abstract = jax.eval_shape(Reward().init, KEY, INPUTS)["params"]
    expected = shapes_and_dtypes(jax.eval_shape(model.init, KEY))
    assert shapes_and_dtypes(abstract["body"]) == expected


def test_on_a_mesh_the_module_is_padded_and_sharded_like_the_model():
    model, mesh = BTLM(dataclasses.replace(TINY, n_inner=171)), make_mesh(fsdp=2, tensor=4)
    params = model.init(KEY, mesh=mesh)
    module = Transformer(model.runtime(params))
    inputs = {"input_ids": np.zeros((2, 6), np.int32)}
    with jax.set_mesh(mesh):
        abstract = jax.eval_shape(module.init, KEY, inputs)["params"]
    assert flatten_tree(abstract)["blocks", "mlp", "c_fc", "kernel"].shape == (2, 64, 172)
    for path, x in flatten_tree(abstract).items():
        expected = flatten_tree(params)[path]
        assert (x.shape, x.sharding.spec) == (expected.shape, expected.sharding.spec), path
