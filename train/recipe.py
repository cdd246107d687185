"""Recipes: everything a training run depends on, as dataclasses that `recipe_file` reads."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from btlm_jax import config as config_lib
from btlm_jax.config import AlibiScaling, BTLMConfig
from btlm_jax.convert import auto
from btlm_jax.model import mup, sharding
from btlm_jax.model.btlm import BTLM
from btlm_jax.model.remat import Remat


@dataclasses.dataclass(frozen=True)
class Model:
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
class Optimizer:
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
class Mesh:
    """How the devices are arranged; -1 takes what is left."""

    data: int = 1
    fsdp: int = -1
    context: int = 1
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

    def model_config(self) -> BTLMConfig:
        """The configuration: of the preset, file or checkpoint, with what `model` replaces.

        Raises:
          ValueError, FileNotFoundError: unknown preset or field, invalid value, no such file or
            checkpoint.
          ConnectionError: a checkpoint on the Hub that cannot be reached.
        """
        if self.model.preset is not None:
            base = BTLMConfig.preset(self.model.preset)
        elif self.model.config is not None:
            base = BTLMConfig.from_hf(self.model.config)
        else:
            assert self.model.checkpoint is not None  # exactly one of the three is set
            try:
                base = auto.read_any_config(self.model.checkpoint)
            except FileNotFoundError as e:
                raise FileNotFoundError(f"model.checkpoint: {e}") from None
        known = {f.name for f in dataclasses.fields(BTLMConfig)}
        if unknown := set(self.model.fields) - known:
            name = sorted(unknown)[0]
            raise ValueError(f"model.fields.{name}: unknown field{nearest(name, known)}")
        fields = dict(self.model.fields)
        if self.model.alibi_scaling_factor is not None:
            fields["alibi_scaling"] = AlibiScaling(factor=self.model.alibi_scaling_factor)
        return dataclasses.replace(base, **fields)

    def build(self) -> BTLM:
        """The model of `model_config`, computed as `run` says; errors as there."""
        r = self.run
        return BTLM(
            self.model_config(),
            compute_dtype=None if r.compute_dtype == "auto" else r.compute_dtype,
            attention_implementation=None if r.attention == "auto" else r.attention,
            remat=r.remat,
        )

    def on(self, mesh: jax.sharding.Mesh) -> Recipe:
        """The recipe with the microbatch of every phase, as `run.tokens_per_device` allows on a
        mesh.

        Raises:
          ValueError: not even one sequence per device is within the limit.
        """
        ways = sharding.num_shards(mesh, sharding.RULES, "batch")
        split = sharding.num_shards(mesh, sharding.RULES, "sequence")
        phases, limit = [], self.run.tokens_per_device
        for i, p in enumerate(self.phases):
            micro = p.microbatch or p.batch_size
            if p.microbatch is None and limit and p.batch_size % ways == 0:
                sizes = [ways * n for n in range(1, p.batch_size // ways + 1)]
                sizes = [n for n in sizes if p.batch_size % n == 0]
                sizes = [n for n in sizes if n // ways * p.length <= limit * split]
                if not sizes:
                    raise ValueError(
                        f"run.tokens_per_device: found {limit}, a sequence of phases.{i} has "
                        f"{p.length // split} on each device: raise it, or split sequences with "
                        "mesh.context"
                    )
                micro = max(sizes)
            phases.append(dataclasses.replace(p, microbatch=micro))
        return dataclasses.replace(self, phases=tuple(phases))

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

    def param_groups(self, config: BTLMConfig) -> list[mup.ParamGroup]:
        """The groups of `transformation`, with the peaks of their learning rates."""
        o = self.optimizer
        kind: mup.Optimizer = "adam"
        if o.name == "lion":
            kind = "lion"
        elif o.name == "muon":
            kind = "muon" if o.muon_rms is None else "muon_rms"
        peak = (o.muon_lr or o.peak_lr) if o.name == "muon" else o.peak_lr
        return mup.param_groups(config, peak, o.weight_decay, o.decay, kind, o.peak_lr)

    def transformation(self, config: BTLMConfig) -> optax.GradientTransformation:
        """The optimizer, in muP groups.

        Raises:
          ValueError: a decay that does not go with the model (`mup.adamw`).
        """
        o = self.optimizer
        clip = o.clip_norm or None
        shared: dict[str, Any] = dict(weight_decay=o.weight_decay, decay=o.decay, clip_norm=clip)
        shared |= {n: getattr(o, n) for n in ("b1", "b2") if getattr(o, n) is not None}
        ratio = (o.muon_lr or o.peak_lr) / o.peak_lr
        try:
            if o.name == "lion":
                return mup.lion(self.learning_rate, config, **shared)
            if o.name == "adamw":
                return mup.adamw(self.learning_rate, config, eps=o.eps, **shared)
            return mup.muon(
                lambda step: self.learning_rate(step) * ratio,
                config,
                adam_learning_rate=self.learning_rate,
                consistent_rms=o.muon_rms,
                eps=o.eps,
                **shared,
            )
        except ValueError as e:  # mup names its arguments, which are the keys of this section
            raise ValueError(f"optimizer.{e}") from None


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
