"""Recipes: everything a training run depends on, as dataclasses that `recipe_file` reads."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from btlm_jax import config as config_lib
from btlm_jax.model.remat import Remat


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    """What is trained. Exactly one of `preset`, `config` and `checkpoint`.

    Attributes:
      preset: a named configuration, with fresh weights.
      config: a `config.json`, with fresh weights.
      checkpoint: an Orbax checkpoint, a Hugging Face directory or a Hub id, whose weights are
        trained on.
      fields: fields of `BTLMConfig` to replace (n_layer, vocab_size and the like).
      alibi_scaling_factor: position interpolation by a fixed factor.
      init_truncation: fresh weights are drawn within this many standard deviations, as those of the
        original training were (2); None draws plain normals, as its Hugging Face code does.
    """

    preset: str | None = None
    config: str | None = None
    checkpoint: str | None = None
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    alibi_scaling_factor: float | None = None
    init_truncation: float | None = None


@dataclasses.dataclass(frozen=True)
class DataSettings:
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
      microbatch: sequences per forward pass; gradients of several add up to a step. Default: as
        `run.tokens_per_device` allows.
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
class OptimizerSettings:
    """How it learns.

    Attributes:
      name: the update rule; all in muP groups.
      peak_lr: after warmup, before muP's multipliers.
      final_lr: at the last step.
      warmup_tokens: from 0 to the peak, in tokens.
      schedule: from the peak to the end.
      b1, b2: of Adam and Lion; default 0.9 and 0.95, Lion's 0.9 and 0.99.
      eps: of Adam.
      muon_lr: peak of the layers' matrices under Muon, which follows the same schedule; default
        `peak_lr`.
      muon_rms: scale Muon's updates to this RMS (0.2 lets it share Adam's rate) in place of the
        spectral norm.
      weight_decay: of matrices and embeddings.
      decay: its meaning under muP (`mup`).
      clip_norm: of the gradient's global norm; 0 for none.
      z_loss: coefficient of the square of log(sum(exp(logits))) in what is minimized (PaLM's is
        1e-4); reported losses are without it.
    """

    name: Literal["adamw", "lion", "muon"] = "adamw"
    peak_lr: float = 1.2e-2
    final_lr: float = 1.02e-4
    warmup_tokens: int = 0
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    b1: float | None = None
    b2: float | None = None
    eps: float = 1e-8
    muon_lr: float | None = None
    muon_rms: float | None = None
    weight_decay: float = 0.1
    decay: Literal["original", "coupled", "independent"] = "original"
    clip_norm: float = 1.0
    z_loss: float = 0.0


@dataclasses.dataclass(frozen=True)
class MeshSettings:
    """How the devices are arranged; -1 takes what is left."""

    data: int = 1
    fsdp: int = -1
    context: int = 1
    tensor: int = 1


@dataclasses.dataclass(frozen=True)
class RunSettings:
    """How the run goes about it. All "every" are steps; 0 is never.

    Attributes:
      seed: of the weights and of the order of the data.
      log_every: metrics.
      checkpoint_every, keep_last, keep_every: checkpoints, and which of them stay.
      eval_every: evaluation on `data.held_out`.
      sample_every, prompt: generated text.
      max_bad_steps: steps in a row with gradients that are not finite before the run gives up.
      compute_dtype: "auto" is bfloat16 on accelerators, float32 on CPU.
      attention: the implementation; "auto" is the best one for the platform.
      remat: what the forward pass keeps for the backward pass (`BTLM.remat`), from most memory to
        least.
      offload_optimizer: keep the optimizer's state in the memory of the host (`step.offloaded`).
      tokens_per_device: at most so many in a forward pass; phases without a `microbatch` are cut
        into as few as that takes. 0 sets no limit.
      wandb_project: a project of Weights & Biases to report to as well; empty for none.
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
    attention: Literal["auto", "xla", "splash", "cudnn"] = "auto"
    remat: Remat = "dots"
    offload_optimizer: bool = False
    tokens_per_device: int = 0
    wandb_project: str = ""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A training run."""

    model: ModelSettings
    phases: tuple[Phase, ...]
    data: DataSettings = DataSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    mesh: MeshSettings = MeshSettings()
    run: RunSettings = RunSettings()

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


def _problems(r: Recipe) -> Iterable[str]:
    given = [n for n in ("preset", "config", "checkpoint") if getattr(r.model, n) is not None]
    if len(given) != 1:
        found = " and ".join(given) or "none"
        yield f"model: found {found}, expected exactly one of preset, config and checkpoint"
    if r.model.preset is not None and r.model.preset not in config_lib.PRESETS:
        valid = nearest(r.model.preset, config_lib.PRESETS)
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
    for name in ("final_lr", "warmup_tokens", "weight_decay", "clip_norm", "z_loss"):
        if getattr(o, name) < 0:
            yield f"optimizer.{name}: found {getattr(o, name)}, expected a number >= 0"
    for name in ("b1", "b2"):
        if not 0 <= (getattr(o, name) or 0) < 1:
            yield f"optimizer.{name}: found {getattr(o, name)}, expected a number in [0, 1)"
    for name in ("muon_lr", "muon_rms"):
        value = getattr(o, name)
        if value is not None and (o.name != "muon" or not value > 0):
            yield f"optimizer.{name}: found {value}, expected a number > 0, with name = 'muon' only"
    if r.model.init_truncation is not None and not r.model.init_truncation > 0:
        yield f"model.init_truncation: found {r.model.init_truncation}, expected a number > 0"
    if r.phases and o.warmup_tokens >= r.tokens:
        yield f"optimizer.warmup_tokens: found {o.warmup_tokens}, the run has {r.tokens} tokens"
    if r.data.mixture is not None and r.data.weights:
        yield "data: found mixture and weights, expected one of them"
    for name in ("log_every", "max_bad_steps", "keep_last"):
        if getattr(r.run, name) < 1:
            yield f"run.{name}: found {getattr(r.run, name)}, expected a positive int"
    for name in (
        "checkpoint_every", "keep_every", "eval_every", "sample_every", "tokens_per_device"
    ):  # fmt: skip
        if getattr(r.run, name) < 0:
            yield f"run.{name}: found {getattr(r.run, name)}, expected an int >= 0"


def nearest(name: str, valid: Iterable[str]) -> str:
    """The hint that ends the message about an unknown name."""
    close = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.0)
    return f"; did you mean {close[0]}? Valid: {', '.join(valid)}" if close else ""
