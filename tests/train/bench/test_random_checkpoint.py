"""Random checkpoints are valid Hugging Face checkpoints in all four file formats."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import btlm_jax as btlm
from btlm_jax.checkpoint import zarr
from btlm_jax.convert import convert, verify
from btlm_jax.convert.hf.source import HFSource, open_hf
from btlm_jax.convert.hf.tensor_names import EMBEDDING, LM_HEAD
from btlm_jax.convert.hf.torch_pickle import TorchFile
from btlm_jax.model import alibi, weights
from btlm_jax.train.bench import random_checkpoint
from btlm_jax.train.bench.random_checkpoint import FORMS, write_random_checkpoint
from support import golden

LAYERS = 3


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    for form in FORMS:
        write_random_checkpoint(folder / form, layers=LAYERS, form=form, preset="tiny")
    return {form: folder / form for form in FORMS}


@pytest.fixture(scope="module")
def sources(checkpoints) -> dict[str, HFSource]:
    return {form: open_hf(path) for form, path in checkpoints.items()}


def weights_by_name(source: HFSource) -> dict[str, weights.Weight]:
    config = btlm.BTLMConfig.from_hf(source.config)
    return {leaf.hf_name: leaf.weight for leaf in weights.disk_leaves(config)}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_has_the_shapes_of_the_model_and_the_same_bytes_each_time(
    sources, form, tmp_path
):
    source = sources[form]
    assert (
        source.description
        == {
            "safetensors": "safetensors",
            "safetensors-sharded": "safetensors, 3 shards",
            "bin": "torch .bin",
            "bin-sharded": "torch .bin, 3 shards",
        }[form]
    )
    assert btlm.BTLMConfig.from_hf(source.config).n_layer == LAYERS
    shapes = {name: w.hf_shape for name, w in weights_by_name(source).items()}
    shapes |= {LM_HEAD: shapes[EMBEDDING]} if form.startswith("bin") else {}
    assert {n: i.shape for n, i in source.tensors.items()} == shapes | {golden.SLOPES: (4, 1)}
    assert {str(info.dtype) for info in source.tensors.values()} == {"bfloat16"}
    total = sum(info.nbytes for name, info in source.tensors.items() if name != LM_HEAD)
    assert (
        write_random_checkpoint(tmp_path / "again", layers=LAYERS, form=form, preset="tiny")
        == total
    )
    again = open_hf(tmp_path / "again")
    for name in source.tensors:
        assert source.read_tensor(name).tobytes() == again.read_tensor(name).tobytes()


@pytest.mark.parametrize("form", FORMS)
def test_random_checkpoints_convert_and_verify(checkpoints, form, tmp_path):
    report = convert(checkpoints[form], tmp_path / "c")
    assert report.dtypes == {"bfloat16": report.tensors}
    assert verify(checkpoints[form], tmp_path / "c") and verify(tmp_path / "c")
    assert verify(checkpoints[form], checkpoints["safetensors"])
    assert verify(tmp_path / "c").digest == report.digest
    model, params = btlm.load(tmp_path / "c")
    assert np.isfinite(model.apply(params, np.arange(8)[None])).all()


def test_values_are_normal_and_equal_in_all_forms(sources):
    source = sources["safetensors"]
    for name, w in weights_by_name(source).items():
        values = source.read_tensor(name).astype(np.float32)
        if values.size > 1000:
            assert values.std() == pytest.approx(0.02, rel=0.05) and abs(values.mean()) < 2e-3
        if len(w.hf_shape) == 2:
            assert len({row.tobytes() for row in values}) == len(values)
    slopes = source.read_tensor(golden.SLOPES)
    assert (slopes[:, 0] == alibi.slopes(4).astype(ml_dtypes.bfloat16)).all()
    for form in FORMS:
        for name in source.tensors:
            assert sources[form].read_tensor(name).tobytes() == source.read_tensor(name).tobytes()


def test_no_two_tensors_are_equal(sources):
    source = sources["safetensors"]
    values = {n: source.read_tensor(n).reshape(-1)[:40].tobytes() for n in weights_by_name(source)}
    equal = [(a, b) for a, b in itertools.combinations(values, 2) if values[a] == values[b]]
    assert not equal


def test_no_two_blocks_of_a_tensor_are_equal(monkeypatch):
    monkeypatch.setattr(zarr, "BLOCK_BYTES", 1 << 10)
    tensor = random_checkpoint.TensorSpec("x", zarr.BF16, (50, 33))
    blocks = list(random_checkpoint._random(tensor))
    assert [len(b) for b in blocks] == [512, 512, 512, 114]
    assert len({b[:100].tobytes() for b in blocks}) == 4


@pytest.mark.parametrize("form", ["bin", "bin-sharded"])
def test_bin_agrees_with_the_pickle_reader(checkpoints, sources, form):
    files = sorted(checkpoints[form].glob("*.bin"))
    assert len(files) == (3 if form == "bin-sharded" else 1)
    names = []
    for path in files:
        file = TorchFile(path)
        names += file.tensors
        for name, (shape, dtype) in file.tensors.items():
            array, info = file.read_tensor(name), sources[form].tensors[name]
            assert (shape, dtype, path) == (info.shape, info.dtype, info.file)
            assert (
                array.tobytes()
                == sources["safetensors"]
                .read_tensor(EMBEDDING if name == LM_HEAD else name)
                .tobytes()
            )
            assert info.crc32 is not None  # every tensor fills its storage
    assert sorted(names) == sorted(sources[form].tensors)
    head, embedding = (sources[form].tensors[n] for n in (LM_HEAD, EMBEDDING))
    assert (head.file, head.offset) == (embedding.file, embedding.offset)  # stored once


def test_an_index_names_every_tensor(checkpoints):
    for form, name in (
        ("safetensors-sharded", "model.safetensors.index.json"),
        ("bin-sharded", "pytorch_model.bin.index.json"),
    ):
        index = json.loads((checkpoints[form] / name).read_text())
        files = set(os.listdir(checkpoints[form])) - {"config.json", name}
        assert set(index["weight_map"].values()) == files and len(files) == 3
        assert set(index["weight_map"]) == set(open_hf(checkpoints[form]).tensors)


@pytest.mark.parametrize("form", ["bin", "bin-sharded"])
def test_torch_reads_bin_files(checkpoints, sources, form):
    torch = pytest.importorskip("torch")
    tensors = {}
    for path in checkpoints[form].glob("*.bin"):
        tensors |= torch.load(path, weights_only=True)
    assert set(tensors) == set(sources[form].tensors)
    for name, tensor in tensors.items():
        assert (
            tensor.dtype == torch.bfloat16
            and tuple(tensor.shape) == sources[form].tensors[name].shape
        )
        array = tensor.contiguous().view(torch.int16).numpy()
        assert array.tobytes() == sources[form].read_tensor(name).tobytes()


def test_an_existing_directory_is_refused(checkpoints):
    with pytest.raises(FileExistsError):
        write_random_checkpoint(checkpoints["bin"], layers=1, form="safetensors", preset="tiny")
    assert not list(checkpoints["bin"].glob("*.safetensors"))
