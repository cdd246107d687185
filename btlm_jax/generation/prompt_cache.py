"""Prompts read once, kept, and continued many times."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from btlm_jax.generation import decode, prompts
from btlm_jax.generation.prefill import PromptState, extend_prefill, prefill, prefill_padded
from btlm_jax.model import sharding
from btlm_jax.model.btlm import BTLM
from btlm_jax.model.kv_cache import KVCache
from btlm_jax.model.params import Params

_FORMAT = 1


@dataclasses.dataclass(frozen=True, eq=False)
class PromptCache:
    """Keys, values and the next logits of prompts; `generate(..., prompt_cache=)` continues them.

    Made by `PromptCache.of`; immutable, so that it can be used any number of times. It belongs to
    the weights it was made with.

    Attributes:
      ids, mask: int32 [B, T], the prompts and where they are no padding.
      prompt: what was computed from them, perhaps of some more rows that fill up a mesh.
    """

    ids: np.ndarray
    mask: np.ndarray
    prompt: PromptState

    @classmethod
    def of(
        cls,
        model: BTLM,
        params: Params,
        input_ids: ArrayLike,
        *,
        attention_mask: ArrayLike | None = None,
        cache_dtype: DTypeLike | None = None,
    ) -> PromptCache:
        """Reads prompts.

        Args:
          input_ids, attention_mask: [B, T], as in `generate`.
          cache_dtype: as in `generate`.

        Raises:
          ValueError: as `generate`.
        """
        c = model.config
        ids, mask = prompts.check_prompts(input_ids, attention_mask, c.vocab_size, None)
        rows, T = ids.shape
        prompts.check_context_length(prompts.LengthLimits(T, 0, T), c, None)
        extra = -rows % decode.num_batch_shards(model, params)
        filled = [np.concatenate([x, np.repeat(x[-1:], extra, 0)]) for x in (ids, mask)]
        width = prompts.bucket_length(T)
        return cls(
            ids, mask, prefill_padded(model, params, filled[0], filled[1], width, cache_dtype)
        )

    def continued(
        self, model: BTLM, params: Params, ids: np.ndarray, mask: np.ndarray
    ) -> PromptState:
        """What `prompt_of` would give for prompts that begin with these; reads only the rest.

        Raises:
          ValueError: they do not begin with these, row by row (a single one may begin all).
        """
        (B, T), (known, read) = ids.shape, self.ids.shape
        rows = np.minimum(np.arange(B), known - 1)
        # RowInputs beyond those that are meant repeat the last, on a mesh.
        fits = read <= T and (known == 1 or known <= B)
        fits = fits and (ids[:, :read] == self.ids[rows]).all()
        if not fits or (mask[:, :read] != self.mask[rows]).any():
            raise ValueError(
                f"prompt_cache: found {B} prompts of {T} tokens that do not begin with its {known} "
                f"of {read}, expected prompts that do (padding included); make another with "
                "PromptCache.of"
            )
        prompt = self.prompt
        if len(prompt.logits) != B or known != B:
            prompt = _rows(model, params, prompt, rows)
        if read == T:
            return prompt
        rest = prompts.bucket_length(T - read)
        tail = np.pad(ids[:, read:], ((0, 0), (0, rest - (T - read))))
        capacity = prompts.bucket_length(read + rest)
        return extend_prefill(model, params, tail, np.int32(T - read), prompt.cache, capacity)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes it to a file, whole or not at all.

        Raises:
          FileExistsError: there is a file of that name.
        """
        target = Path(path)
        if target.exists():
            raise FileExistsError(f"{target} exists: remove it, or choose another name")
        arrays = [np.asarray(x) for x in jax.tree.leaves(self.prompt)]
        dtypes = [str(x.dtype) for x in arrays]
        about = json.dumps({"format": _FORMAT, "dtypes": dtypes, "cache": str(self._dtype)})
        # NumPy's format knows no bf16.
        plain = [x.view(np.uint16) if x.dtype == jnp.bfloat16 else x for x in arrays]
        named: dict[str, Any] = {str(i): x for i, x in enumerate(plain)}
        with tempfile.NamedTemporaryFile(dir=target.parent, delete=False, suffix=".partial") as f:
            try:
                np.savez(f, about=np.array(about), ids=self.ids, mask=self.mask, **named)
                f.flush()
                os.replace(f.name, target)
            except BaseException:
                Path(f.name).unlink(missing_ok=True)
                raise

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: BTLM, params: Params) -> PromptCache:
        """Reads what `save` wrote, for the model and the weights it was made with.

        Raises:
          FileNotFoundError: no such file.
          ValueError: not a prompt cache, or of another model.
        """
        try:
            with np.load(path) as file:
                about = json.loads(str(file["about"]))
                ids, mask = file["ids"], file["mask"]
                arrays = [
                    file[str(i)].view(jnp.bfloat16) if d == "bfloat16" else file[str(i)]
                    for i, d in enumerate(about["dtypes"])
                ]
        except FileNotFoundError:
            raise FileNotFoundError(f"{path}: no such prompt cache") from None
        except (KeyError, ValueError, zipfile.BadZipFile, OSError) as e:
            raise ValueError(f"{path}: found no prompt cache, expected one of PromptCache.save "
                             f"({e})") from e  # fmt: skip
        if about.get("format") != _FORMAT:
            raise ValueError(f"{path}: found format {about.get('format')}, expected {_FORMAT}")
        rows, capacity = len(arrays[-1]), prompts.bucket_length(ids.shape[1])
        wanted = jax.eval_shape(
            functools.partial(_blank, model, rows=rows, capacity=capacity, dtype=about["cache"]),
            params,
        )
        leaves, tree = jax.tree.flatten(wanted)
        found = [(x.shape, str(x.dtype)) for x in arrays]
        if found != [(x.shape, str(x.dtype)) for x in leaves]:
            raise ValueError(f"{path}: found a prompt cache of another model (or for another mesh, "
                             "or compute dtype), expected one of these weights")  # fmt: skip
        placed = [jax.device_put(a, x.sharding) for a, x in zip(arrays, leaves, strict=True)]
        return cls(ids, mask, jax.tree.unflatten(tree, placed))

    @property
    def _dtype(self) -> Any:
        return self.prompt.cache.dtype


def _blank(model: BTLM, params: Params, *, rows: int, capacity: int, dtype: str) -> PromptState:
    """A prompt of which only shapes and shardings count."""
    ids = jnp.zeros((rows, capacity), jnp.int32)
    return prefill(model, params, ids, None, np.int32(1), capacity, dtype)


@functools.partial(jax.jit, static_argnames="model")
def _rows(model: BTLM, params: Params, prompt: PromptState, index) -> PromptState:
    """The prompts of the rows `index`."""
    runtime = model.runtime(params)
    with sharding.on_mesh(runtime.mesh):

        def of(x, *axes):
            axes = (*axes, *(None,) * (x.ndim - len(axes)))
            return x.at[index].get(out_sharding=runtime.axes(*axes))

        cache = prompt.cache
        layers = jax.tree.map(lambda x: of(x, "batch", "heads"), cache.layers)
        ids, segment = of(cache.segment_ids, "batch"), of(cache.segment, "batch")
        cache = KVCache(layers, ids, segment, of(cache.length), cache.cursor)
        return PromptState(cache, of(prompt.logits))
