"""Recipes: everything a training run depends on, as TOML files read into frozen dataclasses.

A recipe's sections are the fields of `Recipe`. Unknown keys and wrong types are errors that name
the key and the nearest valid one; `--set section.key=value` overrides single values.
"""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import optax

from btlm_jax import config as config_lib
from btlm_jax import mup
from btlm_jax.config import AlibiScaling, BTLMConfig

FOLDER = Path(__file__).parent / "recipes"


@dataclasses.dataclass(frozen=True)
class Model:
    """What is trained. Exactly one of `preset`, `config` and `checkpoint`.

    Attributes:
      preset: a named configuration, with fresh weights.
      config: a `config.json`, with fresh weights.
      checkpoint: an Orbax checkpoint or a Hugging Face directory, whose weights are trained on.
      fields: fields of `BTLMConfig` to replace (n_layer, vocab_size and the like).
      alibi_scaling_factor: position interpolation by a fixed factor.
    """

    preset: str | None = None
    config: str | None = None
    checkpoint: str | None = None
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    alibi_scaling_factor: float | None = None


@dataclasses.dataclass(frozen=True)
class Data:
    """What it is trained on: directories made by `btlm tokenize`.

    Attributes:
      train: the directory, or a parent of several named by `mixture`.
      held_out: another, for evaluation.
      mixture: a named mixture ("slimpajama") of the directories inside `train`.
      weights: directory inside `train` -> weight, in place of a named mixture.
      mask_documents: attention stays within documents (the published run: false).
      shuffle: in a random order, drawn from `run.seed`.
      held_out_tokens: how many tokens an evaluation covers at most.
    """

    train: str = ""
    held_out: str | None = None
    mixture: str | None = None
    weights: Mapping[str, float] = dataclasses.field(default_factory=dict)
    mask_documents: bool = False
    shuffle: bool = True
    held_out_tokens: int = 1 << 20


@dataclasses.dataclass(frozen=True)
class Phase:
    """A stretch of steps with one batch size and length; the schedule spans all phases.

    Attributes:
      steps: how many.
      batch_size: sequences per step.
      length: tokens per sequence.
      microbatch: sequences per forward pass; gradients of several add up to a step. Default all.
    """

    steps: int
    batch_size: int
    length: int
    microbatch: int | None = None

    @property
    def tokens_per_step(self) -> int:
        """Tokens that a step predicts."""
        return self.batch_size * self.length


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """How it learns.

    Attributes:
      name: the update rule; all in muP groups.
      peak_lr: after warmup, before muP's multipliers.
      final_lr: at the last step.
      warmup_tokens: from 0 to the peak, in tokens.
      schedule: from the peak to the end.
      b1, b2, eps: of Adam and Lion.
      weight_decay: of matrices and embeddings.
      decay: its meaning under muP (`mup`).
      clip_norm: of the gradient's global norm; 0 for none.
    """

    name: Literal["adamw", "lion", "muon"] = "adamw"
    peak_lr: float = 1.2e-2
    final_lr: float = 1.02e-4
    warmup_tokens: int = 0
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    decay: Literal["original", "coupled", "independent"] = "original"
    clip_norm: float = 1.0


@dataclasses.dataclass(frozen=True)
class Mesh:
    """How the devices are arranged; -1 takes what is left."""

    data: int = 1
    fsdp: int = -1
    tensor: int = 1


@dataclasses.dataclass(frozen=True)
class Run:
    """How the run goes about it. All "every" are steps; 0 is never.

    Attributes:
      seed: of the weights and of the order of the data.
      log_every: metrics.
      checkpoint_every, keep_last, keep_every: checkpoints, and which of them stay.
      eval_every: evaluation on `data.held_out`.
      sample_every, prompt: generated text.
      max_bad_steps: steps in a row with gradients that are not finite before the run gives up.
      compute_dtype: "auto" is bfloat16 on accelerators, float32 on CPU.
    """

    seed: int = 0
    log_every: int = 10
    checkpoint_every: int = 1000
    keep_last: int = 3
    keep_every: int = 0
    eval_every: int = 0
    sample_every: int = 0
    prompt: str = "The"
    max_bad_steps: int = 10
    compute_dtype: Literal["auto", "bfloat16", "float32"] = "auto"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A training run."""

    model: Model
    phases: tuple[Phase, ...]
    data: Data = Data()
    optimizer: Optimizer = Optimizer()
    mesh: Mesh = Mesh()
    run: Run = Run()

    def __post_init__(self) -> None:
        if problems := list(_problems(self)):
            raise ValueError("invalid recipe:\n  " + "\n  ".join(problems))

    @property
    def steps(self) -> int:
        """Of all phases."""
        return sum(phase.steps for phase in self.phases)

    @property
    def tokens(self) -> int:
        """That the whole run predicts."""
        return sum(phase.steps * phase.tokens_per_step for phase in self.phases)

    def phase_at(self, step: int) -> tuple[int, Phase]:
        """The phase that a step (from 0) belongs to, and the phase's first step."""
        first = 0
        for phase in self.phases:
            if step < first + phase.steps:
                return first, phase
            first += phase.steps
        raise ValueError(f"step {step}: the recipe has {self.steps}")

    def model_config(self, base: BTLMConfig | None = None) -> BTLMConfig:
        """The configuration, starting from `base` (that of the checkpoint) if there is one.

        Raises:
          ValueError, FileNotFoundError: unknown preset or field, invalid value, no such file.
        """
        if base is None and self.model.preset is not None:
            base = BTLMConfig.preset(self.model.preset)
        elif base is None and self.model.config is not None:
            base = BTLMConfig.from_hf(self.model.config)
        assert base is not None
        known = {f.name for f in dataclasses.fields(BTLMConfig)}
        if unknown := set(self.model.fields) - known:
            name = sorted(unknown)[0]
            raise ValueError(f"model.fields.{name}: unknown field{_nearest(name, known)}")
        fields = dict(self.model.fields)
        if self.model.alibi_scaling_factor is not None:
            fields["alibi_scaling"] = AlibiScaling(factor=self.model.alibi_scaling_factor)
        return dataclasses.replace(base, **fields)

    def learning_rate(self, step: Any) -> Any:
        """The learning rate of a step (from 0), before muP's multipliers; jit-able.

        It depends on the tokens seen before the step, so that a phase change or a batch ramp leaves
        the schedule where it is. As in the original's, step 0 of a warmup has rate 0.
        """
        o, seen, step = self.optimizer, 0.0, jnp.asarray(step, jnp.float32)
        first = 0
        for phase in self.phases:
            seen += jnp.clip(step - first, 0, phase.steps) * float(phase.tokens_per_step)
            first += phase.steps
        # The first step starts nothing yet: the last one would else not reach the final rate.
        last = float(self.tokens - self.phases[-1].tokens_per_step)
        warm = seen / max(o.warmup_tokens, 1)
        done = jnp.clip((seen - o.warmup_tokens) / max(last - o.warmup_tokens, 1.0), 0.0, 1.0)
        if o.schedule == "cosine":
            done = 0.5 * (1 - jnp.cos(jnp.pi * done))
        decayed = o.peak_lr + (o.final_lr - o.peak_lr) * (0.0 if o.schedule == "constant" else done)
        return jnp.where(seen < o.warmup_tokens, o.peak_lr * warm, decayed)

    def transformation(self, config: BTLMConfig) -> optax.GradientTransformation:
        """The optimizer, in muP groups.

        Raises:
          ValueError: a decay that does not go with the model (`mup.adamw`).
        """
        o = self.optimizer
        clip = o.clip_norm or None
        shared: dict[str, Any] = dict(weight_decay=o.weight_decay, decay=o.decay, clip_norm=clip)
        try:
            if o.name == "adamw":
                return mup.adamw(self.learning_rate, config, b1=o.b1, b2=o.b2, eps=o.eps, **shared)
            if o.name == "lion":
                return mup.lion(self.learning_rate, config, b1=o.b1, b2=o.b2, **shared)
            return mup.muon(self.learning_rate, config, **shared)
        except ValueError as e:  # mup names its arguments, which are the keys of this section
            raise ValueError(f"optimizer.{e}") from None


def load(source: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Reads a recipe.

    Args:
      source: the name of one of ours (`names`), or the path of a TOML file.
      overrides: "section.key=value" each, the value as in TOML (strings may lack their quotes);
        phases are numbered: "phases.0.steps=10".

    Raises:
      FileNotFoundError: no such recipe; the message lists ours.
      ValueError: not TOML, unknown keys, values of the wrong type, a recipe that cannot be run.
    """
    path = Path(source)
    if path.suffix != ".toml" and str(source) in names():
        path = FOLDER / f"{source}.toml"
    if not path.is_file():
        raise FileNotFoundError(
            f"{source}: no such recipe; ours are {', '.join(names())}, others end in .toml"
        )
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise ValueError(f"{path}: not valid TOML: {e}") from None
    for override in overrides:
        _override(raw, override)
    try:
        return parse(raw)
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from None


def parse(raw: Mapping[str, Any]) -> Recipe:
    """A recipe from parsed TOML; see `load`."""
    return _dataclass(Recipe, raw, "")


def names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(p.stem for p in FOLDER.glob("*.toml"))


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """What `parse` reads back, as JSON and TOML can hold it."""

    def clean(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {k: clean(v) for k, v in value.items() if v is not None}
        return [clean(v) for v in value] if isinstance(value, list | tuple) else value

    return clean(dataclasses.asdict(recipe))


def _dataclass(cls: type, raw: Any, where: str) -> Any:
    if not isinstance(raw, Mapping):
        raise ValueError(f"{where or 'recipe'}: found {raw!r}, expected a table")
    hints, values = typing.get_type_hints(cls), {}
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key, value in raw.items():
        if key not in fields:
            raise ValueError(f"{where}{key}: unknown key{_nearest(key, fields)}")
        values[key] = _value(hints[key], value, where + key)
    missing = [
        name
        for name, f in fields.items()
        if name not in values
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"{where}{missing[0]}: missing")
    return cls(**values)


def _value(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return _dataclass(typing.cast(type, hint), value, f"{where}.")
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{where}: found {value!r}, expected a list of tables")
        return tuple(_dataclass(args[0], v, f"{where}.{i}.") for i, v in enumerate(value))
    if origin is Literal:
        if value not in args:
            raise ValueError(f"{where}: found {value!r}, expected one of {', '.join(args)}")
        return value
    options = args if origin is types.UnionType else (origin or hint,)
    if float in options and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    kinds = [Mapping if o is Mapping or o is typing.get_origin(hint) else o for o in options]
    if isinstance(value, bool) and bool not in kinds:
        kinds = []
    if not any(isinstance(value, k) for k in kinds if isinstance(k, type)):
        expected = " or ".join(k.__name__ for k in options if k is not types.NoneType)
        raise ValueError(f"{where}: found {value!r}, expected {expected}")
    return value


def _nearest(name: str, valid: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.0)
    return f"; did you mean {close[0]}? Valid: {', '.join(valid)}" if close else ""


def _override(raw: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--set {text}: expected section.key=value")
    try:
        parsed = tomllib.loads(f"x = {value}")["x"]
    except tomllib.TOMLDecodeError:
        parsed = value
    node: Any = raw
    *path, last = key.strip().split(".")
    for part in path:
        if isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                raise ValueError(f"--set {text}: there are phases 0 to {len(node) - 1}")
            node = node[int(part)]
        else:
            node = node.setdefault(part, {})
    if not isinstance(node, dict):
        raise ValueError(f"--set {text}: {key} is not a key of a table")
    node[last] = parsed


def _problems(r: Recipe) -> Iterable[str]:
    given = [n for n in ("preset", "config", "checkpoint") if getattr(r.model, n) is not None]
    if len(given) != 1:
        found = " and ".join(given) or "none"
        yield f"model: found {found}, expected exactly one of preset, config and checkpoint"
    if r.model.preset is not None and r.model.preset not in config_lib.PRESETS:
        valid = _nearest(r.model.preset, config_lib.PRESETS)
        yield f"model.preset: unknown preset {r.model.preset!r}{valid}"
    if not r.phases:
        yield "phases: found none, expected at least one [[phases]]"
    for i, p in enumerate(r.phases):
        for name in ("steps", "batch_size", "length", "microbatch"):
            value = getattr(p, name)
            if value is not None and value < 1:
                yield f"phases.{i}.{name}: found {value}, expected a positive int"
        if p.microbatch is not None and p.microbatch > 0 and p.batch_size % p.microbatch:
            yield (
                f"phases.{i}.microbatch: found {p.microbatch}, expected a divisor of batch_size = "
                f"{p.batch_size}"
            )
    o = r.optimizer
    for name in ("peak_lr", "eps"):
        if not getattr(o, name) > 0:
            yield f"optimizer.{name}: found {getattr(o, name)}, expected a number > 0"
    for name in ("final_lr", "warmup_tokens", "weight_decay", "clip_norm"):
        if getattr(o, name) < 0:
            yield f"optimizer.{name}: found {getattr(o, name)}, expected a number >= 0"
    for name in ("b1", "b2"):
        if not 0 <= getattr(o, name) < 1:
            yield f"optimizer.{name}: found {getattr(o, name)}, expected a number in [0, 1)"
    if r.phases and o.warmup_tokens >= r.tokens:
        yield f"optimizer.warmup_tokens: found {o.warmup_tokens}, the run has {r.tokens} tokens"
    if r.data.mixture is not None and r.data.weights:
        yield "data: found mixture and weights, expected one of them"
    for name in ("log_every", "max_bad_steps", "keep_last"):
        if getattr(r.run, name) < 1:
            yield f"run.{name}: found {getattr(r.run, name)}, expected a positive int"
    for name in ("checkpoint_every", "keep_every", "eval_every", "sample_every"):
        if getattr(r.run, name) < 0:
            yield f"run.{name}: found {getattr(r.run, name)}, expected an int >= 0"
