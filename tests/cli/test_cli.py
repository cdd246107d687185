"""The command line: output, exit codes, and errors without a traceback."""

from __future__ import annotations

import errno
import json
import logging
import os
import subprocess
import sys
import time

import numpy as np
import pytest

import btlm_jax
from btlm_jax import cli
from btlm_jax.utils.format import format_bytes
from support import golden

COMMANDS = ("quickstart", "convert", "export", "info", "eval", "generate", "collapse")


def run(capsys, *argv):
    """Runs the command in this process: (exit code, standard output, standard error)."""
    try:
        code = cli.main([str(a) for a in argv])
    except SystemExit as e:  # from the argument parser
        code = e.code
    out = capsys.readouterr()
    return code, out.out, out.err


def test_help_of_every_command(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0
    for name in COMMANDS:
        assert name in out
        code, text, _ = run(capsys, name, "--help")
        assert code == 0 and "show this help message" in text


def test_help_of_all_commands_fits_on_a_screen(capsys):
    _, out, _ = run(capsys, "--help")
    lines = out.splitlines()
    assert len(lines) <= 40 and max(map(len, lines)) <= 100
    named = [line.split()[0] for line in lines if line.startswith("  ")]
    assert named == [name for group in cli.COMMANDS.values() for name in group]


def test_positional_arguments_have_names(capsys):
    for name in (name for group in cli.COMMANDS.values() for name in group):
        _, out, _ = run(capsys, name, "--help")
        assert not {"STR", "PATH", "{None}|STR"} & set(out.splitlines()[0].split()), name


def test_an_unknown_command_names_the_nearest(capsys):
    code, _, err = run(capsys, "trian")
    assert code == 2 and "unknown command 'trian'; did you mean 'train'?" in err


def test_no_command_prints_the_help_and_fails(capsys):
    code, out, _ = run(capsys)
    assert code == 2 and "btlm COMMAND --help" in out


def test_members_of_eval_keep_the_names_of_their_options(capsys):
    code, out, _ = run(capsys, "eval", "--help")
    for name in ("perplexity", "loss-by-position", "retrieval"):
        assert name in out
        code, text, _ = run(capsys, "eval", name, "--help")
        assert code == 0 and "--set SECTION.KEY=VALUE" in text and "--dtype" in text


def test_help_needs_no_jax():
    code = (
        "import sys; from btlm_jax import cli\ntry: cli.main(['--help'])\nexcept SystemExit: pass\n"
    )
    code += "assert not {'jax', 'flax', 'orbax'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize("flag", [True, False])
def test_programs_are_kept_between_processes(tmp_path, checkpoint_dir, flag):
    env = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    env |= {"XDG_CACHE_HOME": str(tmp_path), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    command = [sys.executable, "-m", "btlm_jax.cli", "generate", str(checkpoint_dir)]
    command += ["--prompt", "a", "--max-new-tokens", "1"]
    command += [] if flag else ["--no-compilation-cache"]
    subprocess.run(command, check=True, capture_output=True, env=env)
    kept = tmp_path / "btlm-jax" / "compiled"
    assert any(kept.iterdir()) if flag else not kept.exists()


def test_convert_info_generate_export(capsys, tmp_path):
    source = golden.write_hf(tmp_path / "hf", golden.load("a2_btlm_mup_h32"), tokenizer=True)
    code, out, _ = run(capsys, "convert", source, tmp_path / "c")
    assert code == 0 and "31 tensors (31 float32)" in out and "tokenizer.json" in out
    code, out, _ = run(capsys, "info", tmp_path / "c", "--length", "64")
    assert code == 0 and "2 layers, n_embd 96" in out and str(source) in out
    weights = golden.load("a2_btlm_mup_h32").weights
    nbytes = sum(x.nbytes for name, x in weights.items() if name != golden.SLOPES)
    assert ["stored", "float32", *format_bytes(nbytes).split()] in map(str.split, out.split("\n"))
    assert (
        run(capsys, "info", source, "--length", "64")[1].split()
        == out[: out.index("stored")].split()
    )
    code, out, _ = run(
        capsys, "generate", tmp_path / "c", "--prompt", "Hello", "--max-new-tokens", "9"
    )
    assert code == 0 and out.startswith("Hello") and len(out.strip()) > 5
    sampled = ("generate", tmp_path / "c", "--prompt", "Hi", "--sample", "--top-p", "0.9")
    first, again = (run(capsys, *sampled, "--seed", "3") for _ in range(2))
    assert first[:2] == again[:2] and first[0] == 0
    code, out, _ = run(
        capsys, "export", tmp_path / "c", tmp_path / "back", "--max-shard-size", "90000"
    )
    assert code == 0 and "model-00001-of-" in out


def test_info_describes_a_preset(capsys):
    code, out, _ = run(capsys, "info", "btlm-3b-8k")
    assert code == 0
    for text in ("2,646,255,744", "327,680 B per token", "full attention", "causal"):
        assert text in out


def test_info_checks_its_files_before_the_work(capsys, tmp_path):
    argv = ("info", "btlm-3b-8k", "--compare", "--png", tmp_path / "a.png", "--json", tmp_path)
    code, out, err = run(capsys, *argv)
    assert code == 2 and "is a directory" in err and not out


def test_generate_takes_the_options_of_the_library(capsys, checkpoint_dir):
    """Beams, bans and stop strings from the command line, against `btlm.generate`."""
    model, params = btlm_jax.load(checkpoint_dir)
    tokenizer = btlm_jax.load_tokenizer(checkpoint_dir)
    ids = np.array([tokenizer.encode("Hello").ids])
    argv = ["--num-beams", "3", "--num-return-sequences", "2", "--early-stopping", "never"]
    argv += ["--no-repeat-ngram-size", "2", "--length-penalty", "0.5", "--max-length", "20"]
    argv += ["--bad-words", "a", "bc", "--suppress-tokens", "0", "1", "--logit-bias", "7", "-3.5"]
    argv += ["--stop-strings", "qq", "zz", "--repetition-penalty", "1.2", "--min-new-tokens", "2"]
    argv += ["--eos-token-id", "95", "9", "--begin-suppress-tokens", "5", "--logprobs"]
    code, out, err = run(capsys, "generate", checkpoint_dir, "--prompt", "Hello", *argv)
    expected = btlm_jax.generate(
        model, params, ids, num_beams=3, num_return_sequences=2, early_stopping="never",
        no_repeat_ngram_size=2, length_penalty=0.5, max_length=20, repetition_penalty=1.2,
        bad_words_ids=[tokenizer.encode(w).ids for w in ("a", "bc")], suppress_tokens=[0, 1],
        logit_bias={7: -3.5}, stop_strings=["qq", "zz"], tokenizer=tokenizer, min_new_tokens=2,
        eos_token_id=[95, 9], begin_suppress_tokens=[5], return_dict_in_generate=True,
    )  # fmt: skip
    real = [5 + int((~np.isnan(p)).sum()) for p in expected.logprobs]
    rows = zip(expected.sequences, real, strict=True)
    first, second = (tokenizer.decode(row[:n].tolist()) for row, n in rows)
    assert code == 0 and out == f"[1]\n{first}\n\n[2]\n{second}\n"
    shown = [line for line in err.splitlines() if not line.startswith("btlm: ")]
    assert len(shown) == sum(real) - 10
    assert f"{expected.logprobs[0, 0]:9.4f} " in err


def test_options_without_effect_are_warned_about(capsys, checkpoint_dir):
    code, _, err = run(capsys, "generate", checkpoint_dir, "--prompt", "a", "--top-k", "5")
    assert code == 0 and "--top-k 5 does nothing without --sample" in err


def bad_inputs(tmp_path):
    hf = golden.write_hf(tmp_path / "hf", golden.load("a2_btlm_mup_h32"))
    cut = golden.write_hf(tmp_path / "cut", golden.load("a2_btlm_mup_h32"))
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    odd = golden.write_hf(tmp_path / "odd", golden.load("a2_btlm_mup_h32"))
    config = json.loads((odd / "config.json").read_text())
    (odd / "config.json").write_text(json.dumps(config | {"activation_function": "relu"}))
    new = tmp_path / "new"
    return {
        "missing source": (("convert", tmp_path / "nowhere", new), "nowhere"),
        "truncated": (("convert", cut, new), "model.safetensors"),
        "unknown value": (("convert", odd, new), "activation_function: found 'relu'"),
        "existing target": (("convert", hf, hf), "exists"),
        "not a checkpoint": (("info", tmp_path), "not an Orbax checkpoint"),
        "hf instead": (("generate", hf, "--prompt", "x"), "btlm convert"),
        "no such preset": (("info", "btlm-3b"), "the presets are"),
        "existing directory": (("quickstart", hf), "exists"),
        "quickstart source": (("quickstart", new, "--hf", tmp_path / "nowhere"), "nowhere"),
        "export": (("export", tmp_path / "nowhere", new), "no such checkpoint"),
    }


def test_bad_input_is_one_message_and_writes_nothing(capsys, tmp_path):
    for name, (argv, message) in bad_inputs(tmp_path).items():
        before = sorted(os.listdir(tmp_path))
        code, out, err = run(capsys, *argv)
        assert code == 2, name
        assert message in err and err.splitlines()[-1] and "Traceback" not in err + out, name
        assert "btlm: error: " in err, name
        assert sorted(os.listdir(tmp_path)) == before, name  # nothing half-written


@pytest.mark.parametrize(
    "options, message",
    [
        (("--prompt", ""), "--prompt: found no text, expected at least one character"),
        (("--prompt", "Hello", "--cache-length", "3"), "found --cache-length 3"),
        (("--prompt", "Hello", "--sample", "--temperature", "0"), "temperature: found 0.0"),
        (
            ("--prompt", "Hello", "--max-length", "5"),
            "--max-length: found 5, expected more",
        ),
        (
            ("--prompt", "Hello", "--num-return-sequences", "2"),
            "greedy decoding has one result; set --sample or --num-beams",
        ),
        (
            ("--prompt", "Hello", "--bad-words", ""),
            "--bad-words: found no text, expected at least one",
        ),
    ],
)
def test_bad_generation_options_are_refused(capsys, checkpoint_dir, options, message):
    code, _, err = run(capsys, "generate", checkpoint_dir, *options)
    assert code == 2 and message in err


def test_a_checkpoint_without_tokenizer_is_named(capsys, tmp_path):
    source = golden.write_hf(tmp_path / "hf", golden.load("a2_btlm_mup_h32"))
    code, _, err = run(capsys, "convert", source, tmp_path / "c")
    assert code == 0 and "no tokenizer files" in err
    code, _, err = run(capsys, "generate", tmp_path / "c", "--prompt", "x")
    assert code == 2 and "no tokenizer.json" in err


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises(FileNotFoundError):
        cli.main(["info", str(tmp_path / "nowhere"), "--debug"])


def test_an_unknown_option_names_the_nearest(capsys):
    code, out, err = run(capsys, "convert", "a", "b", "--overwritee")
    assert code == 2 and "overwrite" in out + err


def test_a_closed_pipe_is_no_error():
    command = f"{sys.executable} -m btlm_jax.cli info tiny | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""


def test_the_console_script_reports_errors(tmp_path):
    """The installed command prints an error without a traceback."""
    done = subprocess.run(
        [sys.executable, "-m", "btlm_jax.cli", "info", str(tmp_path / "x")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("btlm: error:") and "Traceback" not in done.stderr


def test_closed_and_full_streams_end_without_a_traceback():
    """Standard output and error that were closed, or whose disk is full."""
    script = """
    btlm() { %s -m btlm_jax.cli info tiny; }
    btlm >&- 2>/dev/null; echo $?; btlm >&- 2>&-; echo $?; btlm 2>&1 >/dev/full; echo $?
    """
    done = subprocess.run(["bash", "-c", script % sys.executable], capture_output=True, text=True)
    message = "btlm: error: standard output cannot be written: No space left on device"
    assert done.stdout.splitlines() == ["0", "0", message, "2"] and done.stderr == ""


def test_a_pipe_that_nobody_reads_does_not_stop_the_work(monkeypatch):
    """Notices go through a thread; those that a full pipe holds back are given up at the end."""
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setattr(cli, "_CLOSE_SECONDS", 0.2)
        handler = cli._log_to_stderr()
        os.set_blocking(writer, True)
        for _ in range(100):
            logging.getLogger("btlm_jax").warning("x" * 4000)
        began = time.monotonic()
        handler.finish()
        assert time.monotonic() - began < 5
        os.set_blocking(reader, False)
        while True:  # lets the thread end
            try:
                os.read(reader, 1 << 20)
                time.sleep(0.01)
            except BlockingIOError:
                break
    os.close(reader)


def test_quickstart_names_options_that_do_nothing_with_hf(capsys, tmp_path):
    code, _, err = run(capsys, "quickstart", tmp_path / "q", "--hf", "x", "--steps", "3")
    assert code == 2 and "--steps: found it with --hf, which trains nothing" in err


def test_a_refused_tokenization_leaves_nothing_and_names_options_without_effect(capsys, tmp_path):
    (tmp_path / "a.txt").write_text("only one document")
    target = tmp_path / "tokens"
    argv = ("tokenize", tmp_path / "a.txt", "--target", target, "--new-tokenizer", "257")
    extra = ("--held-out", "0.00001", "--field", "body", "--stdin-format", "txt")
    code, _, err = run(capsys, *argv, *extra)
    assert code == 2 and "nothing of 1 document(s) is held out" in err
    assert "--field does nothing with .txt files" in err
    assert "--stdin-format does nothing without -" in err
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize(
    "argv, message",
    [
        ("convert hf c --quantize-embedding bfloat16", "--quantize-embedding needs --quantize"),
        ("verify c --atol 0.1", "--atol 0.1 does nothing without a second checkpoint: name one"),
        ("verify c --logits", "--logits does nothing without a second checkpoint"),
        ("info tiny --length -1", "--length: found -1, expected a number of tokens"),
        ("collapse run ./run/", "run is given twice, and would count twice"),
    ],
)
def test_options_that_would_do_nothing_are_refused_before_anything_is_read(argv, message, capsys):
    code, out, err = run(capsys, *argv.split())
    assert (code, out) == (2, "") and message in err


def test_errors_of_the_operating_system_are_told_without_their_number():
    full = os.strerror(errno.ENOSPC)
    explained = "no space for x: 2 KiB are to be written; free space"
    advice = ": free space, or choose another disk"
    assert cli._describe(OSError(errno.ENOSPC, explained)) == explained
    assert cli._describe(OSError(errno.ENOSPC, full)) == full + advice
    assert cli._describe(OSError(errno.ENOSPC, full, "x")) == f"x: {full}{advice}"
