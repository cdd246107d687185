"""The model configuration: one frozen dataclass.

Field names are those of the released `config.json`, which `hf_config` reads and writes.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from btlm_jax.presets import PRESETS

ACTIVATIONS = ("swiglu", "gelu", "gelu_new")


class Positions(enum.StrEnum):
    """How positions of tokens enter the model: the values of `position_embedding_type`."""

    ALIBI = "alibi"  # as a bias on attention logits, linear in the distance
    LEARNED = "learned"  # as an embedding, added to that of the token


@dataclasses.dataclass(frozen=True)
class AlibiScaling:
    """Linear position interpolation: distances are divided by a scale.

    Exactly one attribute is set.

    Attributes:
      factor: the scale, at every length.
      train_seq_len: the length T0 of dynamic scaling: the scale is `S / T0` once the number of keys
        S exceeds T0, and 1 up to there.

    Raises:
      ValueError: both or neither are set, or one has an invalid value.
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
        if length is not None and not (is_int(length) and length > 1):
            raise ValueError(f"alibi_scaling.train_seq_len: found {length!r}, expected an int > 1")

    @classmethod
    def from_hf(cls, value: Any) -> AlibiScaling | None:
        """Parses the `alibi_scaling` entry of a `config.json`; null is None."""
        from btlm_jax import hf_config

        return hf_config.alibi_scaling_from_hf(value)

    def to_hf(self) -> dict[str, Any]:
        """Returns the `alibi_scaling` entry of a `config.json`."""
        from btlm_jax import hf_config

        return hf_config.alibi_scaling_to_hf(self)


@dataclasses.dataclass(frozen=True)
class BTLMConfig:
    """Everything that defines the function a BTLM checkpoint computes.

    Dimensions: D = n_embd, H = n_head, K = head_dim, F = n_inner, V = vocab_size, L = n_layer.
    The defaults are those of the original configuration class, not those of the released model:
    use `BTLMConfig.preset("btlm-3b-8k")` for that. Dropout probabilities are stored so that a
    `config.json` round-trips, but dropout is not implemented: inference never needs it, and
    training refuses a probability above zero (`require_no_dropout`).

    `eos_token_id` may be a tuple of several ids, each of which ends a text.

    `alibi_slopes` are the H slopes stored in a checkpoint, exactly (the released one stores them
    rounded to bf16); None means the exact slopes of `alibi.slopes`.

    `completep_base_layers` L0 turns on CompleteP (arXiv 2505.01618), so that hyper-parameters tuned
    at depth L0 hold at depth L: residual branches are multiplied by (L0 / L)**completep_alpha,
    their out-projections start without the 1 / sqrt(2 L), and `mup` scales learning rates, epsilon
    and weight decay to match. Alpha is in [0.5, 1]; 1 is CompleteP proper. The original code and
    all published weights do not use it.

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
    eos_token_id: int | tuple[int, ...] | None = 50256
    pad_token_id: int | None = None
    alibi_slopes: tuple[float, ...] | None = None
    completep_base_layers: int | None = None
    completep_alpha: float = 1.0

    def __post_init__(self) -> None:
        if self.n_inner in (0, None):
            object.__setattr__(self, "n_inner", 4 * self.n_embd)
        problems = list(_invalid_fields(self))
        if problems:
            raise ValueError("invalid BTLM configuration:\n  " + "\n  ".join(problems))

    # Derived quantities -------------------------------------------------------------------------

    @property
    def head_dim(self) -> int:
        """K, the width of one attention head."""
        return self.n_embd // self.n_head

    @property
    def positions(self) -> Positions:
        """How positions of tokens enter the model."""
        return Positions(self.position_embedding_type)

    @property
    def position_limit(self) -> int | None:
        """The number of tokens that the model can read at most; None if there is no limit."""
        return self.n_positions if self.positions is Positions.LEARNED else None

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The ids that end a text: none, one or several."""
        value = self.eos_token_id
        return value if isinstance(value, tuple) else () if value is None else (value,)

    @property
    def gated(self) -> bool:
        """Whether the MLP is SwiGLU, with two input projections."""
        return self.activation_function == "swiglu"

    @property
    def attention_scale(self) -> float:
        """The factor on q·k: K**-1 under muP, K**-0.5 otherwise, 1 without scaling."""
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

    # Constructors and export --------------------------------------------------------------------

    @classmethod
    def from_hf(cls, source: str | Path | Mapping[str, Any]) -> BTLMConfig:
        """Reads a Hugging Face configuration of BTLM or one of its siblings.

        Args:
          source: the parsed dict, the path of a `config.json`, or a directory that holds one.

        Missing keys take the defaults of the original class, as they do in the original; keys that
        only matter to the PyTorch code are ignored.

        Raises:
          FileNotFoundError: no such file.
          ValueError: invalid JSON, or a field that is invalid or not supported.
        """
        from btlm_jax import hf_config

        raw = source if isinstance(source, Mapping) else hf_config.read_config_json(source)
        return hf_config.config_from_hf(raw)

    def to_hf(self) -> dict[str, Any]:
        """Returns the `config.json` in the flavor of the released model.

        Its `auto_map` names the original modelling code on the Hub.

        Raises:
          ValueError: CompleteP is on, which that code does not support.
        """
        from btlm_jax import hf_config

        return hf_config.config_to_hf(self)

    @classmethod
    def preset(cls, name: str) -> BTLMConfig:
        """Returns a named configuration; `PRESETS` lists the names.

        Raises:
          ValueError: unknown name; the message lists the valid ones.
        """
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}; the presets are {', '.join(PRESETS)}")
        return cls(**PRESETS[name])


def is_int(x: Any) -> bool:
    """Returns whether `x` is an int and not a bool."""
    return isinstance(x, int) and not isinstance(x, bool)


def is_number(x: Any) -> bool:
    """Returns whether `x` is an int or float, not a bool, that float64 holds as a finite number."""
    if isinstance(x, bool) or not isinstance(x, int | float):
        return False
    return abs(x) < math.inf if isinstance(x, float) else abs(x) < 1 << 1023


def _invalid_fields(c: BTLMConfig) -> Iterator[str]:
    """Yields one line for every invalid field of a configuration."""

    def invalid(name: str, expected: str) -> str:
        return f"{name}: found {getattr(c, name)!r}, expected {expected}"

    sizes = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner")
    invalid_sizes = [n for n in sizes if not (is_int(getattr(c, n)) and getattr(c, n) > 0)]
    yield from (invalid(n, "a positive int") for n in invalid_sizes)
    if not {"n_embd", "n_head"} & set(invalid_sizes) and c.n_embd % c.n_head:
        yield (
            f"n_embd: found {c.n_embd}, expected a multiple of n_head = {c.n_head} "
            f"(the remainder is {c.n_embd % c.n_head})"
        )
    if c.activation_function not in ACTIVATIONS:
        yield invalid("activation_function", "one of " + ", ".join(ACTIVATIONS))
    if c.position_embedding_type not in tuple(Positions):
        yield invalid("position_embedding_type", "one of " + ", ".join(Positions))
    positive = ("layer_norm_epsilon", "initializer_range", "mup_width_scale")
    for name in (*positive, "mup_embeddings_scale", "mup_output_alpha"):
        if not (is_number(getattr(c, name)) and getattr(c, name) > 0):
            yield invalid(name, "a number > 0")
    for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
        if not (is_number(getattr(c, name)) and 0 <= getattr(c, name) < 1):
            yield invalid(name, "a number in [0, 1)")
    for name in ("scale_attn_weights", "tie_word_embeddings", "mup_scale_qk_dot_by_d"):
        if not isinstance(getattr(c, name), bool):
            yield invalid(name, "true or false")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        token = getattr(c, name)
        several = name == "eos_token_id" and isinstance(token, tuple)
        tokens = token if several else () if token is None else (token,)
        if not all(is_int(t) and t >= 0 for t in tokens):
            yield invalid(name, "null or a token id >= 0")
    base = c.completep_base_layers
    if base is not None and not (is_int(base) and base > 0):
        yield invalid("completep_base_layers", "None or a positive int")
    if not (is_number(c.completep_alpha) and 0.5 <= c.completep_alpha <= 1):
        yield invalid("completep_alpha", "a number in [0.5, 1]")
    elif base is None and c.completep_alpha != 1:
        yield invalid("completep_alpha", "1.0 without completep_base_layers: set that too")
    if c.alibi_scaling is not None and not isinstance(c.alibi_scaling, AlibiScaling):
        yield invalid("alibi_scaling", "None or an AlibiScaling")
    elif c.alibi_scaling is not None and c.position_embedding_type != Positions.ALIBI:
        yield invalid(
            "alibi_scaling", f"null with position_embedding_type {c.position_embedding_type}"
        )
    if c.alibi_slopes is not None:
        finite = isinstance(c.alibi_slopes, tuple) and all(is_number(s) for s in c.alibi_slopes)
        if not finite or len(c.alibi_slopes) != c.n_head:
            yield invalid("alibi_slopes", f"None or a tuple of n_head = {c.n_head} finite floats")
