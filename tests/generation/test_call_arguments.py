"""Defaults from `generation_config.json`: which apply, which arguments win, what is said."""

from __future__ import annotations

import dataclasses
import json
import types

import numpy as np
import pytest

from btlm_jax import generate, generate_batch, load, load_tokenizer, save, stream
from btlm_jax.generation.call_arguments import resolve_arguments, with_special_tokens_only
from btlm_jax.hf_generation_config import GenerationConfigFile
from btlm_jax.utils.notices import warn_once

SAMPLING = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 40.0}


@pytest.fixture(autouse=True)
def _fresh_notices():
    warn_once.cache_clear()


@pytest.fixture
def with_file(tiny):
    """A function that gives the tiny model (EOS 50256 is outside its vocabulary) a file."""

    def with_fields(fields):
        data = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
        file = GenerationConfigFile("ckpt/generation_config.json", data)
        return dataclasses.replace(tiny[0], generation_config=file)

    return with_fields


def resolved(model, **given):
    return resolve_arguments(model, given).arguments


def test_a_file_gives_defaults_and_arguments_win(with_file, caplog):
    model = with_file(SAMPLING | {"eos_token_id": [1, 2], "pad_token_id": 3, "stop_strings": ["x"]})
    plain = dict(eos_token_id=[1, 2], pad_token_id=3, stop_strings=["x"])
    sampled = dict(do_sample=True, temperature=0.7, top_p=0.9, top_k=40)
    assert resolved(model) == plain | sampled
    (record,) = caplog.records
    assert record.getMessage() == (
        "ckpt/generation_config.json: sets do_sample=True, temperature=0.7, top_p=0.9, top_k=40, "
        "eos_token_id=[1, 2], pad_token_id=3, stop_strings=['x'] (explicit values win)"
    )
    assert resolved(model, temperature=0.2, eos_token_id=5)["temperature"] == 0.2
    assert resolved(model, eos_token_id=None)["eos_token_id"] is None
    assert "stop_strings" not in resolved(model, stop_strings=())
    # Explicit greedy decoding leaves the rules of sampling aside, without a word.
    caplog.clear()
    assert resolved(model, do_sample=False) == plain | dict(do_sample=False)
    assert "does nothing" not in caplog.text
    assert resolved(with_special_tokens_only(model)) == dict(eos_token_id=[1, 2], pad_token_id=3)


def test_a_length_replaces_the_other_way_to_give_it(with_file):
    model = with_file({"max_length": 100, "min_new_tokens": 4})
    assert resolved(model) == dict(max_length=100, min_new_tokens=4)
    assert resolved(model, max_new_tokens=5, min_length=2) == dict(max_new_tokens=5, min_length=2)
    model = with_file({"max_new_tokens": 100})
    assert resolved(model, max_length=5) == dict(max_length=5)
    assert resolved(model, generation_config={"max_length": 7}) == dict(max_length=7)


def test_default_values_and_metadata_make_no_noise(with_file, caplog):
    config = with_file({}).config
    fields = {
        "_from_model_config": True, "transformers_version": "4.31.0", "bos_token_id": 0,
        "eos_token_id": config.eos_token_id, "do_sample": False, "temperature": 1.0, "top_k": 50,
        "num_beams": 1, "use_cache": True, "cache_implementation": "static", "num_beam_groups": 1,
        "guidance_scale": None, "min_length": 0, "diversity_penalty": 0.0, "pad_token_id": -1,
        "output_scores": False, "early_stopping": False, "length_penalty": 1.0,
    }  # fmt: skip
    fields["eos_token_id"] = -1  # none, as some tools write it
    arguments = resolved(with_file(fields))
    assert "eos_token_id" not in arguments and "pad_token_id" not in arguments
    assert not caplog.records


def test_fields_without_support_are_named(with_file, caplog):
    fields = {"top_h": 0.4, "force_words_ids": [[1]], "chat_format": "x", "eos_token_id": [7, 9999]}
    assert resolved(with_file(fields)) == dict(eos_token_id=[7])
    assert caplog.messages == [
        "ckpt/generation_config.json: sets eos_token_id=[7] (explicit values win); not applied, "
        "because not supported: top_h=0.4, force_words_ids=[[1]], chat_format='x', "
        "eos_token_id=[7, 9999] (expected integers from 0 to 511)"
    ]


def test_a_special_token_id_written_as_text_is_not_called_outside_the_vocabulary(with_file, caplog):
    resolved(with_file({"eos_token_id": "0"}))
    assert "eos_token_id='0' (expected integers from 0 to 511)" in caplog.text


@pytest.mark.parametrize(
    "data, message",
    [
        (b'{"eos_token_id": [1,', "ckpt/generation_config.json is damaged, not JSON"),
        (b"\xff\xfe", "ckpt/generation_config.json is damaged, not JSON"),
        (b"[1]", "ckpt/generation_config.json holds no JSON object"),
    ],
)
def test_a_damaged_file_is_named_when_text_is_generated(tiny, with_file, data, message):
    with pytest.raises(ValueError, match=message):
        generate(with_file(data), tiny[1], [[1]])
    assert resolved(with_file(b"\xef\xbb\xbf" + b'{"top_k": 5}')) == {}  # a byte order mark


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(do_sample=True, temperature="hot"), "temperature: found 'hot'.*is from ckpt/gen"),
        (dict(max_length=2), "max_length: found 2, expected more than the 3.*is from ckpt/gen"),
        (dict(suppress_tokens=[-1]), r"suppress_tokens: found \[-1\].*is from ckpt/gen"),
        (dict(stop_strings=["x"]), "stop_strings: found no tokenizer.*is from ckpt/gen"),
    ],
)
def test_errors_about_a_value_of_the_file_name_the_file(tiny, with_file, fields, message):
    model = with_file(fields)
    for function in (generate, lambda *a: generate_batch(a[0], a[1], [a[2][0]])):
        with pytest.raises(ValueError, match=message):
            function(model, tiny[1], np.array([[1, 2, 3]]))
    (name,) = set(fields) - {"do_sample"}
    with pytest.raises(ValueError) as error:
        generate(model, tiny[1], np.array([[1, 2, 3]]), **{name: -3})
    assert "ckpt" not in str(error.value)


def test_the_argument_generation_config_comes_before_the_file(with_file):
    model = with_file({"eos_token_id": 4, "repetition_penalty": 1.5})
    config = types.SimpleNamespace(to_diff_dict=lambda: {"repetition_penalty": 1.1, "top_p": 0.5})
    expected = dict(eos_token_id=[4], repetition_penalty=1.1, top_p=0.5)
    assert resolved(model, generation_config=config) == expected
    assert resolved(model, generation_config=config, top_p=0.6)["top_p"] == 0.6
    with pytest.raises(ValueError, match="generation_config: found 3, expected a dict"):
        resolved(model, generation_config=3)
    with pytest.raises(ValueError, match="guidance_scale: not supported"):
        resolved(model, generation_config={"guidance_scale": 2.0})


def test_top_k_none_keeps_all_tokens(tiny):
    assert resolved(tiny[0], do_sample=True, top_k=None)["top_k"] == 0
    assert resolved(tiny[0], do_sample=True, temperature=None, top_p=None) == dict(do_sample=True)


def test_every_way_to_generate_ends_at_the_eos_of_the_file(tmp_path, of_bytes):
    """`load` finds the file; batches, beams and streams follow it like `generate`."""
    model, params, tokenizer = of_bytes
    ids = np.array([[72, 101, 108]])
    free = generate(model, params, ids, max_new_tokens=12)[0, 3:].tolist()
    end = next(i for i, token in enumerate(free) if token not in free[:i] and i > 1)
    eos = [256, free[end]]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assets = [tmp_path / name for name in ("generation_config.json", "tokenizer.json")]
    save(tmp_path / "checkpoint", model.config, params, assets=assets)
    model, params = load(tmp_path / "checkpoint")
    expected = free[: end + 1]
    assert generate(model, params, ids, max_new_tokens=12)[0, 3:].tolist() == expected
    assert list(stream(model, params, ids, max_new_tokens=12)) == expected
    (result,) = generate_batch(model, params, ids.tolist(), max_new_tokens=12)
    assert result.tokens.tolist() == expected and result.finish_reason == "eos"
    assert load_tokenizer(tmp_path / "checkpoint").decode(expected)
    assert generate(model, params, ids, max_new_tokens=12, eos_token_id=None).shape[1] == 15
