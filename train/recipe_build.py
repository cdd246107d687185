"""Builds what a recipe describes: mesh, model, learning-rate schedule, optimizer and train step.

`btlm train` and the ahead-of-time compile both build from here, so that the program compiled ahead
of time is the one that training runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from btlm_jax.config import AlibiScaling, BTLMConfig
from btlm_jax.convert import auto
from btlm_jax.model import mup, sharding
from btlm_jax.model.btlm import BTLM
from btlm_jax.model.params import Params, check_params, is_unstacked
from btlm_jax.train.recipe import Recipe, nearest_name_hint
from btlm_jax.train.step import StepMetrics, TrainState, make_step


def build_mesh(recipe: Recipe, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns the recipe's mesh over `devices`, by default all of them.

    Raises:
      ValueError: the mesh does not fit the devices.
    """
    return sharding.make_mesh(**dataclasses.asdict(recipe.mesh), devices=devices)


def build_config(recipe: Recipe) -> BTLMConfig:
    """Returns the configuration of the preset, file or checkpoint, with the recipe's changes.

    Raises:
      ValueError: unknown field or invalid value.
      FileNotFoundError: the file or checkpoint does not exist.
      ConnectionError: the checkpoint is on the Hub, which cannot be reached.
    """
    model = recipe.model
    if model.preset is not None:
        base = BTLMConfig.preset(model.preset)
    elif model.config is not None:
        base = BTLMConfig.from_hf(model.config)
    else:
        assert model.checkpoint is not None  # the recipe sets exactly one of the three
        try:
            base = auto.read_any_config(model.checkpoint)
        except FileNotFoundError as e:
            raise FileNotFoundError(f"model.checkpoint: {e}") from None
    known = {f.name for f in dataclasses.fields(BTLMConfig)}
    if unknown := set(model.fields) - known:
        name = sorted(unknown)[0]
        raise ValueError(f"model.fields.{name}: unknown field{nearest_name_hint(name, known)}")
    fields = dict(model.fields)
    if model.alibi_scaling_factor is not None:
        fields["alibi_scaling"] = AlibiScaling(factor=model.alibi_scaling_factor)
    return dataclasses.replace(base, **fields)


def build_model(recipe: Recipe) -> BTLM:
    """Returns the model of `build_config`, which computes as the section `run` says.

    Raises:
      ValueError, FileNotFoundError, ConnectionError: as `build_config`.
    """
    run = recipe.run
    return BTLM(
        build_config(recipe),
        compute_dtype=None if run.compute_dtype == "auto" else run.compute_dtype,
        attention_implementation=None if run.attention == "auto" else run.attention,
        remat=run.remat,
    )


def with_microbatches(recipe: Recipe, mesh: Mesh) -> Recipe:
    """Returns the recipe with a microbatch in every phase, chosen by `run.tokens_per_device`.

    A phase that names its microbatch keeps it. The others get the largest divisor of their batch
    size that puts at most that many tokens on a device of this mesh.

    Raises:
      ValueError: even one sequence per device exceeds the limit.
    """
    batch_shards = sharding.num_shards(mesh, sharding.RULES, "batch")
    sequence_shards = sharding.num_shards(mesh, sharding.RULES, "sequence")
    limit, phases = recipe.run.tokens_per_device, []
    for i, phase in enumerate(recipe.phases):
        microbatch = phase.microbatch_size
        if phase.microbatch is None and limit and phase.batch_size % batch_shards == 0:
            per_shard = phase.batch_size // batch_shards
            fitting = [
                n
                for n in range(1, per_shard + 1)
                if per_shard % n == 0 and n * phase.length <= limit * sequence_shards
            ]
            if not fitting:
                raise ValueError(
                    f"run.tokens_per_device: found {limit}, a sequence of phases.{i} has "
                    f"{phase.length // sequence_shards} on each device: raise it, or split "
                    "sequences with mesh.context"
                )
            microbatch = batch_shards * max(fitting)
        phases.append(dataclasses.replace(phase, microbatch=microbatch))
    return dataclasses.replace(recipe, phases=tuple(phases))


def build_params(recipe: Recipe, model: BTLM, mesh: Mesh) -> Params:
    """Returns the fp32 weights that training starts from: fresh ones, or a checkpoint's.

    Raises:
      ValueError: the checkpoint is quantized, or does not fit the model.
    """
    source = recipe.model.checkpoint
    if source is None:
        key = jax.random.key(recipe.run.seed)
        return model.init(key, mesh=mesh, truncation=recipe.model.init_truncation)
    _, params = auto.load_any_checkpoint(source, mesh=mesh, dtype=jnp.float32)
    if is_unstacked(params):
        raise ValueError(
            f"model.checkpoint: {source} is quantized, and only floats can be trained: name the "
            "checkpoint it was made from"
        )
    check_params(params, model.config)
    return params


def build_schedule(recipe: Recipe) -> Callable[[Any], Any]:
    """Returns the learning-rate schedule: step (from 0) -> rate, before muP's multipliers.

    The rate depends on the tokens seen before the step, so that neither a phase change nor a batch
    ramp moves the schedule. As in the original training, step 0 of a warmup has rate 0. The
    schedule can be jitted.
    """
    settings = recipe.optimizer
    # The last step sees all tokens but its own; it is the one that has the final rate.
    last = float(recipe.tokens - recipe.phases[-1].tokens_per_step)
    decay_tokens = max(last - settings.warmup_tokens, 1.0)

    def learning_rate(step: Any) -> Any:
        step = jnp.asarray(step, jnp.float32)
        first, seen = 0, 0.0
        for phase in recipe.phases:
            seen += jnp.clip(step - first, 0, phase.steps) * float(phase.tokens_per_step)
            first += phase.steps
        warming = seen / max(settings.warmup_tokens, 1)
        progress = jnp.clip((seen - settings.warmup_tokens) / decay_tokens, 0.0, 1.0)
        if settings.schedule == "cosine":
            progress = 0.5 * (1 - jnp.cos(jnp.pi * progress))
        elif settings.schedule == "constant":
            progress = 0.0
        decayed = settings.peak_lr + (settings.final_lr - settings.peak_lr) * progress
        return jnp.where(seen < settings.warmup_tokens, settings.peak_lr * warming, decayed)

    return learning_rate


def build_param_groups(recipe: Recipe, config: BTLMConfig) -> list[mup.ParamGroup]:
    """Returns the muP groups of `build_optimizer`, with the peaks of their learning rates."""
    settings = recipe.optimizer
    peak, kind = settings.peak_lr, "adam"
    if settings.name == "lion":
        kind = "lion"
    elif settings.name == "muon":
        kind = "muon" if settings.muon_rms is None else "muon_rms"
        peak = settings.muon_lr or settings.peak_lr
    return mup.param_groups(
        config, peak, settings.weight_decay, settings.decay, kind, settings.peak_lr
    )


def build_optimizer(recipe: Recipe, config: BTLMConfig) -> optax.GradientTransformation:
    """Returns the optimizer, in muP groups.

    Raises:
      ValueError: `optimizer.decay` does not go with the model (`mup.adamw`).
    """
    settings, schedule = recipe.optimizer, build_schedule(recipe)
    shared: dict[str, Any] = dict(
        weight_decay=settings.weight_decay,
        decay=settings.decay,
        clip_norm=settings.clip_norm or None,
    )
    betas = {"b1": settings.b1, "b2": settings.b2}
    shared |= {name: beta for name, beta in betas.items() if beta is not None}
    try:
        if settings.name == "lion":
            return mup.lion(schedule, config, **shared)
        if settings.name == "adamw":
            return mup.adamw(schedule, config, eps=settings.eps, **shared)
        ratio = (settings.muon_lr or settings.peak_lr) / settings.peak_lr
        return mup.muon(
            lambda step: schedule(step) * ratio,
            config,
            adam_learning_rate=schedule,
            consistent_rms=settings.muon_rms,
            eps=settings.eps,
            **shared,
        )
    except ValueError as e:  # mup names its arguments, which are the keys of this section
        raise ValueError(f"optimizer.{e}") from None


def dropout_problems(config: BTLMConfig) -> list[str]:
    """Returns a sentence for every dropout probability that is not zero."""
    return [
        f"model.fields.{name}: found {rate}, expected 0.0, because training with dropout is not "
        f"implemented (BTLM was trained without): set model.fields.{name} = 0.0 "
        f"(--set model.fields.{name}=0.0)"
        for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop")
        if (rate := getattr(config, name))
    ]


def build_step(
    recipe: Recipe, model: BTLM, tx: optax.GradientTransformation
) -> Callable[..., tuple[TrainState, StepMetrics]]:
    """Returns the jitted train step of the recipe (`step.make_step`).

    Raises:
      ValueError: the model's configuration asks for dropout, which is not implemented.
    """
    if problems := dropout_problems(model.config):
        raise ValueError("\n".join(problems))
    return make_step(
        model,
        tx,
        z_loss=recipe.optimizer.z_loss,
        offload_optimizer=recipe.run.offload_optimizer,
    )
