"""Model configuration: one frozen dataclass, read from and written to Hugging Face `config.json`.

Field names are those of the released `config.json`. The siblings of BTLM spell the muP fields
differently; `BTLMConfig.from_hf` understands every flavor and the dataclass holds one meaning.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from btlm_jax.presets import MUP_BASE_WIDTH, PRESETS

ACTIVATIONS = ("swiglu", "gelu", "gelu_new")
POSITION_EMBEDDINGS = ("alibi", "learned")
MODEL_TYPES = ("btlm", "jais")
# The original modelling code, to which the config.json of an export refers.
_CODE = "cerebras/btlm-3b-8k-base--"
# Fields that no config.json has a key for.
_OURS = ("alibi_slopes", "completep_base_layers", "completep_alpha")


@dataclasses.dataclass(frozen=True)
class AlibiScaling:
    """Linear position interpolation: distances are divided by a scale.

    Exactly one is set: `factor`, the scale at every length, or `train_seq_len` T0, for a scale of
    `S / T0` once the number of keys S exceeds T0 (dynamic scaling).
    """

    factor: float | None = None
    train_seq_len: int | None = None

    def __post_init__(self) -> None:
        if (self.factor is None) == (self.train_seq_len is None):
            raise ValueError(
                f"alibi_scaling: found factor={self.factor!r} and train_seq_len="
                f"{self.train_seq_len!r}, expected exactly one of them"
            )
        factor, length = self.factor, self.train_seq_len
        if factor is not None and not (isinstance(factor, float) and 1.0 < factor < math.inf):
            raise ValueError(
                f"alibi_scaling.factor: found {factor!r}, expected a float > 1.0 (such as 4.0)"
            )
        if length is not None and not (_is_int(length) and length > 1):
            raise ValueError(f"alibi_scaling.train_seq_len: found {length!r}, expected an int > 1")

    @classmethod
    def from_hf(cls, value: Any) -> AlibiScaling | None:
        """Parses the `alibi_scaling` entry; the rules are those of the original configuration."""
        if value is None:
            return None
        if not isinstance(value, Mapping) or len(value) != 2 or value.get("type") != "linear":
            raise ValueError(
                f"alibi_scaling: found {value!r}, expected null, "
                '{"type": "linear", "factor": float > 1.0} or '
                '{"type": "linear", "train_seq_len": int > 1}'
            )
        (key,) = set(value) - {"type"}
        if key not in ("factor", "train_seq_len"):
            raise ValueError(
                f"alibi_scaling: found the entry {key!r}, expected 'factor' or 'train_seq_len'"
            )
        return cls(**{key: value[key]})

    def to_hf(self) -> dict[str, Any]:
        """Returns the `alibi_scaling` entry of a `config.json`."""
        if self.factor is not None:
            return {"type": "linear", "factor": self.factor}
        return {"type": "linear", "train_seq_len": self.train_seq_len}


@dataclasses.dataclass(frozen=True)
class BTLMConfig:
    """Everything that defines the function a BTLM checkpoint computes.

    Dimensions: D = n_embd, H = n_head, K = head_dim, F = n_inner, V = vocab_size, L = n_layer.
    The defaults are those of the original configuration class, which are not the released model's;
    use `BTLMConfig.preset("btlm-3b-8k")` for that. Dropout probabilities are carried, so that a
    `config.json` round-trips, and dropout is not implemented: inference never needs it, and
    training refuses a probability above zero (`require_no_dropout`).

    `alibi_slopes` are the H slopes stored in a checkpoint, exactly (the released one stores them
    rounded to bf16); None means the exact slopes of `alibi.slopes`.

    `completep_base_layers` L0 turns on CompleteP (arXiv 2505.01618), so that hyper-parameters tuned
    at depth L0 hold at depth L: residual branches are multiplied by (L0 / L)**completep_alpha,
    their out-projections start without the 1 / sqrt(2 L), and `mup` follows. Alpha is in [0.5, 1];
    1 is CompleteP proper. The original and all published weights are without.

    Raises:
      ValueError: one or more fields are invalid or unsupported; every one is named.
    """

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int = 0  # 0 (null in config.json) stands for 4 * n_embd and is resolved on creation
    activation_function: str = "gelu_new"
    position_embedding_type: str = "learned"
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    scale_attn_weights: bool = True
    tie_word_embeddings: bool = True
    alibi_scaling: AlibiScaling | None = None
    mup_width_scale: float = 1.0
    mup_embeddings_scale: float = 1.0
    mup_output_alpha: float = 1.0
    mup_scale_qk_dot_by_d: bool = False
    resid_pdrop: float = 0.1
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    bos_token_id: int | None = 50256
    eos_token_id: int | None = 50256
    pad_token_id: int | None = None
    alibi_slopes: tuple[float, ...] | None = None
    completep_base_layers: int | None = None
    completep_alpha: float = 1.0

    def __post_init__(self) -> None:
        if self.n_inner in (0, None):
            object.__setattr__(self, "n_inner", 4 * self.n_embd)
        problems = list(_problems(self))
        if problems:
            raise ValueError("invalid BTLM configuration:\n  " + "\n  ".join(problems))

    # Derived quantities -------------------------------------------------------------------------

    @property
    def head_dim(self) -> int:
        """K, the width of one attention head."""
        return self.n_embd // self.n_head

    @property
    def alibi(self) -> bool:
        """Whether positions enter as ALiBi (the alternative is a learned embedding)."""
        return self.position_embedding_type == "alibi"

    @property
    def gated(self) -> bool:
        """Whether the MLP is SwiGLU (two input projections)."""
        return self.activation_function == "swiglu"

    @property
    def attention_scale(self) -> float:
        """The factor on q·k: K**-1 under muP, K**-0.5 otherwise, 1 when unscaled."""
        if not self.scale_attn_weights:
            return 1.0
        return float(self.head_dim) ** (-1.0 if self.mup_scale_qk_dot_by_d else -0.5)

    @property
    def logits_scale(self) -> float:
        """The factor on the logits, mup_output_alpha * mup_width_scale."""
        return self.mup_output_alpha * self.mup_width_scale

    @property
    def residual_scale(self) -> float:
        """The factor on what attention and MLP add to the residual stream; 1 without CompleteP."""
        if self.completep_base_layers is None:
            return 1.0
        return (self.completep_base_layers / self.n_layer) ** self.completep_alpha

    def require_no_dropout(self) -> None:
        """Raises ValueError if any dropout probability is above zero. Training calls it."""
        rates = {n: getattr(self, n) for n in ("resid_pdrop", "embd_pdrop", "attn_pdrop")}
        if any(rates.values()):
            raise ValueError(
                f"training with dropout is not implemented: found {rates}, expected 0.0. BTLM was "
                "trained without; use dataclasses.replace(config, resid_pdrop=0.0, "
                "embd_pdrop=0.0, attn_pdrop=0.0)"
            )

    # Constructors -------------------------------------------------------------------------------

    @classmethod
    def from_hf(cls, source: str | Path | Mapping[str, Any]) -> BTLMConfig:
        """Reads a Hugging Face configuration, of BTLM or of a sibling.

        Args:
          source: the parsed dict, the path of a `config.json`, or a directory that holds one.

        Keys that are absent take the original class's defaults, as they do in the original; keys
        that only matter to the PyTorch code are ignored.

        Raises:
          FileNotFoundError: no such file.
          ValueError: invalid JSON, or a field that is invalid or cannot be honoured.
        """
        raw = source if isinstance(source, Mapping) else read_config_json(source)
        _refuse_unsupported(raw)
        names = [f.name for f in dataclasses.fields(cls) if f.name not in _OURS]
        values = {n: raw[n] for n in names if n in raw}
        if values.get("n_inner") is None:
            values["n_inner"] = 0
        values["alibi_scaling"] = AlibiScaling.from_hf(raw.get("alibi_scaling"))
        values.update(_mup_fields(raw))
        return cls(**values)

    def to_hf(self) -> dict[str, Any]:
        """Returns the `config.json` of the released flavor.

        Its `auto_map` names the original modelling code on the Hub.

        Raises:
          ValueError: CompleteP, which that code does not know.
        """
        if self.completep_base_layers is not None:
            raise ValueError(
                f"completep_base_layers: found {self.completep_base_layers}; neither config.json "
                "nor the original modelling code has a factor on residual branches. Multiply it "
                "into the weights first: model, params = btlm.load(CHECKPOINT); btlm.save(FOLDED, "
                "*btlm.fold_completep(model.config, params))"
            )
        fields = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if f.name not in (*_OURS, "alibi_scaling")
        }
        return {
            "architectures": ["BTLMLMHeadModel"],
            "model_type": "btlm",
            "auto_map": {
                "AutoConfig": f"{_CODE}configuration_btlm.BTLMConfig",
                "AutoModel": f"{_CODE}modeling_btlm.BTLMModel",
                "AutoModelForCausalLM": f"{_CODE}modeling_btlm.BTLMLMHeadModel",
            },
            **fields,
            "alibi_scaling": self.alibi_scaling.to_hf() if self.alibi_scaling else None,
            "scale_attn_by_inverse_layer_idx": False,
            "use_cache": True,
        }

    @classmethod
    def preset(cls, name: str) -> BTLMConfig:
        """Returns a named configuration; `PRESETS` lists the names.

        Raises:
          ValueError: unknown name; the message lists the valid ones.
        """
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}; the presets are {', '.join(PRESETS)}")
        return cls(**PRESETS[name])


def read_config_json(path: str | Path) -> dict[str, Any]:
    """Reads a `config.json` (or the one in a directory) into a dict.

    Raises:
      FileNotFoundError: no such file.
      ValueError: not a JSON object; the message names the file and the position.
    """
    path = Path(path)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a Hugging Face config.json")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise ValueError(f"{path}: not valid JSON ({e}); fetch the file again") from e
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: found a JSON {type(raw).__name__}, expected an object")
    return raw


def _is_int(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


def _is_number(x: Any) -> bool:
    if isinstance(x, bool) or not isinstance(x, int | float):
        return False
    return abs(x) < math.inf if isinstance(x, float) else abs(x) < 1 << 1023


def _problems(c: BTLMConfig):
    """Yields one line for every invalid field of a configuration."""

    def bad(name: str, expected: str) -> str:
        return f"{name}: found {getattr(c, name)!r}, expected {expected}"

    sizes = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner")
    bad_sizes = [n for n in sizes if not (_is_int(getattr(c, n)) and getattr(c, n) > 0)]
    yield from (bad(n, "a positive int") for n in bad_sizes)
    if not {"n_embd", "n_head"} & set(bad_sizes) and c.n_embd % c.n_head:
        yield (
            f"n_embd: found {c.n_embd}, expected a multiple of n_head = {c.n_head} "
            f"(the remainder is {c.n_embd % c.n_head})"
        )
    if c.activation_function not in ACTIVATIONS:
        yield bad("activation_function", "one of " + ", ".join(ACTIVATIONS))
    if c.position_embedding_type not in POSITION_EMBEDDINGS:
        yield bad("position_embedding_type", "one of " + ", ".join(POSITION_EMBEDDINGS))
    positive = ("layer_norm_epsilon", "initializer_range", "mup_width_scale")
    for name in (*positive, "mup_embeddings_scale", "mup_output_alpha"):
        if not (_is_number(getattr(c, name)) and getattr(c, name) > 0):
            yield bad(name, "a number > 0")
    for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
        if not (_is_number(getattr(c, name)) and 0 <= getattr(c, name) < 1):
            yield bad(name, "a number in [0, 1)")
    for name in ("scale_attn_weights", "tie_word_embeddings", "mup_scale_qk_dot_by_d"):
        if not isinstance(getattr(c, name), bool):
            yield bad(name, "true or false")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        token = getattr(c, name)
        if token is not None and not (_is_int(token) and token >= 0):
            yield bad(name, "null or a token id >= 0")
    base = c.completep_base_layers
    if base is not None and not (_is_int(base) and base > 0):
        yield bad("completep_base_layers", "None or a positive int")
    if not (_is_number(c.completep_alpha) and 0.5 <= c.completep_alpha <= 1):
        yield bad("completep_alpha", "a number in [0.5, 1]")
    elif base is None and c.completep_alpha != 1:
        yield bad("completep_alpha", "1.0 without completep_base_layers: set that too")
    if c.alibi_scaling is not None and not isinstance(c.alibi_scaling, AlibiScaling):
        yield bad("alibi_scaling", "None or an AlibiScaling")
    elif c.alibi_scaling is not None and c.position_embedding_type != "alibi":
        yield bad("alibi_scaling", f"null with position_embedding_type {c.position_embedding_type}")
    if c.alibi_slopes is not None:
        finite = isinstance(c.alibi_slopes, tuple) and all(_is_number(s) for s in c.alibi_slopes)
        if not finite or len(c.alibi_slopes) != c.n_head:
            yield bad("alibi_slopes", f"None or a tuple of n_head = {c.n_head} finite floats")


def _refuse_unsupported(raw: Mapping[str, Any]) -> None:
    """Refuses fields of a config.json that change the computation and are not implemented."""
    rotary = raw.get("rotary_dim") or raw.get("position_embedding_type") == "rotary"
    problems = []
    if raw.get("model_type", "btlm") not in MODEL_TYPES:
        problems.append(
            f"model_type: found {raw['model_type']!r}, expected one of {', '.join(MODEL_TYPES)}"
        )
    if rotary:
        problems.append(
            f"rotary_dim={raw.get('rotary_dim')!r}, position_embedding_type="
            f"{raw.get('position_embedding_type')!r}: rotary positions (Crystal) are not supported,"
            " expected alibi or learned positions"
        )
    for name in ("scale_attn_by_inverse_layer_idx", "add_cross_attention", "is_encoder_decoder"):
        if raw.get(name):
            problems.append(f"{name}: found {raw[name]!r}, expected false: it is not supported")
    for name in ("completep_base_layers", "completep_alpha"):
        if name in raw:
            problems.append(
                f"{name}: found {raw[name]!r}, expected no such key: the original code would "
                "ignore it. Set it with dataclasses.replace, or in model.fields of a recipe"
            )
    if raw.get("quantization_config"):
        problems.append("quantization_config: quantized checkpoints are not supported as a source")
    if problems:
        raise ValueError("unsupported BTLM configuration:\n  " + "\n  ".join(problems))


def _mup_fields(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Translates the muP keys of the siblings into those of the released flavor.

    `output_logits_scale` marks the BTLM of July 2023; `width_scale` without it marks Jais-13b,
    where it is the logits scale and the width scale follows from the base width of 256.
    """
    old = {
        "mup_embeddings_scale": "embeddings_scale",
        "mup_scale_qk_dot_by_d": "scale_qk_dot_by_d",
    }
    fields = {new: raw[key] for new, key in old.items() if key in raw}
    both = [f"{key} and {new}" for new, key in old.items() if key in raw and new in raw]
    if both or ("width_scale" in raw and "mup_width_scale" in raw):
        raise ValueError(
            f"config.json mixes two key flavors ({', '.join(both) or 'width_scale'}): keep the "
            "mup_* keys or the old ones, not both"
        )
    if "output_logits_scale" in raw:
        width_scale, logits_scale = raw.get("width_scale", 1.0), raw["output_logits_scale"]
    elif "width_scale" in raw:
        if not (_is_int(raw.get("n_embd")) and raw["n_embd"] > 0):
            raise ValueError("width_scale without n_embd: expected n_embd, the model's width")
        width_scale, logits_scale = MUP_BASE_WIDTH / raw["n_embd"], raw["width_scale"]
    else:
        return fields
    for name, value in (("width_scale", width_scale), ("output_logits_scale", logits_scale)):
        if not (_is_number(value) and value > 0):
            raise ValueError(f"{name}: found {value!r}, expected a number > 0")
    return fields | {
        "mup_width_scale": width_scale,
        "mup_output_alpha": _quotient(logits_scale, width_scale),
    }


def _quotient(product: float, factor: float) -> float:
    """Returns q with q * factor == product in float64 where one exists next to product / factor."""
    q = product / factor
    candidates = (q, math.nextafter(q, math.inf), math.nextafter(q, -math.inf))
    return next((x for x in candidates if x * factor == product), q)
