"""The tensors of an opened checkpoint: tied ones, mask buffers, and sizes of the embedding."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from btlm_jax.convert.hf.safetensors_writer import TensorSpec
from btlm_jax.convert.hf.source_config import open_model
from btlm_jax.convert.hf.tensor_names import EMBEDDING, LM_HEAD
from btlm_jax.train.bench.random_checkpoint import write_bin
from support import golden

TIED, UNTIED = golden.load("g_bf16"), golden.load("i_untied")


def write_weights(path, tensors, *, suffix, shards=1, aliases=None):
    """Writes tensors in files as safetensors or torch write them, beside an existing config."""
    stem = "pytorch_model" if suffix == ".bin" else "model"
    weight_map, names = {}, list(tensors)
    for i in range(shards):
        shard = names[i::shards]
        number = f"-{i + 1:05d}-of-{shards:05d}" if shards > 1 else ""
        file = f"{stem}{number}{suffix}"
        weight_map |= dict.fromkeys(shard, file)
        if suffix == ".bin":
            specs = [TensorSpec(n, tensors[n].dtype, tensors[n].shape) for n in shard]
            write_bin(path / file, specs, lambda t: [tensors[t.name].reshape(-1)], tied=False)
        else:
            metadata = {"format": "pt"} | (aliases or {})
            save_file({n: tensors[n] for n in shard}, path / file, metadata=metadata)
    if shards > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (path / f"{stem}{suffix}.index.json").write_text(json.dumps(index))
    return path


def directory(path, case, **config):
    path.mkdir()
    (path / "config.json").write_text(json.dumps(case.hf_config | config))
    return path


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("shards", [1, 3])
def test_a_tied_model_may_hold_either_tensor_with_any_prefix_and_masks(suffix, shards, tmp_path):
    weights, count = TIED.weights, itertools.count()
    embedding = weights[EMBEDDING]
    for held, prefixed, masks in itertools.product(
        ((EMBEDDING,), (LM_HEAD,), (EMBEDDING, LM_HEAD)), (True, False), (True, False)
    ):
        tensors = {n: x for n, x in weights.items() if n not in (EMBEDDING, LM_HEAD)}
        tensors |= {name: embedding.copy() for name in held}
        if masks:
            tensors["transformer.h.0.attn.bias"] = np.ones((1, 1, 8, 8), np.float32)
            tensors["transformer.h.1.attn.masked_bias"] = np.array(-1e4, np.float32)
        if not prefixed:
            tensors = {n.removeprefix("transformer."): x for n, x in tensors.items()}
        other = EMBEDDING if held == (LM_HEAD,) else LM_HEAD
        short = "" if prefixed else "transformer."
        alias = {other.removeprefix(short): held[0].removeprefix(short)}
        for aliases in (None, alias) if suffix == ".safetensors" and len(held) == 1 else (None,):
            path = directory(tmp_path / str(next(count)), TIED)
            write_weights(path, tensors, suffix=suffix, shards=shards, aliases=aliases)
            hf, config = open_model(path)
            assert config.tie_word_embeddings
            read = hf.read_tensor(EMBEDDING)
            assert read.dtype == embedding.dtype and read.tobytes() == embedding.tobytes()


@pytest.mark.parametrize("held", [EMBEDDING, LM_HEAD])
def test_an_alias_gives_both_tensors_to_a_model_whose_configuration_calls_it_untied(held, tmp_path):
    weights = UNTIED.weights
    other = LM_HEAD if held == EMBEDDING else EMBEDDING
    del weights[other]
    path = directory(tmp_path / "a", UNTIED)
    write_weights(path, weights, suffix=".safetensors", aliases={other: held})
    hf, config = open_model(path)
    assert not config.tie_word_embeddings
    assert hf.read_tensor(other).tobytes() == hf.read_tensor(held).tobytes()
    # Without the alias, nothing says that they were one.
    write_weights(path, weights, suffix=".safetensors")
    with pytest.raises(ValueError, match=f"missing: {other}"):
        open_model(path)


@pytest.mark.parametrize("change", [7, -7])
@pytest.mark.parametrize("case", [TIED, UNTIED], ids=["tied", "untied"])
def test_an_embedding_of_another_size_than_vocab_size_says_what_to_set(case, change, tmp_path):
    size = case.config.vocab_size
    path = directory(tmp_path / "a", case, vocab_size=size + change, eos_token_id=0,
                     bos_token_id=0, pad_token_id=0)  # fmt: skip
    write_weights(path, case.weights, suffix=".safetensors")
    said = (
        rf"wte\.weight: found shape \({size}, .*expected \({size + change}, [\s\S]*"
        rf"set vocab_size to {size} in config\.json[\s\S]*resize_token_embeddings"
    )
    with pytest.raises(ValueError, match=said):
        open_model(path)
    fixed = directory(tmp_path / "b", case)
    write_weights(fixed, case.weights, suffix=".safetensors")
    assert open_model(fixed)[1].vocab_size == size


def test_a_size_that_config_json_lacks_is_named_beside_the_mismatch(tmp_path):
    path = directory(tmp_path / "hf", TIED, n_layer=None, num_hidden_layers=None)
    tensors = dict(TIED.weights)
    tensors |= {f"transformer.extra.{i}": np.zeros(1, np.float32) for i in range(40)}
    write_weights(path, tensors, suffix=".safetensors")
    with pytest.raises(ValueError, match=r"config\.json has no n_layer, so that of BTLM-3B"):
        open_model(path)


def test_bits_of_bfloat16_in_integers_are_not_to_be_cast(tmp_path):
    path = directory(tmp_path / "hf", TIED)
    tensors = {name: x.view(np.uint16) for name, x in TIED.weights.items()}
    write_weights(path, tensors, suffix=".safetensors")
    with pytest.raises(ValueError, match=r"a cast would destroy them") as error:
        open_model(path)
    assert "cast or dequantize" not in str(error.value)
