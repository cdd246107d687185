"""The golden cases: tiny models with the outputs of the original PyTorch code (tests/golden)."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from btlm_jax import BTLM, BTLMConfig
from btlm_jax.model import weights
from btlm_jax.model.params import Params, flatten_tree, unflatten_tree

GOLDEN = Path(__file__).parents[1] / "golden"
NAMES = (
    "a_btlm_mup_hd80",
    "a2_btlm_mup_h32",
    "b_sp_alibi",
    "c_heads12",
    "d_alibi_factor4",
    "e_alibi_dynamic16",
    "f_learned_gelu_mup",
    "g_bf16",
    "i_untied",
)
SLOPES = "transformer.relative_pe.slopes"


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """One golden file, and the model it describes computing in fp32."""

    name: str
    arrays: dict[str, np.ndarray]
    hf_config: dict[str, Any]
    config: BTLMConfig
    params: Params

    def __getitem__(self, key: str) -> np.ndarray:
        return self.arrays[key]

    def __contains__(self, key: str) -> bool:
        return key in self.arrays

    @property
    def model(self) -> BTLM:
        return BTLM(self.config, compute_dtype=jnp.float32)

    @property
    def bf16(self) -> bool:
        return self.name == "g_bf16"

    @property
    def weights(self) -> dict[str, np.ndarray]:
        """The weights by Hugging Face name, in the dtype of the original checkpoint."""
        dtype = ml_dtypes.bfloat16 if self.bf16 else np.float32
        prefix = "weights/"
        named = {k.removeprefix(prefix): v for k, v in self.arrays.items() if k.startswith(prefix)}
        return {k: v.astype(dtype) for k, v in named.items()}

    @property
    def exact_logits(self) -> np.ndarray:
        """The logits of the original, in the highest precision that is stored."""
        return self["plain/logits_upcast_f32" if self.bf16 else "plain/logits_f64"]


@functools.cache
def load(name: str) -> Case:
    with np.load(GOLDEN / f"{name}.npz") as z:
        arrays = {key: z[key] for key in z.files}
    hf_config = json.loads(str(arrays["config_json"]))
    config = BTLMConfig.from_hf(hf_config)
    if f"weights/{SLOPES}" in arrays:
        stored = arrays[f"weights/{SLOPES}"].ravel()
        config = dataclasses.replace(config, alibi_slopes=tuple(float(s) for s in stored))
    flat = {}
    for w in weights.weight_table(config):
        if w.stacked:
            names = [w.hf_name.format(layer=i) for i in range(config.n_layer)]
            layers = [arrays[f"weights/{n}"].reshape(w.shape) for n in names]
            flat[w.path] = jnp.asarray(np.stack(layers))
        else:
            flat[w.path] = jnp.asarray(arrays[f"weights/{w.hf_name}"].reshape(w.shape))
    return Case(name, arrays, hf_config, config, unflatten_tree(flat))


def on_cases(*names: str):
    """Runs a test on some golden cases, as its argument `case`."""
    return pytest.mark.parametrize("case", names, indirect=True)


def random_weights(config: BTLMConfig, rng: np.random.Generator) -> Params:
    """Returns weights around their means, also of biases, without compiling `init`."""
    draws = {
        w.path: w.mean + 0.1 * rng.normal(size=weights.stacked_shape(w, config))
        for w in weights.weight_table(config)
    }
    return unflatten_tree({path: x.astype(np.float32) for path, x in draws.items()})


def by_hf_name(config: BTLMConfig, params: Params) -> dict[str, np.ndarray]:
    """Returns a stacked tree as flat arrays with Hugging Face names and shapes."""
    flat, out = flatten_tree(params), {}
    for leaf in weights.disk_leaves(config):
        x = np.asarray(flat[leaf.weight.path])
        x = x if leaf.layer is None else x[leaf.layer]
        out[leaf.hf_name] = x.reshape(leaf.weight.hf_shape)
    return out


def reference_config(config: BTLMConfig) -> dict[str, Any]:
    """Returns a configuration for `reference_numpy`, with CompleteP."""
    completep = {n: getattr(config, n) for n in ("completep_base_layers", "completep_alpha")}
    plain = dataclasses.replace(config, completep_base_layers=None, completep_alpha=1.0)
    return plain.to_hf() | completep


def sample(a: np.ndarray) -> np.ndarray:
    """Returns the entries of a large array that golden files store."""
    if a.size <= 512:
        return a
    return a.reshape(-1)[np.linspace(0, a.size - 1, 512).astype(np.int64)]


def write_hf(path: Path, case: Case, *, tokenizer: bool = False) -> Path:
    """Writes a golden model as a Hugging Face directory with one safetensors file."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(case.hf_config))
    save_file(case.weights, path / "model.safetensors", metadata={"format": "pt"})
    if tokenizer:
        write_tokenizer(path, case.config.vocab_size)
    return path


def write_tokenizer(path: Path, vocab_size: int) -> None:
    """Writes a character-level tokenizer of printable ASCII as tokenizer.json."""
    from tokenizers import Tokenizer, decoders, models

    tokens = [chr(c) for c in range(32, 127)][: vocab_size - 1] + ["<|endoftext|>"]
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, [], unk_token=None))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(path / "tokenizer.json"))


def max_error(a: Any, b: Any, where: Any = None) -> float:
    """Returns the largest absolute difference, of the entries `where` if given."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape, (a.shape, b.shape)
    difference = np.abs(a - b)
    return float((difference if where is None else difference[where]).max())
