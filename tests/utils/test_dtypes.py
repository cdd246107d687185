"""Arguments that are dtypes: every one refuses what it cannot be, with its name."""

from __future__ import annotations

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import btlm_jax as btlm
from btlm_jax import cli
from btlm_jax.checkpoint.quantization import Quantization
from btlm_jax.convert import load_hf
from btlm_jax.convert.auto import load_any_checkpoint
from btlm_jax.evaluation import checkpoint_loading
from btlm_jax.evaluation.checkpoint_by_position import checkpoint_loss_by_position
from btlm_jax.evaluation.checkpoint_harness import checkpoint_harness
from btlm_jax.evaluation.checkpoint_perplexity import checkpoint_perplexity
from btlm_jax.evaluation.checkpoint_retrieval import checkpoint_retrieval
from btlm_jax.generation.continuous_batching import generate_batch
from btlm_jax.generation.prompt_cache import PromptCache
from btlm_jax.model import mup
from btlm_jax.model.params import init_params
from btlm_jax.train import recipe_file
from btlm_jax.train.aot.lowering import lower_decode_step
from btlm_jax.train.bench import attention_bench, generation_bench, loss_bench, step_bench
from btlm_jax.utils.dtypes import checked_dtype, optional_dtype
from support import golden

IDS = np.array([[5, 6, 7]])


@pytest.mark.parametrize(
    "value",
    ["bfloat16", jnp.bfloat16, jnp.dtype("bfloat16"), jnp.zeros(1, jnp.bfloat16).dtype],
    ids=str,
)
def test_names_dtypes_and_scalar_types_are_the_same(value):
    assert checked_dtype(value, "dtype") == optional_dtype(value, "dtype") == jnp.bfloat16
    assert optional_dtype(None, "dtype") is None
    assert checked_dtype(">f4", "dtype").byteorder == "="


class _TorchType:
    def __repr__(self):
        return "torch.bfloat16"


@pytest.mark.parametrize(
    "value, found",
    [
        ("flaot32", "found 'flaot32', .*did you mean 'float32'"),
        ("bf16", "found 'bf16', .*did you mean 'bfloat16'"),
        (_TorchType(), "found torch.bfloat16, .*did you mean 'bfloat16'"),
        (float, "found float64, expected float32, bfloat16 or float16$"),
        ("float64", "found 'float64', expected float32, bfloat16 or float16$"),
        (jnp.float8_e4m3fn, "found float8_e4m3fn,"),
        (np.complex64, "found complex64,"),
        (bool, "found bool,"),
        (None, "found None,"),
        ({"a": 1}, "found {'a': 1},"),
        ("x" * 500, "found 'x{79},"),
    ],
    ids=lambda x: str(x)[:20],
)
def test_others_are_refused_with_what_was_found(value, found):
    with pytest.raises(ValueError, match=f"^some_dtype: {found}"):
        checked_dtype(value, "some_dtype")


def _evaluate(function, checkpoint, dtype):
    """Calls an evaluation with None for whatever else it requires: the dtype is checked first."""
    required = [
        name
        for name, p in inspect.signature(function).parameters.items()
        if p.default is p.empty and name not in ("path", "dtype")
    ]
    return function(path=checkpoint, dtype=dtype, **dict.fromkeys(required))


ARGUMENTS = {
    "BTLM": ("compute_dtype", lambda d, m, p, c: btlm.BTLM(m.config, compute_dtype=d)),
    "BTLM.init": ("dtype", lambda d, m, p, c: m.init(jax.random.key(0), dtype=d)),
    "init_params": ("dtype", lambda d, m, p, c: init_params(jax.random.key(0), m.config, d)),
    "load": ("dtype", lambda d, m, p, c: btlm.load(c, dtype=d)),
    "load unstacked": ("dtype", lambda d, m, p, c: btlm.load(c, dtype=d, unstacked=True)),
    "load_hf": ("dtype", lambda d, m, p, c: load_hf(golden.GOLDEN / "btlm_bin/single", dtype=d)),
    "load any": ("dtype", lambda d, m, p, c: load_any_checkpoint(c, dtype=d)),
    "pipeline": ("dtype", lambda d, m, p, c: btlm.pipeline(c, dtype=d)),
    "evaluation": ("dtype", lambda d, m, p, c: checkpoint_loading.load_for_evaluation(c, d, None)),
    "perplexity": ("dtype", lambda d, m, p, c: _evaluate(checkpoint_perplexity, c, d)),
    "by position": ("dtype", lambda d, m, p, c: _evaluate(checkpoint_loss_by_position, c, d)),
    "retrieval": ("dtype", lambda d, m, p, c: _evaluate(checkpoint_retrieval, c, d)),
    "harness": ("dtype", lambda d, m, p, c: _evaluate(checkpoint_harness, c, d)),
    "adamw": ("mu_dtype", lambda d, m, p, c: mup.adamw(0.1, m.config, mu_dtype=d)),
    "lion": ("mu_dtype", lambda d, m, p, c: mup.lion(0.1, m.config, mu_dtype=d)),
    "muon": ("mu_dtype", lambda d, m, p, c: mup.muon(0.1, m.config, mu_dtype=d)),
    "bench attention": ("dtype", lambda d, m, p, c: attention_bench.bench_attention(dtype=d)),
    "bench loss": ("dtype", lambda d, m, p, c: loss_bench.bench_loss(dtype=d)),
    "bench step": ("dtype", lambda d, m, p, c: step_bench.bench_train(dtype=d)),
}
CACHES = {
    "init_cache": ("dtype", lambda d, m, p, c: m.init_cache(p, 1, 8, dtype=d)),
    "generate": ("cache_dtype", lambda d, m, p, c: btlm.generate(m, p, IDS, cache_dtype=d)),
    "batch": ("cache_dtype", lambda d, m, p, c: generate_batch(m, p, [IDS[0]], cache_dtype=d)),
    "prompts": ("cache_dtype", lambda d, m, p, c: PromptCache.of(m, p, IDS, cache_dtype=d)),
    "compile": ("cache_dtype", lambda d, m, p, c: lower_decode_step(None, None, 1, 8, None, d)),
    "bench": ("cache_dtype", lambda d, m, p, c: generation_bench.bench_decode(cache_dtype=d)),
}


@pytest.mark.parametrize("value", ["uint8", np.complex64, "flaot32"], ids=str)
@pytest.mark.parametrize("name", [*ARGUMENTS, *CACHES])
def test_every_argument_refuses_dtypes_that_destroy_values(name, value, tiny, bytes_checkpoint):
    argument, call = (ARGUMENTS | CACHES)[name]
    with pytest.raises(ValueError, match=f"^{argument}: found .*expected .*bfloat16"):
        call(value, *tiny, bytes_checkpoint)


@pytest.mark.parametrize("value", ["int8", jnp.int8], ids=str)
@pytest.mark.parametrize("name", ARGUMENTS)
def test_only_caches_can_be_integers(name, value, tiny, bytes_checkpoint):
    argument, call = ARGUMENTS[name]
    with pytest.raises(ValueError, match=f"^{argument}: found '?int8'?, expected "):
        call(value, *tiny, bytes_checkpoint)


def test_a_cache_may_be_int8_in_every_form(tiny):
    model, params = tiny
    for value in ("int8", np.int8, jnp.dtype("int8")):
        assert model.init_cache(params, 1, 8, dtype=value).dtype == jnp.int8


def test_weights_that_cannot_be_stored_are_refused_by_name(tiny, tmp_path):
    model, params = tiny
    for dtype in ("float8_e4m3fn", "int8", "bool"):
        cast = params | {"wte": params["wte"].astype(dtype)}
        with pytest.raises(ValueError, match=f"wte: found (dtype )?{dtype}, expected "):
            btlm.save(tmp_path / "c", model.config, cast)


def test_options_and_recipes_refuse_other_dtypes_with_what_they_accept(capsys, tmp_path):
    for argv in (
        ["generate", "c", "--prompt", "a", "--dtype", "int8"],
        ["generate", "c", "--prompt", "a", "--cache-dtype", "uint8"],
        ["eval", "perplexity", "c", "--text", "t", "--dtype", "float16"],
        ["eval", "loss-by-position", "c", "--text", "t", "--dtype", "float16"],
        ["eval", "retrieval", "c", "--dtype", "float16"],
        ["eval", "harness", "c", "--tasks", "t", "--dtype", "float16"],
        ["compile", "r", "--decode", "--cache-dtype", "uint8"],
        ["convert", "a", "b", "--quantize", "int8", "--quantize-embedding", "int4"],
        ["bench", "loss", "--dtype", "int8"],
    ):
        with pytest.raises(SystemExit):
            cli.main(argv)
        said = capsys.readouterr().err
        assert argv[-2] in said and argv[-1] in said, (argv, said)
    with pytest.raises(ValueError, match="embedding: found 'int4', expected int8 or bfloat16"):
        Quantization.parse("int8", "int4")
    recipe = tmp_path / "r.toml"
    recipe.write_text('[model]\npreset = "tiny"\n[run]\ncompute_dtype = "int8"\n')
    with pytest.raises(ValueError, match=r"compute_dtype: found 'int8', expected .*bfloat16"):
        recipe_file.load_recipe(recipe)
