"""The checkpoint of the notebooks: which one is chosen, and how the small one is trained."""

from __future__ import annotations

import pytest

from btlm_jax import BTLMConfig
from btlm_jax.convert import verify
from btlm_jax.convert.auto import load_any_checkpoint, read_any_config, read_any_tokenizer
from btlm_jax.model import weights
from btlm_jax.model.params import check_params
from btlm_jax.train.demo import snapshot
from btlm_jax.train.metrics import loss_curves


@pytest.fixture
def fetched(monkeypatch):
    """The names requested from the Hub, which has everything."""
    requested = []
    monkeypatch.delenv(snapshot.SMALL_VARIABLE, raising=False)
    monkeypatch.setattr(snapshot, "train_small_checkpoint", lambda directory: directory / "hf")
    monkeypatch.setattr(snapshot, "open_hf", requested.append)
    return requested


def choose(tmp_path, bytes_per_parameter=3.0):
    return snapshot.choose_checkpoint(tmp_path, bytes_per_parameter=bytes_per_parameter)


def test_the_released_model_is_chosen_where_it_fits(fetched, tmp_path, monkeypatch, capsys):
    count = weights.count_parameters(BTLMConfig.preset(snapshot.PRESET))
    monkeypatch.setattr(snapshot, "available_memory", lambda sharded: 3 * count)
    assert choose(tmp_path) == snapshot.HUB
    assert fetched == [snapshot.HUB]
    assert "fetched" in capsys.readouterr().out
    monkeypatch.setattr(snapshot, "available_memory", lambda sharded: 3 * count - 1)
    assert choose(tmp_path) == str(tmp_path / "hf")
    assert fetched == [snapshot.HUB]  # nothing is fetched that would not fit
    assert "7.4 GiB of memory, and there is 7.4 GiB" in capsys.readouterr().out


def test_a_small_model_is_trained_without_network(fetched, tmp_path, monkeypatch, capsys):
    def offline(source):
        raise ConnectionError("no route to the Hub.")

    monkeypatch.setattr(snapshot, "available_memory", lambda sharded: 10**12)
    monkeypatch.setattr(snapshot, "open_hf", offline)
    assert choose(tmp_path) == str(tmp_path / "hf")
    assert "no route to the Hub.\n" in capsys.readouterr().out


def test_a_small_model_is_trained_on_request(fetched, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(snapshot.SMALL_VARIABLE, "1")
    assert choose(tmp_path) == str(tmp_path / "hf")
    assert not fetched and "BTLM_SMALL is set" in capsys.readouterr().out


@pytest.mark.parametrize("sharded", [False, True])
def test_memory_is_that_of_accelerators_or_of_the_machine(sharded, monkeypatch, tmp_path):
    class Device:
        def memory_stats(self):
            return {"bytes_limit": 5}

    # Lines of /proc/meminfo, then a machine that has none.
    meminfo = tmp_path / "meminfo"
    meminfo.write_text(
        "MemTotal:       9000 kB\nMemFree:         100 kB\nMemAvailable:    700 kB\n"
    )
    monkeypatch.setattr(snapshot, "MEMINFO", meminfo)
    assert snapshot.available_memory(sharded=sharded) == 716_800
    monkeypatch.setattr(snapshot, "MEMINFO", tmp_path / "none")
    pages = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 10}
    monkeypatch.setattr(snapshot.os, "sysconf", pages.__getitem__)
    assert snapshot.available_memory(sharded=sharded) == 40_960
    monkeypatch.setattr(snapshot.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(snapshot.jax, "local_devices", lambda: [Device(), Device()])
    assert snapshot.available_memory(sharded=sharded) == (10 if sharded else 5)


def test_the_small_model_is_trained_once(tmp_path):
    """On eight devices; the notebooks train it on one."""
    files = snapshot.train_small_checkpoint(tmp_path / "small", steps=4)
    assert files == tmp_path / "small/hf"
    config, tokenizer = read_any_config(files), read_any_tokenizer(files)
    assert tokenizer is not None and tokenizer.get_vocab_size() == config.vocab_size
    model, params = load_any_checkpoint(files)
    check_params(params, model.config)
    assert verify(files, tmp_path / "small/run")
    (steps, losses) = loss_curves(tmp_path / "small/run")["training"]
    assert steps[-1] == 4 and losses[-1] < losses[0]
    before = {p: p.stat().st_mtime_ns for p in files.iterdir()}
    assert snapshot.train_small_checkpoint(tmp_path / "small", steps=4) == files
    assert {p: p.stat().st_mtime_ns for p in files.iterdir()} == before
