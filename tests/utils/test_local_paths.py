"""Every public function that takes a path reads it in the same way."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import btlm_jax as btlm
from btlm_jax import convert
from btlm_jax.convert.hf.source import open_hf
from btlm_jax.data.prepare import prepare_tokens
from btlm_jax.data.text_files import expand_inputs
from btlm_jax.data.token_shards import TokenShards
from btlm_jax.data.tokenize import tokenize
from btlm_jax.evaluation import tasks
from btlm_jax.evaluation.documents import TextInputs
from btlm_jax.generation import jsonl, result_journal
from btlm_jax.generation.prompt_cache import PromptCache
from btlm_jax.mup_study import transfer
from btlm_jax.train import curves, loop, metrics, mixture, recipe, recipe_file
from btlm_jax.train.aot import executables, fit_table
from btlm_jax.train.bench import bench_all, convert_bench
from btlm_jax.train.demo import quickstart
from btlm_jax.utils import local_paths, paths, plots

nothing = None  # for arguments that are not looked at before the path
# Argument -> a call with a path there.
CALLS = {
    "BTLMConfig.from_hf: source": btlm.BTLMConfig.from_hf,
    "load: path": btlm.load,
    "load_tokenizer: directory": btlm.load_tokenizer,
    "pipeline: path": btlm.pipeline,
    "save: path": lambda path: btlm.save(path, nothing, {}),
    "save: assets": lambda path: btlm.save(
        "new", btlm.BTLMConfig.preset("tiny"), {}, assets=[path]
    ),
    "PromptCache.load: path": lambda path: PromptCache.load(path, nothing, nothing),
    "PromptCache.save: path": lambda path: PromptCache.save(nothing, path),
    "open_hf: source": open_hf,
    "convert: source": lambda path: convert.convert(path, "new"),
    "convert: target": lambda path: convert.convert("missing", path),
    "load_hf: source": convert.load_hf,
    "quantize: source": lambda path: convert.quantize(path, "new", "int8"),
    "quantize: target": lambda path: convert.quantize("missing", path, "int8"),
    "export: source": lambda path: convert.export(path, "new"),
    "export: target": lambda path: convert.export("missing", path),
    "verify: a": convert.verify,
    "verify: b": lambda path: convert.verify("missing", path),
    "prepare_tokens: inputs": lambda path: prepare_tokens(path, "new", tokenizer="missing"),
    "prepare_tokens: target": lambda path: prepare_tokens("x.txt", path, tokenizer="missing"),
    "tokenize: inputs": lambda path: tokenize([path], "new", "missing"),
    "tokenize: target": lambda path: tokenize("x.txt", path, "missing"),
    "TokenShards: directory": TokenShards,
    "TextInputs: text": lambda path: TextInputs(text=(path,)).documents(nothing),
    "TextInputs: jsonl": lambda path: TextInputs(jsonl=(path,)).documents(nothing),
    "load_tasks: include_path": lambda path: tasks.load_tasks(["x"], path),
    "read_prompt_lines: source": lambda path: jsonl.read_prompt_lines(path, nothing, 1, ()),
    "open_journal: target": lambda path: result_journal.open_journal(
        path, {}, overwrite=False
    ).__enter__(),
    "open_mixture: parent": lambda path: mixture.open_mixture(path, {"a": 1}),
    "open_mixture: weights": lambda path: mixture.open_mixture("missing", {path: 1}),
    "load_recipe: source": recipe_file.load_recipe,
    "ModelSettings: model.config": lambda path: settings(model={"config": path}),
    "ModelSettings: model.checkpoint": lambda path: settings(model={"checkpoint": path}),
    "DataSettings: data.train": lambda path: settings(data={"train": path}),
    "DataSettings: data.held_out": lambda path: settings(data={"held_out": path}),
    "DataSettings: data.weights": lambda path: settings(data={"weights": {path: 1.0}}),
    "train: directory": lambda path: loop.train(settings(), path),
    "read_training_run: directory": curves.read_training_run,
    "read_metrics: path": metrics.read_metrics,
    "transfer: directory": lambda path: transfer.transfer(path, nothing, nothing),
    "save_png: path": lambda path: plots.save_png(path, nothing),
    "save_executable: path": lambda path: executables.save_executable(path, nothing, {}),
    "load_executable: path": executables.load_executable,
    "write_fit_table: path": lambda path: fit_table.write_fit_table(
        path, settings(), attempts=1, jobs=1
    ),
    "run_quickstart: directory": quickstart.run_quickstart,
    "run_quickstart_from_hf: directory": lambda path: quickstart.run_quickstart_from_hf(path, "x"),
    "bench_convert: directory": lambda path: convert_bench.bench_convert(directory=path),
    "bench_load: directory": lambda path: convert_bench.bench_load(directory=path),
    "bench_all: file": lambda path: bench_all.bench_all(file=path),
}


def settings(**sections):
    """Returns a recipe with these sections."""
    raw = {"model": {"preset": "tiny"}, "phases": [{"steps": 1, "batch_size": 1, "length": 8}]}
    return recipe_file.parse_recipe(raw | sections)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """An empty home, which is also the current directory."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quickstart, "_use_virtual_devices", lambda: None)
    return tmp_path


@pytest.mark.parametrize("call", CALLS)
def test_urls_and_names_that_cannot_be_opened_are_refused_by_argument(call, home):
    argument = call.split(": ")[1]
    for value, shown in (
        ("s3://bucket/x", "'s3://bucket/x'"),
        ("hf://org/name", "'hf://org/name'"),
        ("~nobody-here/x", "'~nobody-here/x'"),
        ("caf\udce9", r"'caf\xe9'"),
        ("a\0b", r"'a\x00b'"),
        ("file://host/x", "'file://host/x'"),
    ):
        with pytest.raises(ValueError) as error:
            CALLS[call](value)
        message = str(error.value)
        assert f"{argument}: found {shown}" in message and "\n" not in message, message
        assert len(message.encode()) < 300
    assert not list(home.iterdir())


@pytest.mark.parametrize(
    "call",
    [
        "BTLMConfig.from_hf: source", "load: path", "load_tokenizer: directory", "open_hf: source",
        "export: source", "TokenShards: directory", "TextInputs: text",
        "read_prompt_lines: source", "open_mixture: parent", "load_recipe: source",
        "read_training_run: directory", "PromptCache.load: path",
    ],
)  # fmt: skip
def test_home_directories_and_file_urls_are_local_paths(call, home):
    for value in ("~/not there", f"{home.as_uri()}/not%20there"):
        with pytest.raises(FileNotFoundError, match="not there") as error:
            CALLS[call](value)
        assert str(home) in str(error.value)
    assert not list(home.iterdir())


def test_a_recipe_names_every_path_that_it_refuses():
    data = {"train": "gs://bucket/a", "held_out": "s3://bucket/b"}
    with pytest.raises(ValueError) as error:
        settings(data=data)
    lines = str(error.value).splitlines()
    assert lines[0] == "invalid recipe:" and len(lines) == 3
    assert lines[1].startswith("  data.train: found 'gs://bucket/a', expected a local path: copy")
    assert lines[2].startswith("  data.held_out: found 's3://bucket/b'")
    assert isinstance(settings(data={"train": "~/tokens"}), recipe.Recipe)


def test_the_parts_of_a_mixture_may_lie_elsewhere(home):
    with pytest.raises(FileNotFoundError, match=f"{home}/b"):
        mixture.open_mixture("a", {"~/b": 1.0})


def test_a_file_url_that_went_through_pathlib_is_a_local_path(home):
    assert local_paths.local_path(Path(f"file://{home}/a%20b")) == home / "a b"
    assert local_paths.local_path("file:relative") == Path("file:relative")


def test_names_of_bytes_are_texts_and_other_objects_are_refused(home):
    assert local_paths.local_path(b"a") == Path("a")
    with pytest.raises(TypeError, match="target: found 3, expected the name of a file"):
        local_paths.local_path(3, "target")


def test_a_current_directory_whose_name_is_no_text_is_refused(home, monkeypatch):
    folder = os.fsencode(home) + b"/caf\xe9"
    os.mkdir(folder)
    monkeypatch.chdir(folder)
    for check in (local_paths.local_path, paths.location):
        with pytest.raises(ValueError, match=r"path: found '.*/caf\\xe9/x', whose bytes are not"):
            check("x", "path")


def test_a_pattern_that_matches_a_name_that_is_no_text_is_refused(home):
    for name in (b"caf\xe9.txt", b"~b.txt"):
        Path(os.fsdecode(name)).write_text("a")
    with pytest.raises(
        ValueError, match=r"text: found '.*caf\\xe9.txt', whose bytes are not UTF-8"
    ):
        TextInputs(text=("*.txt",)).documents(nothing)
    assert expand_inputs("[~]*.txt")[0].path == Path("~b.txt")
