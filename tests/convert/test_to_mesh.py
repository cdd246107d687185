"""`load_hf` gives the weights of `convert` and `load`, and reads no byte that is not needed.

One test runs two processes over the loopback, like two hosts of a cluster.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import btlm_jax as btlm
from btlm_jax import make_mesh
from btlm_jax.config import Positions
from btlm_jax.convert import convert, load_hf
from btlm_jax.convert.hf import source as hf_source
from btlm_jax.model import sharding, weights
from btlm_jax.model.params import Params, check_params, flatten_tree
from support import compiling, golden
from support.processes import free_port

MESHES = [dict(fsdp=8), dict(fsdp=4, tensor=2), dict(data=2, fsdp=2, tensor=2)]
# Sizes that no mesh divides: V 509 -> 512 on every one, F 171 -> 172 where tensor is 2.
ODD = dataclasses.replace(btlm.BTLMConfig.preset("tiny"), vocab_size=509, n_inner=171)
BIN = golden.GOLDEN / "btlm_bin"


def random_tensors(config: btlm.BTLMConfig, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    shapes = {leaf.hf_name: leaf.weight.hf_shape for leaf in weights.disk_leaves(config)}
    if config.positions is Positions.ALIBI:
        shapes[golden.SLOPES] = (config.n_head, 1)
    return {n: rng.standard_normal(shape).astype(dtype) for n, shape in shapes.items()}


def write(path: Path, config: btlm.BTLMConfig, tensors: dict[str, np.ndarray]) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config.to_hf()))
    save_file(tensors, path / "model.safetensors")
    return path


def stacked(config: btlm.BTLMConfig, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the expected weights in memory, stacked and unpadded, by path."""
    out = {}
    for w in weights.weight_table(config):
        names = [w.hf_name.format(layer=i) for i in range(config.n_layer if w.stacked else 1)]
        layers = [tensors[n].reshape(w.shape) for n in names]
        out[w.name] = np.stack(layers) if w.stacked else layers[0]
    return out


def assert_same(actual, expected) -> None:
    """Asserts equal bits, dtypes, shapes (padding included) and shardings."""
    (model, a), (other, b) = actual, expected
    assert model == other
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True):
        assert (x.dtype, x.shape, x.sharding) == (y.dtype, y.shape, y.sharding), path
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), path


def load_both_ways(source: Path, target: Path, **kwargs):
    """Loads directly, after checking that loading through Orbax gives the same."""
    if not target.exists():
        convert(source, target)
    direct = load_hf(source, **kwargs)
    assert_same(direct, btlm.load(target, **kwargs))
    return direct


def logits_error(case: golden.Case, model: btlm.BTLM, params: Params) -> float:
    """Returns the largest logits error of the golden prompts, repeated to divide any mesh."""
    model = dataclasses.replace(model, compute_dtype=jnp.float32)
    ids, rows = case["plain/input_ids"], case.exact_logits
    assert 8 % len(ids) == 0
    got = model.apply(params, np.tile(ids, (8 // len(ids), 1)))
    return golden.max_error(got, np.tile(rows, (8 // len(ids), 1, 1)))


def test_weights_load_onto_one_device(case, tmp_path):
    source = golden.write_hf(tmp_path / "hf", case)
    model, params = load_both_ways(source, tmp_path / "c")
    assert model.config == case.config
    dtype = jnp.bfloat16 if case.bf16 else jnp.float32
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
    if case.name == "a_btlm_mup_hd80":  # the others: test_convert.test_round_trip
        assert logits_error(case, model, params) < 5e-5


@pytest.mark.parametrize(
    "name, sizes",
    [
        ("f_learned_gelu_mup", dict(data=2, fsdp=2, tensor=2)),
        ("g_bf16", dict(fsdp=4, tensor=2)),
        ("i_untied", dict(fsdp=8)),
    ],
)
def test_weights_load_onto_meshes(name, sizes, tmp_path):
    case, mesh = golden.load(name), make_mesh(**sizes)
    source = golden.write_hf(tmp_path / "hf", case)
    model, params = load_both_ways(source, tmp_path / "c", mesh=mesh, dtype=jnp.float32)
    assert params["wte"].shape[0] == (98 if "tensor" in sizes else 97)
    assert logits_error(case, model, params) < 5e-5


@pytest.mark.parametrize(
    "sizes, stored",
    [(MESHES[0], np.float32), (MESHES[1], ml_dtypes.bfloat16), (MESHES[2], np.float16)],
    ids=str,
)
def test_padding_is_zero_and_dtypes_are_cast(sizes, stored, tmp_path):
    tensors, mesh = random_tensors(ODD, stored), make_mesh(**sizes)
    source = write(tmp_path / "hf", ODD, tensors)
    padding = {"vocab": 512} | ({"mlp": 172} if "tensor" in sizes else {})
    for dtype in (None, jnp.float32 if stored == ml_dtypes.bfloat16 else jnp.bfloat16):
        model, params = load_both_ways(source, tmp_path / "c", mesh=mesh, dtype=dtype)
        assert check_params(params, model.config) == padding
        flat = {"/".join(p): np.array(x) for p, x in flatten_tree(params).items()}
        for name, expected in stacked(ODD, tensors).items():
            inside = tuple(slice(n) for n in expected.shape)
            assert flat[name][inside].tobytes() == expected.astype(dtype or stored).tobytes()
            flat[name][inside] = 0
            assert not flat[name].any(), f"{name}: the padding is not zero"


@pytest.mark.parametrize("form", ["single", "sharded"])
@pytest.mark.parametrize("sizes", [None, dict(fsdp=8), dict(fsdp=4, tensor=2)], ids=str)
def test_bin_files_load_onto_meshes(form, sizes, tmp_path):
    mesh = make_mesh(**sizes) if sizes else None
    model, params = load_both_ways(BIN / form, tmp_path / "c", mesh=mesh)
    assert model.config.alibi_slopes == (0.83984375, 0.0625)
    with np.load(BIN / "weights.npz") as z:
        tensors = {name: z[name].view(ml_dtypes.bfloat16) for name in z.files}
    for path, x in flatten_tree(params).items():
        expected = stacked(model.config, tensors)["/".join(path)]
        inside = tuple(slice(n) for n in expected.shape)
        assert np.asarray(x)[inside].tobytes() == expected.tobytes()


def test_other_sharding_rules_are_followed(tmp_path):
    """The vocabulary is sharded over both axes, the width over none."""
    rules = tuple({**dict(sharding.RULES), "vocab": ("fsdp", "tensor"), "embed": None}.items())
    source = write(tmp_path / "hf", ODD, random_tensors(ODD))
    mesh = make_mesh(fsdp=4, tensor=2)
    model, params = load_both_ways(source, tmp_path / "c", mesh=mesh, rules=rules)
    assert model.rules == rules and params["wte"].addressable_shards[0].data.shape == (64, 64)


def test_layers_of_mixed_dtypes_need_a_dtype(tmp_path):
    mesh = make_mesh(fsdp=4, tensor=2)
    tensors = random_tensors(ODD)
    tensors["transformer.wte.weight"] = tensors["transformer.wte.weight"].astype(np.float16)
    source = write(tmp_path / "hf1", ODD, tensors)
    _, params = load_both_ways(source, tmp_path / "c1", mesh=mesh)  # a dtype per weight is fine
    assert params["wte"].dtype == jnp.float16 and params["ln_f"]["bias"].dtype == jnp.float32
    name = "transformer.h.1.mlp.c_fc.weight"
    tensors[name] = tensors[name].astype(ml_dtypes.bfloat16)
    source = write(tmp_path / "hf2", ODD, tensors)
    said = r"hf2: the layers of blocks/mlp/c_fc/kernel are stored as bfloat16, float32.*pass dtype="
    with pytest.raises(ValueError, match=said):
        load_hf(source)
    load_both_ways(source, tmp_path / "c2", dtype=jnp.float32)


def test_bad_sources_and_meshes_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_hf(tmp_path / "nowhere")
    source = write(tmp_path / "hf", ODD, random_tensors(ODD))
    with pytest.raises(ValueError, match=r"does not divide over.*fsdp.*7"):
        load_hf(source, make_mesh(fsdp=7, devices=jax.devices()[:7]))
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"model\.safetensors: truncated"):
        load_hf(source)


def test_a_damaged_bin_is_found_where_whole_tensors_are_read(tmp_path):
    (tmp_path / "config.json").write_bytes((BIN / "single/config.json").read_bytes())
    raw = bytearray((BIN / "single/pytorch_model.bin").read_bytes())
    with np.load(BIN / "weights.npz") as z:
        raw[raw.index(z["transformer.h.1.mlp.c_fc.weight"].tobytes())] ^= 1
    (tmp_path / "pytorch_model.bin").write_bytes(raw)
    with pytest.raises(ValueError, match="checksum mismatch"):
        convert(tmp_path, tmp_path / "c")
    with pytest.raises(ValueError, match="checksum mismatch"):
        load_hf(tmp_path)


@pytest.mark.parametrize("sizes", [None, *MESHES], ids=str)
def test_every_byte_is_read_once(sizes, tmp_path, monkeypatch):
    source = write(tmp_path / "hf", ODD, random_tensors(ODD))
    read, spans = hf_source.read_into, []

    def counting(file, offset, out):
        spans.append((offset, offset + out.nbytes))
        read(file, offset, out)

    monkeypatch.setattr(hf_source, "read_into", counting)
    load_hf(source, make_mesh(**sizes) if sizes else None)
    times = np.zeros((source / "model.safetensors").stat().st_size, np.int8)
    for start, stop in spans:
        times[start:stop] += 1
    tensors = hf_source.open_hf(source).tensors
    for name, info in tensors.items():
        assert (times[info.offset : info.offset + info.nbytes] == 1).all(), name
    assert times.sum() == sum(info.nbytes for info in tensors.values())
    # No read is larger than the part of one tensor that one device needs.
    matrices = [i.nbytes for i in tensors.values() if len(i.shape) == 2 and min(i.shape) > 1]
    parts = np.prod([n for axis, n in (sizes or {}).items() if axis != "data"])
    largest = max(stop - start for start, stop in spans)
    assert largest <= max(max(matrices) / parts * 512 / 509, 3 * 64 * 4)


PROCESS = """
import json, sys
from pathlib import Path
import jax
rank, port, source, out = int(sys.argv[1]), sys.argv[2], sys.argv[3], Path(sys.argv[4])
jax.distributed.initialize(f"127.0.0.1:{port}", 2, rank, initialization_timeout=60)
assert (jax.process_count(), jax.device_count(), jax.local_device_count()) == (2, 8, 4)
import numpy as np
from btlm_jax import make_mesh
from btlm_jax.model.params import flatten_tree
from btlm_jax.convert import load_hf
from btlm_jax.convert.hf import source as hf_source

read, counted = hf_source.read_into, []
def counting(file, offset, out):
    counted.append(out.nbytes)
    read(file, offset, out)
hf_source.read_into = counting

report = {}
for k, sizes in enumerate(json.loads(sys.argv[5])):
    counted.clear()
    model, params = load_hf(source, make_mesh(**sizes))
    arrays, places = {}, []
    for path, x in flatten_tree(params).items():
        for shard in x.addressable_shards:
            bounds = [s.indices(n)[:2] for s, n in zip(shard.index, x.shape)]
            arrays[str(len(places))] = np.asarray(shard.data)
            places.append(["/".join(path), x.shape, bounds])
    np.savez(out / f"{rank}-{k}.npz", **arrays)
    (out / f"{rank}-{k}.json").write_text(json.dumps({"read": sum(counted), "places": places}))
"""


def run_two(source: Path, out: Path, meshes: list[dict]) -> None:
    """Runs PROCESS twice, with 4 devices each, and waits for both."""
    env = compiling.one_device() | {"JAX_NUM_CPU_DEVICES": "4"}
    arguments = [str(free_port()), str(source), str(out), json.dumps(meshes)]
    logs = [out / "0.log", out / "1.log"]
    processes: list[subprocess.Popen] = []
    try:
        for rank, log in enumerate(logs):
            with log.open("w") as file:
                command = [sys.executable, "-c", PROCESS, str(rank), *arguments]
                processes.append(subprocess.Popen(command, env=env, stdout=file, stderr=file))
        codes = [p.wait(timeout=180) for p in processes]
    finally:
        for p in processes:
            p.kill()
            p.wait()
    assert codes == [0, 0], "\n".join(log.read_text()[-3000:] for log in logs)


def test_each_of_two_processes_reads_only_its_own_shards(tmp_path):
    """And every shard is the right part of its tensor."""
    tensors = random_tensors(ODD)
    source = write(tmp_path / "hf", ODD, tensors)
    meshes = [dict(fsdp=8), dict(data=2, fsdp=2, tensor=2)]
    run_two(source, tmp_path, meshes)
    matrices = sum(x.nbytes for x in tensors.values() if min(x.shape) > 1 and x.ndim == 2)
    small = sum(x.nbytes for x in tensors.values()) - matrices  # on every device
    assert small < matrices / 20
    for k, sizes in enumerate(meshes):
        covered: dict[str, Any] = defaultdict(lambda: 0)
        for rank in range(2):
            report = json.loads((tmp_path / f"{rank}-{k}.json").read_text())
            # Halves of fsdp=8; with data=2 each process holds one replica.
            assert report["read"] == small + (matrices // 2 if k == 0 else matrices)
            with np.load(tmp_path / f"{rank}-{k}.npz") as shards:
                for i, (name, shape, bounds) in enumerate(report["places"]):
                    padded = np.zeros(shape, np.float32)
                    reference = stacked(ODD, tensors)[name]
                    padded[tuple(slice(n) for n in reference.shape)] = reference
                    index = tuple(slice(a, b) for a, b in bounds)
                    assert shards[str(i)].tobytes() == padded[index].tobytes(), (sizes, name)
                    mark = np.zeros(shape, np.int8)
                    mark[index] = 1
                    covered[name] = covered[name] + mark
        assert set(covered) == set(stacked(ODD, tensors))
        copies = {name: set(mark.reshape(-1)) for name, mark in covered.items()}
        assert copies["wte"] == copies["blocks/mlp/c_proj/kernel"] == {1 if k == 0 else 2}
        assert copies["blocks/ln_1/scale"] == {8} and all(len(c) == 1 for c in copies.values())
