"""`verify` describes every difference between two checkpoints."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from btlm_jax import BTLMConfig
from btlm_jax.checkpoint import zarr
from btlm_jax.convert import convert, export, verify
from btlm_jax.model import alibi, weights
from support import golden
from support.checkpoint_forms import (
    BF16,
    NAME,
    UNTIED,
    differences,
    in_both_formats,
    write_pair,
    write_tensors,
)


def test_signed_zeros_differ_in_bits_but_not_in_value(tmp_path):
    tensors = UNTIED.weights
    tensors[NAME][:2, :3] = 0.0
    a = write_tensors(tmp_path / "a", UNTIED, tensors)
    tensors[NAME][:2, :3] = -0.0
    b = write_tensors(tmp_path / "b", UNTIED, tensors)
    for x, y in in_both_formats(a, b):
        message = f"6 of {tensors[NAME].size:,} elements differ, max |difference| 0"
        assert differences(x, y) == {NAME: message}
        assert verify(x, y, atol=0.0)  # as values they are equal
    assert verify(a, a)


def test_nan_and_inf_are_compared_by_bits_or_as_infinitely_far(tmp_path):
    tensors = UNTIED.weights
    tensors[NAME][0, :4] = [np.nan, np.nan, np.nan, np.inf]
    a = write_tensors(tmp_path / "a", UNTIED, tensors)
    same = write_tensors(tmp_path / "same", UNTIED, tensors)
    tensors[NAME].view(np.uint32)[0, 0] ^= 1  # another payload
    payload = write_tensors(tmp_path / "payload", UNTIED, tensors)
    tensors[NAME][0, 2:4] = 0.5, -np.inf
    b = write_tensors(tmp_path / "b", UNTIED, tensors)
    assert verify(a, same) and verify(a, same, atol=0.0)
    for x, y in in_both_formats(a, b):
        found = differences(x, y)[NAME]
        assert found == f"3 of {tensors[NAME].size:,} elements differ, max |difference| inf"
        assert not verify(x, y, atol=1e30)
        assert differences(y, x)[NAME] == found
    tensors[NAME][0, :4] = [np.nan, 0.5, np.nan, np.inf]  # a number where there was NaN
    number = write_tensors(tmp_path / "number", UNTIED, tensors)
    for x, y in ((payload, number), (number, payload)):
        assert differences(x, y, atol=1e30)[NAME].endswith("max |difference| inf")
    # By value, all NaN are equal, and so are infinities of one sign.
    assert differences(a, payload)[NAME].startswith("1 of ") and verify(a, payload, atol=0.0)


def test_every_difference_is_counted(tmp_path):
    """In several tensors, listed in the order of the model."""
    rng, expected = np.random.default_rng(0), {}

    def change(tensors):
        for name in ("transformer.wte.weight", NAME, "lm_head.weight", "transformer.ln_f.bias"):
            noise = rng.standard_normal(tensors[name].shape, np.float32)
            noise[rng.random(noise.shape) < 0.5] = 0
            changed = tensors[name] + noise
            differ = int((changed != tensors[name]).sum())
            largest = np.abs(changed.astype(np.float64) - tensors[name]).max()
            expected[name] = (
                f"{differ:,} of {noise.size:,} elements differ, max |difference| {largest:.6g}"
            )
            tensors[name] = changed

    a, b = write_pair(tmp_path, change)
    for x, y in in_both_formats(a, b):
        assert differences(x, y) == expected
    names = [leaf.hf_name for leaf in weights.disk_leaves(UNTIED.config)]
    order = [what for what, _ in verify(a, b).differences]
    assert order == [n for n in names if n in expected]
    table = str(verify(a, b)).splitlines()
    assert table[0] == f"4 differences in {len(names)} tensors:"
    assert table[1:] == [f"{n:<{max(map(len, order))}}  {expected[n]}" for n in order]


@pytest.mark.parametrize("limit", [500, 7000])
def test_differences_are_summed_over_blocks(tmp_path, monkeypatch, limit):
    name = "transformer.wte.weight"  # whose rows, a prime number of them, do not divide

    def change(tensors):
        x = tensors[name]
        x[0, 0], x[40, 3], x[-1, -1] = x[0, 0] + 2, x[40, 3] - 7, x[-1, -1] + 3
        narrow = np.dtype(ml_dtypes.bfloat16)
        tensors[NAME] = tensors[NAME].astype(narrow).astype(np.float32)

    a, b = write_pair(tmp_path, change)
    narrow = load_file(b / "model.safetensors")
    narrow[NAME] = narrow[NAME].astype(ml_dtypes.bfloat16)
    c = write_tensors(tmp_path / "three", UNTIED, narrow)
    size = UNTIED.weights[name].size
    expected = {name: f"3 of {size:,} elements differ, max |difference| 7"}
    monkeypatch.setattr(zarr, "BLOCK_BYTES", limit)
    monkeypatch.setattr(zarr.block_rows, "__defaults__", (limit,))
    for x, y in [*in_both_formats(a, b), (a, c), (tmp_path / "one.c", c)]:
        found = differences(x, y)
        assert found.pop(NAME, None) == ("float32 and bfloat16, values equal" if y == c else None)
        assert found == expected, (x, y)
    files = [p for p in (tmp_path / "one.c/state/wte/c").rglob("*") if p.is_file()]
    assert len(files) > 3
    # Blocks of another height than those that were written.
    monkeypatch.setattr(zarr.block_rows, "__defaults__", (limit * 3,))
    assert differences(tmp_path / "one.c", b) == expected and verify(tmp_path / "one.c", a)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16], ids=["bfloat16", "float16"])
def test_dtypes_differ_even_if_values_are_equal(tmp_path, dtype):
    """float32 against a narrower dtype, with equal and with rounded values."""
    whole = {k: v * np.float32(1.0007) for k, v in UNTIED.weights.items()}
    slopes = {golden.SLOPES: whole.pop(golden.SLOPES)}
    rounded = {k: v.astype(dtype) for k, v in whole.items()}
    exact = {k: v.astype(np.float32) for k, v in rounded.items()}
    narrow = write_tensors(tmp_path / "narrow", UNTIED, rounded | slopes)
    wide = write_tensors(tmp_path / "wide", UNTIED, exact | slopes)
    full = write_tensors(tmp_path / "full", UNTIED, whole | slopes)
    name = np.dtype(dtype).name
    for a, b in in_both_formats(narrow, wide):
        assert differences(a, b) == dict.fromkeys(rounded, f"{name} and float32, values equal")
        assert verify(a, b, atol=0.0)
    assert verify(wide, narrow).digest == verify(wide, wide).digest != verify(narrow, wide).digest
    worst, expected = 0.0, {}
    for tensor, x in whole.items():
        difference = np.abs(x.astype(np.float64) - rounded[tensor].astype(np.float64))
        worst, count = max(worst, difference.max()), int((difference > 0).sum())
        expected[tensor] = f"float32 and {name}, values equal"
        if count:
            expected[tensor] = (
                f"float32 and {name}, {count:,} of {x.size:,} elements differ, "
                f"max |difference| {difference.max():.6g}"
            )
    assert differences(full, narrow) == expected and worst > 1e-5
    assert verify(full, narrow, atol=worst) and not verify(full, narrow, atol=0.99 * worst)
    convert(full, tmp_path / "full.c")
    assert differences(tmp_path / "full.c", tmp_path / "narrow.c") == expected


def test_checkpoints_of_mixed_dtypes_equal_themselves(tmp_path):
    tensors = UNTIED.weights
    tensors[NAME] = tensors[NAME].astype(ml_dtypes.bfloat16)
    tensors["transformer.ln_f.bias"] = tensors["transformer.ln_f.bias"].astype(np.float16)
    a = write_tensors(tmp_path / "a", UNTIED, tensors)
    convert(a, tmp_path / "c")
    export(tmp_path / "c", tmp_path / "e")
    for x in (a, tmp_path / "c", tmp_path / "e"):
        for y in (a, tmp_path / "c", tmp_path / "e"):
            assert verify(x, y), (x, y)
    assert verify(a, tmp_path / "c", logits=True)  # in fp32, as such layers cannot be stacked
    assert verify(tmp_path / "e").digest == verify(a, a).digest


@pytest.mark.parametrize(
    "field, value",
    [
        ("layer_norm_epsilon", 1e-6),
        ("mup_embeddings_scale", 3.0),
        ("mup_output_alpha", 2.0),
        ("mup_scale_qk_dot_by_d", False),
        ("eos_token_id", 3),
        ("n_positions", 64),
    ],
)
def test_configuration_fields_that_differ_are_named(tmp_path, field, value):
    """Even with a large `atol`."""
    a, b = write_pair(tmp_path, lambda tensors: None, **{field: value})
    original = getattr(BTLMConfig.from_hf(UNTIED.hf_config), field)
    assert original != value
    expected = {f"config {field}": f"{original} and {value}"}
    assert differences(a, b) == expected
    convert(b, tmp_path / "c")
    assert differences(a, tmp_path / "c", atol=1e9) == expected


def test_different_alibi_scaling_is_found(tmp_path):
    scaling = {"type": "linear", "factor": 4.0}
    a, b = write_pair(tmp_path, lambda tensors: None, alibi_scaling=scaling)
    assert list(differences(a, b)) == ["config alibi_scaling"]


def test_slopes_that_differ_are_found(tmp_path):
    def change(tensors):
        tensors[golden.SLOPES][1] *= 1 + 2**-8  # an ulp of bf16

    a, b = write_pair(tmp_path, change)
    for x, y in in_both_formats(a, b):
        assert list(differences(x, y)) == ["config alibi_slopes"]
    # Exact slopes are equal, stored or not.
    exact = UNTIED.weights
    exact[golden.SLOPES] = alibi.slopes(UNTIED.config.n_head).astype(np.float32)[:, None]
    stored = write_tensors(tmp_path / "stored", UNTIED, exact)
    del exact[golden.SLOPES]
    implied = write_tensors(tmp_path / "implied", UNTIED, exact)
    for x, y in in_both_formats(stored, implied):
        assert verify(x, y) and verify(y, x)


def test_tensors_without_a_counterpart_are_named(tmp_path):
    """For another depth and another vocabulary size."""
    a = write_tensors(tmp_path / "a", UNTIED, UNTIED.weights)
    fewer = {k: v for k, v in UNTIED.weights.items() if ".h.1." not in k}
    missing = {k for k in UNTIED.weights if ".h.1." in k}
    wide = UNTIED.config.vocab_size
    for name in ("transformer.wte.weight", "lm_head.weight"):
        fewer[name] = np.concatenate([fewer[name], fewer[name][:1]])
    b = write_tensors(tmp_path / "b", UNTIED, fewer, n_layer=1, vocab_size=wide + 1)
    columns = UNTIED.config.n_embd
    for x, y in in_both_formats(a, b):
        found = differences(x, y)
        assert found.pop("config n_layer") == "2 and 1"
        assert found.pop("config vocab_size") == f"{wide} and {wide + 1}"
        for name in ("transformer.wte.weight", "lm_head.weight"):
            message = f"shape ({wide}, {columns}) and ({wide + 1}, {columns})"
            assert found.pop(name) == message
        assert len(missing) > 10 and found == dict.fromkeys(missing, f"only in {x}")
        back = differences(y, x)
        assert {k: back[k] for k in missing} == dict.fromkeys(missing, f"only in {x}")


def test_learned_and_alibi_positions_differ(tmp_path):
    learned = golden.load("f_learned_gelu_mup")
    a = golden.write_hf(tmp_path / "a", learned)
    b = golden.write_hf(tmp_path / "b", UNTIED)
    found = differences(a, b)
    assert found["transformer.wpe.weight"] == f"only in {a}"
    assert found["transformer.h.0.mlp.c_fc2.weight"] == f"only in {b}"
    assert found["config position_embedding_type"] == "learned and alibi"


def test_tokenizer_files_that_differ_are_named(tmp_path):
    a, b = (golden.write_hf(tmp_path / n, BF16, tokenizer=True) for n in "ab")
    convert(a, tmp_path / "c")
    assert verify(a, b) and verify(b, tmp_path / "c")
    tokenizer = (b / "tokenizer.json").read_bytes()
    (b / "tokenizer.json").write_bytes(tokenizer.replace(b" ", b"\n", 1))  # of equal size
    assert (
        differences(a, b)
        == differences(b, tmp_path / "c")
        == {"tokenizer.json": "the files differ"}
    )
    (b / "tokenizer.json").unlink()
    assert differences(a, b) == differences(b, a) == {"tokenizer.json": f"only in {a}"}


def test_files_that_a_checkpoint_records_and_lacks_are_named(tmp_path, run_verify):
    source = golden.write_hf(tmp_path / "hf", BF16, tokenizer=True)
    for name in ("generation_config.json", "tokenizer_config.json", "vocab.json", "merges.txt"):
        (source / name).write_text("{}")
    convert(source, tmp_path / "c")
    bare = golden.write_hf(tmp_path / "bare", BF16)
    (source / "modeling_btlm.py").write_text("")  # was not carried, and decides nothing
    assert verify(source, tmp_path / "c")
    recorded = ["generation_config.json", "merges.txt", "tokenizer.json"]
    recorded += ["tokenizer_config.json", "vocab.json"]
    for name in recorded:
        (tmp_path / "c/tokenizer" / name).unlink()
        expected = {name: f"missing in {tmp_path / 'c'}, which records it"}
        assert (
            differences(source, tmp_path / "c") == differences(tmp_path / "c", source) == expected
        )
        (tmp_path / "c/tokenizer" / name).write_bytes((source / name).read_bytes())
    (tmp_path / "c/tokenizer/generation_config.json").write_text('{"eos_token_id": 1}')
    (tmp_path / "c/tokenizer/tokenizer.json").unlink()
    code, out, _ = run_verify(source, tmp_path / "c")
    assert code == 1 and "2 differences" in out and "generation_config.json" in out
    found = differences(bare, tmp_path / "c")  # a file that no one recorded and only one has
    assert found.pop("tokenizer.json").startswith("missing in ") and set(found) == {
        "tokenizer_config.json", "vocab.json", "merges.txt"
    }  # fmt: skip
