"""Fixtures that several folders of tests use: golden cases, small models and checkpoints."""

from __future__ import annotations

import pytest

from support import golden


@pytest.fixture(params=golden.NAMES)
def case(request) -> golden.Case:
    """Each golden case in turn."""
    return golden.load(request.param)


@pytest.fixture(scope="session")
def tiny():
    """The tiny preset and fresh weights, on one device."""
    import jax

    from btlm_jax import BTLM, BTLMConfig

    model = BTLM(BTLMConfig.preset("tiny"))
    return model, model.init(jax.random.key(0))


@pytest.fixture
def checkpoint_dir(tmp_path):
    """A small checkpoint with a tokenizer, as the converter makes it."""
    from btlm_jax.convert import convert

    source = golden.write_hf(tmp_path / "hf", golden.load("a2_btlm_mup_h32"), tokenizer=True)
    convert(source, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.fixture(scope="session")
def of_bytes():
    """A model of one layer whose tokens are bytes, 256 the EOS: (model, weights, tokenizer).

    Large weights: what it says varies, and text of random bytes has parts of characters.
    """
    import dataclasses

    import jax
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    from btlm_jax import BTLM, BTLMConfig

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    sizes = dict(n_layer=1, vocab_size=258, eos_token_id=256, bos_token_id=256)
    model = BTLM(dataclasses.replace(BTLMConfig.preset("tiny"), **sizes))
    params = jax.tree.map(lambda x: 4 * x, model.init(jax.random.key(0)))
    return model, params, tokenizer


@pytest.fixture(scope="session")
def bytes_checkpoint(of_bytes, tmp_path_factory):
    """The same as a checkpoint."""
    from btlm_jax import save

    model, params, tokenizer = of_bytes
    home = tmp_path_factory.mktemp("bytes")
    tokenizer.save(str(home / "tokenizer.json"))
    save(home / "checkpoint", model.config, params, assets=[home / "tokenizer.json"])
    return home / "checkpoint"
