"""Paths and URLs of the same locations."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import pytest

import btlm_jax as btlm
from btlm_jax import cli
from btlm_jax.checkpoint import metadata
from btlm_jax.convert import convert, export, load_hf, verify
from btlm_jax.utils import paths
from support import golden
from support.compare import read_directory, same_bits


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
def test_file_urls_are_local_paths(url, expected):
    location = paths.location(url)
    assert os.fspath(location) == expected and not paths.is_remote(location)


def test_file_urls_of_pathlib_are_reversed(tmp_path):
    for name in ("plain", "with space", "100%", "a#b", "what?", "a%20b", "ümlaut", "a+b;c&d=e"):
        assert os.fspath(paths.location((tmp_path / name).as_uri())) == str(tmp_path / name)


@pytest.mark.parametrize(
    "url", ["file://host/a", "file://host", "file://", "file://a/b", "file://localhost"]
)
def test_file_urls_of_other_hosts_are_refused(url):
    with pytest.raises(ValueError, match="expected file:///absolute/path") as error:
        paths.location(url)
    assert url in str(error.value)


@pytest.mark.parametrize("name", ["a#1", "a?1", "a#", "a;b&c=d"])
def test_no_part_of_a_file_url_is_dropped(name):
    """Otherwise two URLs would name one directory."""
    assert os.fspath(paths.location(f"file:///runs/{name}")) == f"/runs/{name}"


@pytest.mark.parametrize("text", [".", "a", "a/b", "./a/../b", "..", "a:b", "C:/x"])
def test_local_paths_become_absolute(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    location = paths.location(text)
    assert os.fspath(location) == os.path.abspath(text) and not paths.is_remote(location)
    assert location == paths.location(Path(text))
    monkeypatch.chdir("/")
    assert os.fspath(location).startswith(str(tmp_path.parent))  # even after a change of directory


def test_absolute_paths_are_kept_without_trailing_slash(tmp_path):
    assert os.fspath(paths.location(tmp_path / "x")) == str(tmp_path / "x")
    assert os.fspath(paths.location(str(tmp_path) + "/x/")) == str(tmp_path / "x")


@pytest.mark.parametrize("url", ["http://h/x", "https://h/x", "az://c/x", "hdfs://x", "GCS://x"])
def test_unknown_schemes_are_refused(url):
    with pytest.raises(ValueError, match="expected a local path, file:// or gs://") as error:
        paths.location(url)
    assert url in str(error.value)


@pytest.mark.parametrize("url", ["s3://b/p", "S3://b/p"])
def test_s3_is_refused_with_alternatives(url):
    with pytest.raises(ValueError, match="`aws s3 cp --recursive`, or mount the bucket") as error:
        paths.location(url)
    assert url in str(error.value)


@pytest.mark.parametrize("url", ["gs://b/p", "GS://b/p"])
def test_gs_without_its_driver_is_refused(monkeypatch, url):
    searched = []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: searched.append(name))
    with pytest.raises(ValueError) as error:
        paths.location(url)
    assert searched == ["gcsfs"]
    assert f"found '{url}', but gs:// needs gcsfs: pip install 'btlm-jax[gcs]'" in str(error.value)
    pyproject = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert 'gcs = ["gcsfs"]' in pyproject


@pytest.fixture
def driver(monkeypatch):
    """Pretends that gcsfs is installed; no test here reads a bucket."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())


def test_gs_urls_become_gcs_key_value_stores(driver):
    location = paths.location("gs://bucket/dir%20x/")
    assert paths.is_remote(location) and os.fspath(location) == "gs://bucket/dir%20x"
    store = {"driver": "gcs", "bucket": "bucket", "path": "dir%20x/y/"}  # % is not decoded
    assert paths.kvstore(location / "y") == store
    assert paths.kvstore(paths.location("gs://bucket"))["path"] == ""
    local = paths.location("/a/b")
    assert paths.kvstore(local) == {"driver": "file", "path": "/a/b/"}


@pytest.mark.parametrize("url", ["gs://b/a#1", "gs://b/a?1"])
def test_gs_names_that_orbax_truncates_are_refused(driver, url):
    with pytest.raises(ValueError, match="choose another name"):
        paths.location(url)


def test_the_scheme_gs_may_be_upper_case(driver):
    location = paths.location("GS://bucket/dir")
    assert paths.is_remote(location) and paths.kvstore(location) == paths.kvstore(
        paths.location("gs://bucket/dir")
    )


def test_missing_files_are_read_as_none(tmp_path):
    (tmp_path / "a").write_bytes(b"1")
    (tmp_path / "b").mkdir()
    (tmp_path / "b/c").write_bytes(b"")
    contents = paths.read_files(paths.location(tmp_path), ["a", "b/c", "d", "b/e"])
    assert contents == {"a": b"1", "b/c": b"", "d": None, "b/e": None}


def test_the_command_line_explains_a_missing_driver(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    source = golden.write_hf(tmp_path / "hf", golden.load("i_untied"))
    for argv in (["convert", str(source), "gs://b/c"], ["verify", "gs://b/c"], ["info", "gs://b"]):
        assert cli.main(argv) == 2
        assert "pip install 'btlm-jax[" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["hf"]


# All functions with file:// ---------------------------------------------------------------------


def test_file_urls_give_the_same_directories_as_plain_paths(tmp_path, monkeypatch):
    """Only the recorded source differs."""
    case = golden.load("g_bf16")
    source = golden.write_hf(tmp_path / "hf 1", case, tokenizer=True)
    home = tmp_path / "elsewhere"
    home.mkdir()
    monkeypatch.chdir(home)  # a URL treated as a relative path would appear here
    checkpoint, back = (tmp_path / "c%1", tmp_path / "back ü")

    converted = convert(source.as_uri(), checkpoint.as_uri())
    plain = convert(source, tmp_path / "plain")
    assert converted.digest == plain.digest and converted.files == plain.files
    ours, theirs = read_directory(checkpoint), read_directory(tmp_path / "plain")
    markers = [json.loads(x.pop(metadata.MARKER_FILE)) for x in (ours, theirs)]
    assert ours == theirs
    custom = [marker["custom_metadata"]["btlm_jax"] for marker in markers]
    assert [values["origin"].pop("source") for values in custom] == [source.as_uri(), str(source)]
    assert custom[0].pop("seal") != custom[1].pop("seal") and markers[0] == markers[1]

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
    assert read_directory(back) == read_directory(tmp_path / "plain back")
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


def test_the_command_line_exports_to_a_file_url(checkpoint_dir, tmp_path, monkeypatch):
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path / "home")
    argv = ["export", checkpoint_dir.as_uri(), (tmp_path / "back").as_uri()]
    assert cli.main(argv) == 0
    assert os.listdir(tmp_path / "home") == [] and (tmp_path / "back/config.json").is_file()


def test_the_scheme_file_may_be_upper_case(tmp_path):
    source = golden.write_hf(tmp_path / "hf", golden.load("i_untied"))
    convert(source.as_uri().replace("file", "FILE", 1), tmp_path / "c")
