"""PyTorch's train step as a baseline: the same model, weights and tokens, in subprocesses."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from btlm_jax.config import BTLMConfig, Positions
from btlm_jax.model import alibi, weights
from btlm_jax.model.params import flatten_tree
from btlm_jax.train.bench.baseline import Baseline
from btlm_jax.train.bench.torch_step import write_problem


class StepBaseline(NamedTuple):
    """A process that takes train steps, after its first two."""

    process: Baseline
    first_losses: list[float]


@contextlib.contextmanager
def open_step_baselines(
    config: BTLMConfig, params: Any, tokens: np.ndarray, dtype: str, learning_rate: float
) -> Iterator[dict[str, StepBaseline]]:
    """Starts PyTorch's step, "eager" and, where torch.compile works, "compile".

    Args:
      config: the model.
      params: its weights, stacked.
      tokens: int32 [B, T + 1].
      dtype: compute dtype.
      learning_rate: learning rate of AdamW.

    Raises:
      ValueError: the model is not BTLM, or eager PyTorch failed.
    """
    c = config
    if not (
        c.positions is Positions.ALIBI
        and c.gated
        and c.tie_word_embeddings
        and c.alibi_scaling is None
    ):
        raise ValueError("PyTorch's step is written for BTLM: ALiBi, SwiGLU and a tied head")
    flat = flatten_tree(params)
    arrays = {"slopes": np.asarray(alibi.model_slopes(c), np.float32), "tokens": tokens}
    for leaf in weights.disk_leaves(c):
        stacked = flat[leaf.weight.path]
        x = stacked if leaf.layer is None else stacked[leaf.layer]
        arrays[leaf.hf_name] = np.asarray(x).reshape(leaf.weight.hf_shape)
    problem = dict(
        dtype=dtype,
        device="cuda" if jax.default_backend() == "gpu" else "cpu",
        lr=learning_rate,
        weight_decay=0.1,
        b1=0.9,
        b2=0.95,
        eps=1e-8,
        clip_norm=1.0,
        width_scale=c.mup_width_scale,
        embeddings_scale=c.mup_embeddings_scale,
        logits_scale=c.logits_scale,
        attention_scale=c.attention_scale,
        epsilon=c.layer_norm_epsilon,
        layers=c.n_layer,
        heads=c.n_head,
    )
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        baselines = {}
        for mode in ("eager", "compile"):
            file = Path(folder) / f"{mode}.npz"
            # flex_attention is a fused kernel only when it is compiled, and for training only on
            # GPUs.
            flex = (mode, problem["device"]) == ("compile", "cuda")
            settings = {"mode": mode, "attention": "flex" if flex else "bias"}
            write_problem(file, problem | settings, arrays)
            process = Baseline("torch_step", str(file), f"PyTorch's step ({mode})")
            stack.callback(process.close)
            try:
                losses = [process.run()["loss"] for _ in range(2)]
            except ValueError as e:
                if mode == "eager":
                    raise
                print(f"torch.compile does not work here, so the baseline is eager PyTorch: {e}")
            else:
                baselines[mode] = StepBaseline(process, losses)
        yield baselines


def check_first_losses(
    expected: list[float], baselines: Mapping[str, list[float]], dtype: str
) -> None:
    """Raises ValueError if the first two losses differ, because then the steps do as well.

    Args:
      expected: our losses.
      baselines: those of each mode.
      dtype: compute dtype.
    """
    # The two programs round bf16 in different places; the loss is about ln(V) = 11.
    tolerance = 2e-4 if dtype == "float32" else 5e-2
    for mode, losses in baselines.items():
        if not np.allclose(expected, losses, rtol=0, atol=tolerance):
            raise ValueError(
                f"PyTorch's step ({mode}) differs from ours: found the first losses {losses}, "
                f"expected {expected} to {tolerance}"
            )
