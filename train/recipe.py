"""Recipes: everything a training run depends on, as frozen dataclasses.

`recipe_file` reads recipes from TOML; `recipe_build` builds mesh, model, optimizer and step.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from btlm_jax.config import PRESETS
from btlm_jax.model.remat import Remat
from btlm_jax.utils import paths
from btlm_jax.utils.local_paths import local_name


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    """The model to train. Exactly one of `preset`, `config` and `checkpoint` is set.

    Attributes:
      preset: name of a configuration, for fresh weights.
      config: path of a `config.json`, for fresh weights.
      checkpoint: an Orbax checkpoint, a Hugging Face directory or a Hub id; training starts from
        its weights.
      fields: fields of `BTLMConfig` to replace (n_layer, vocab_size and the like).
      alibi_scaling_factor: fixed factor of position interpolation.
      init_truncation: fresh weights are drawn within this many standard deviations, as those of
        the original training were (2). None draws untruncated normals, as its Hugging Face code
        does.
    """

    preset: str | None = None
    config: str | None = None
    checkpoint: str | None = None
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    alibi_scaling_factor: float | None = None
    init_truncation: float | None = None


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """The tokens to train on: directories written by `btlm tokenize`.

    Attributes:
      train: the directory, or the parent of the directories that the mixture names.
      held_out: directory of held-out tokens, for evaluation.
      mixture: name of a mixture ("slimpajama") of the directories inside `train`.
      weights: directory inside `train` -> weight, instead of a named mixture.
      mask_documents: whether attention stays within documents (false in the published run), in
        training and in held-out evaluation. The EOS before a document predicts its first token.
      shuffle: whether to read in a random order, drawn from `run.seed`.
      held_out_tokens: upper limit on the tokens of one evaluation.
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
      steps: number of steps.
      batch_size: sequences per step, in all processes together.
      length: tokens per sequence that are predicted.
      microbatch: sequences per forward pass; a step adds up the gradients of several. Chosen by
        `run.tokens_per_device` by default.
    """

    steps: int
    batch_size: int
    length: int
    microbatch: int | None = None

    @property
    def tokens_per_step(self) -> int:
        """Tokens that a step predicts."""
        return self.batch_size * self.length

    @property
    def microbatch_size(self) -> int:
        """Sequences per forward pass: `microbatch`, or the whole batch."""
        return self.microbatch or self.batch_size


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
    """Optimizer and learning-rate schedule.

    Attributes:
      name: the update rule; all rules use muP groups.
      peak_lr: learning rate after warmup, before muP's multipliers.
      final_lr: learning rate of the last step.
      warmup_tokens: tokens over which the rate rises from 0 to the peak.
      schedule: shape of the decay from the peak to the end.
      b1, b2: betas of Adam and Lion; by default 0.9 and 0.95, for Lion 0.9 and 0.99.
      eps: epsilon of Adam.
      muon_lr: peak rate of the layers' matrices under Muon, which follows the same schedule;
        `peak_lr` by default.
      muon_rms: scales Muon's updates to this RMS instead of the spectral norm (0.2 lets Muon share
        Adam's rate).
      weight_decay: decay of matrices and embeddings.
      decay: meaning of the decay under muP (`mup`).
      clip_norm: limit on the global norm of the gradient; 0 does not clip.
      z_loss: coefficient of the square of log(sum(exp(logits))) in the minimized loss (1e-4 in
        PaLM); reported losses exclude it.
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
    """Sizes of the mesh axes; -1 takes the devices that are left."""

    data: int = 1
    fsdp: int = -1
    context: int = 1
    tensor: int = 1


@dataclasses.dataclass(frozen=True)
class RunSettings:
    """How to run: logging, checkpoints, evaluation and computation.

    All `*_every` settings count steps; 0 means never.

    Attributes:
      seed: seed of the weights and of the order of the data.
      log_every: interval between lines of metrics.
      checkpoint_every: interval between checkpoints.
      keep_last: number of the newest checkpoints to keep.
      keep_every: checkpoints at multiples of this are kept forever.
      eval_every: interval between evaluations on `data.held_out`.
      sample_every: interval between samples of generated text.
      prompt: prompt of those samples.
      max_bad_steps: number of consecutive steps with non-finite gradients after which the run
        fails.
      compute_dtype: "auto" is bfloat16 on accelerators and float32 on CPUs.
      attention: the implementation; "auto" is the best one for the platform.
      remat: results that the forward pass keeps for the backward pass (`BTLM.remat`), from most
        memory to least.
      offload_optimizer: keeps the optimizer state in the host's memory
        (`step.move_optimizer_state`).
      tokens_per_device: upper limit on the tokens of a forward pass on one device. Phases without
        a `microbatch` are cut into as few microbatches as the limit allows. 0 sets no limit.
      wandb_project: project of Weights & Biases to report to as well; empty for none.
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
    """A training run.

    Raises:
      ValueError: a value is out of range, or values contradict each other; the message lists all
        problems.
    """

    model: ModelSettings
    phases: tuple[Phase, ...]
    data: DataSettings = DataSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    mesh: MeshSettings = MeshSettings()
    run: RunSettings = RunSettings()

    def __post_init__(self) -> None:
        problems = [
            *_model_problems(self.model),
            *_path_problems(self),
            *_phase_problems(self.phases),
            *_optimizer_problems(self),
            *_run_problems(self),
        ]
        if problems:
            lines = problems if len(problems) == 1 else ["", *problems]
            raise ValueError(f"invalid recipe:{' ' * (len(problems) == 1)}" + "\n  ".join(lines))

    @property
    def steps(self) -> int:
        """Steps of all phases."""
        return sum(phase.steps for phase in self.phases)

    @property
    def tokens(self) -> int:
        """Tokens that the whole run predicts."""
        return sum(phase.steps * phase.tokens_per_step for phase in self.phases)

    def phase_at(self, step: int) -> Phase:
        """Returns the phase that a step (from 0) belongs to.

        Raises:
          ValueError: the step is not one of the recipe's.
        """
        end = 0
        for phase in self.phases:
            end += phase.steps
            if step < end:
                return phase
        raise ValueError(f"step: found {step}, the recipe has {self.steps} steps")


def check_phase_units(phases: Sequence[Phase]) -> int:
    """Returns the unit into which the data is cut: the longest length of all phases.

    Raises:
      ValueError: a length does not divide the unit, or the tokens of a phase are not a whole number
        of units.
    """
    unit = max(phase.length for phase in phases)
    for i, phase in enumerate(phases):
        if unit % phase.length:
            raise ValueError(
                f"phases.{i}.length: found {phase.length}, expected a divisor of the longest "
                f"length, {unit}, so that no token is lost or repeated between phases"
            )
        multiple = unit // math.gcd(unit, phase.tokens_per_step)
        if phase.steps % multiple:
            below = phase.steps // multiple * multiple
            valid = " or ".join(str(n) for n in (below, below + multiple) if n)
            raise ValueError(
                f"phases.{i}.steps: found {phase.steps} (of {phase.batch_size} x {phase.length} "
                f"tokens), expected {valid}: a whole number of stretches of {unit} tokens, the "
                "longest length"
            )
    return unit


def nearest_name_hint(name: str, valid: Iterable[str]) -> str:
    """Returns the end of a message about an unknown name: the nearest valid one, and all."""
    close = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.0)
    return f"; did you mean {close[0]}? Valid: {', '.join(valid)}" if close else ""


def _model_problems(model: ModelSettings) -> Iterator[str]:
    sources = ("preset", "config", "checkpoint")
    given = [name for name in sources if getattr(model, name) is not None]
    if len(given) != 1:
        found = " and ".join(given) or "none"
        yield f"model: found {found}, expected exactly one of preset, config and checkpoint"
    if model.preset is not None and model.preset not in PRESETS:
        hint = nearest_name_hint(model.preset, PRESETS)
        yield f"model.preset: unknown preset {model.preset!r}{hint}"
    if model.init_truncation is not None and not model.init_truncation > 0:
        yield f"model.init_truncation: found {model.init_truncation}, expected a number > 0"


def _path_problems(recipe: Recipe) -> Iterator[str]:
    """Yields what is wrong with the paths, as far as can be told without opening them."""
    local = {
        "model.config": recipe.model.config,
        "data.train": recipe.data.train or None,
        "data.held_out": recipe.data.held_out or None,
    }
    named = [(local_name, name, value) for name, value in local.items()]
    named += [(local_name, "data.weights", subset) for subset in recipe.data.weights]
    named += [(paths.location, "model.checkpoint", recipe.model.checkpoint)]
    for check, name, value in named:
        try:
            if value is not None:
                check(value, name)
        except ValueError as e:
            yield str(e)


def _phase_problems(phases: Sequence[Phase]) -> Iterator[str]:
    if not phases:
        yield "phases: found none, expected at least one [[phases]]"
    for i, phase in enumerate(phases):
        for name in ("steps", "batch_size", "length", "microbatch"):
            value = getattr(phase, name)
            if value is not None and value < 1:
                yield f"phases.{i}.{name}: found {value}, expected a positive int"
        micro = phase.microbatch
        if micro is not None and micro > 0 and phase.batch_size % micro:
            yield (
                f"phases.{i}.microbatch: found {micro}, expected a divisor of batch_size = "
                f"{phase.batch_size}"
            )


def _optimizer_problems(recipe: Recipe) -> Iterator[str]:
    settings = recipe.optimizer
    for name in ("peak_lr", "eps"):
        if not getattr(settings, name) > 0:
            yield f"optimizer.{name}: found {getattr(settings, name)}, expected a number > 0"
    for name in ("final_lr", "warmup_tokens", "weight_decay", "clip_norm", "z_loss"):
        if getattr(settings, name) < 0:
            yield f"optimizer.{name}: found {getattr(settings, name)}, expected a number >= 0"
    for name in ("b1", "b2"):
        if not 0 <= (getattr(settings, name) or 0) < 1:
            yield f"optimizer.{name}: found {getattr(settings, name)}, expected a number in [0, 1)"
    for name in ("muon_lr", "muon_rms"):
        value = getattr(settings, name)
        if value is not None and (settings.name != "muon" or not value > 0):
            yield f"optimizer.{name}: found {value}, expected a number > 0, with name = 'muon' only"
    warmup = settings.warmup_tokens
    if recipe.phases and warmup >= recipe.tokens:
        yield f"optimizer.warmup_tokens: found {warmup}, the run has {recipe.tokens} tokens"


def _run_problems(recipe: Recipe) -> Iterator[str]:
    run = recipe.run
    if recipe.data.mixture is not None and recipe.data.weights:
        yield "data: found mixture and weights, expected one of them"
    for name in ("log_every", "max_bad_steps", "keep_last"):
        if getattr(run, name) < 1:
            yield f"run.{name}: found {getattr(run, name)}, expected a positive int"
    for name in (
        "checkpoint_every", "keep_every", "eval_every", "sample_every", "tokens_per_device"
    ):  # fmt: skip
        if getattr(run, name) < 0:
            yield f"run.{name}: found {getattr(run, name)}, expected an int >= 0"
    if not 0 <= run.seed < 2**32:  # JAX would take the lower 32 bits, and fail beyond 64
        yield f"run.seed: found {run.seed}, expected an int from 0 to 2**32 - 1"
