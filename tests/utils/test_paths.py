"""Paths and URLs: the same places under other names."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest

import btlm_jax as btlm
from btlm_jax import cli
from btlm_jax.checkpoint import metadata
from btlm_jax.convert import convert, export, load_hf, verify
from btlm_jax.utils import paths
from support import golden


@pytest.mark.parametrize(
    "url, expected",
    [
        ("file:///a/b", "/a/b"),
        ("file://localhost/a/b", "/a/b"),
        ("FILE:///a/b", "/a/b"),
        ("file:///a/b/", "/a/b"),
        ("file:///a/./b/../c", "/a/c"),
        ("file:///with%20space/100%25/caf%C3%A9", "/with space/100%/café"),
        ("file:///a%2Bb+c", "/a+b+c"),
    ],
)
def test_file_urls(url, expected):
    place = paths.location(url)
    assert os.fspath(place) == expected and not paths.is_remote(place)


def test_file_urls_of_pathlib(tmp_path):
    """Every name that can be a URL comes back from one."""
    for name in ("plain", "with space", "100%", "a#b", "what?", "a%20b", "ümlaut", "a+b;c&d=e"):
        assert os.fspath(paths.location((tmp_path / name).as_uri())) == str(tmp_path / name)


@pytest.mark.parametrize(
    "url", ["file://host/a", "file://host", "file://", "file://a/b", "file://localhost"]
)
def test_file_urls_of_elsewhere(url):
    with pytest.raises(ValueError, match="expected file:///absolute/path") as error:
        paths.location(url)
    assert url in str(error.value)


@pytest.mark.parametrize("name", ["a#1", "a?1", "a#", "a;b&c=d"])
def test_nothing_of_a_file_url_is_dropped(name):
    """Or two URLs would be one directory."""
    assert os.fspath(paths.location(f"file:///runs/{name}")) == f"/runs/{name}"


@pytest.mark.parametrize("text", ["", ".", "a", "a/b", "./a/../b", "..", "a:b", "C:/x", "file:/x"])
def test_local_paths_become_absolute(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    place = paths.location(text)
    assert os.fspath(place) == os.path.abspath(text) and not paths.is_remote(place)
    assert place == paths.location(Path(text))
    monkeypatch.chdir("/")
    assert os.fspath(place).startswith(str(tmp_path.parent))  # also after a change of directory


def test_absolute_paths_are_kept(tmp_path):
    assert os.fspath(paths.location(tmp_path / "x")) == str(tmp_path / "x")
    assert os.fspath(paths.location(str(tmp_path) + "/x/")) == str(tmp_path / "x")


@pytest.mark.parametrize("url", ["http://h/x", "https://h/x", "az://c/x", "hdfs://x", "GCS://x"])
def test_unknown_schemes(url):
    with pytest.raises(ValueError, match="unknown scheme") as error:
        paths.location(url)
    assert url in str(error.value) and "expected a local path, file:// or gs://" in str(error.value)


@pytest.mark.parametrize("url", ["s3://b/p", "S3://b/p"])
def test_s3_is_refused_with_what_to_do_instead(url):
    with pytest.raises(ValueError, match="use a mounted bucket") as error:
        paths.location(url)
    assert url in str(error.value)


@pytest.mark.parametrize("url", ["gs://b/p", "GS://b/p"])
def test_gs_without_its_driver(monkeypatch, url):
    looked_for = []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: looked_for.append(name))
    with pytest.raises(ValueError) as error:
        paths.location(url)
    assert looked_for == ["gcsfs"]
    assert f"{url}: gs:// needs gcsfs: pip install 'btlm-jax[gcs]'" in str(error.value)
    pyproject = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert 'gcs = ["gcsfs"]' in pyproject


@pytest.fixture
def driver(monkeypatch):
    """As if gcsfs were installed; nothing here looks into a bucket."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())


def test_gs_with_its_driver(driver):
    place = paths.location("gs://bucket/dir%20x/")
    assert paths.is_remote(place) and os.fspath(place) == "gs://bucket/dir%20x"
    store = {"driver": "gcs", "bucket": "bucket", "path": "dir%20x/y/"}  # % is not decoded
    assert paths.kvstore(place / "y") == store
    assert paths.kvstore(paths.location("gs://bucket"))["path"] == ""
    local = paths.location("/a/b")
    assert paths.kvstore(local) == {"driver": "file", "path": "/a/b/"}


@pytest.mark.parametrize("url", ["gs://b/a#1", "gs://b/a?1"])
def test_gs_names_that_orbax_cuts_short(driver, url):
    with pytest.raises(ValueError, match="choose another name"):
        paths.location(url)


def test_gs_in_upper_case(driver):
    place = paths.location("GS://bucket/dir")
    assert paths.is_remote(place) and paths.kvstore(place) == paths.kvstore(
        paths.location("gs://bucket/dir")
    )


def test_small_files(tmp_path):
    (tmp_path / "a").write_bytes(b"1")
    (tmp_path / "b").mkdir()
    (tmp_path / "b/c").write_bytes(b"")
    found = paths.read_files(paths.location(tmp_path), ["a", "b/c", "d", "b/e"])
    assert found == {"a": b"1", "b/c": b"", "d": None, "b/e": None}


def test_command_line_without_a_driver(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    source = golden.write_hf(tmp_path / "hf", golden.load("i_untied"))
    for argv in (["convert", str(source), "gs://b/c"], ["verify", "gs://b/c"], ["info", "gs://b"]):
        assert cli.main(argv) == 2
        assert "pip install 'btlm-jax[" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["hf"]


# Everything under file:// ----------------------------------------------------------------------


def files(folder: Path) -> dict[str, bytes]:
    found = (p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): p.read_bytes() for p in found}


def same_bits(a, b) -> bool:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)


def test_a_full_pass_through_file_urls(tmp_path, monkeypatch):
    """The same directories as through plain paths, but for the note of where the source was."""
    case = golden.load("g_bf16")
    source = golden.write_hf(tmp_path / "hf 1", case, tokenizer=True)
    home = tmp_path / "elsewhere"
    home.mkdir()
    monkeypatch.chdir(home)  # a URL taken for a relative path would show here
    checkpoint, back = (tmp_path / "c%1", tmp_path / "back ü")

    converted = convert(source.as_uri(), checkpoint.as_uri())
    plain = convert(source, tmp_path / "plain")
    assert converted.digest == plain.digest and converted.files == plain.files
    ours, theirs = files(checkpoint), files(tmp_path / "plain")
    marks = [json.loads(x.pop(metadata.MARKER_FILE)) for x in (ours, theirs)]
    assert ours == theirs
    notes = [mark["custom_metadata"]["btlm_jax"] for mark in marks]
    assert [note["origin"].pop("source") for note in notes] == [source.as_uri(), str(source)]
    assert notes[0].pop("seal") != notes[1].pop("seal") and marks[0] == marks[1]

    model, params = btlm.load(checkpoint.as_uri())
    again, expected = btlm.load(tmp_path / "plain")
    assert model == again and same_bits(params, expected)
    assert same_bits(load_hf(source.as_uri())[1], expected)
    tokenizers = [btlm.load_tokenizer(x) for x in (checkpoint.as_uri(), tmp_path / "plain")]
    assert tokenizers[0].to_str() == tokenizers[1].to_str()

    assert verify(checkpoint.as_uri())
    assert verify(checkpoint.as_uri(), source.as_uri(), logits=True)
    assert verify(source, checkpoint.as_uri()).digest == converted.digest

    report = export(checkpoint.as_uri(), back.as_uri())
    assert report.digest == converted.digest
    export(tmp_path / "plain", tmp_path / "plain back")
    assert files(back) == files(tmp_path / "plain back")
    assert verify(back.as_uri())
    with pytest.raises(FileExistsError):
        export(checkpoint.as_uri(), back.as_uri())
    export(checkpoint.as_uri(), back.as_uri(), overwrite=True)
    btlm.save(checkpoint.as_uri(), model.config, params, overwrite=True)
    assert same_bits(btlm.load(checkpoint)[1], params)
    assert os.listdir(home) == []
    assert sorted(os.listdir(tmp_path)) == [
        *("back ü", "c%1", "elsewhere", "hf 1", "plain", "plain back"),
    ]


def test_command_line_exports_to_a_file_url(checkpoint_dir, tmp_path, monkeypatch):
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path / "home")
    argv = ["export", checkpoint_dir.as_uri(), (tmp_path / "back").as_uri()]
    assert cli.main(argv) == 0
    assert os.listdir(tmp_path / "home") == [] and (tmp_path / "back/config.json").is_file()


def test_schemes_in_upper_case(tmp_path):
    source = golden.write_hf(tmp_path / "hf", golden.load("i_untied"))
    convert(source.as_uri().replace("file", "FILE"), tmp_path / "c")
