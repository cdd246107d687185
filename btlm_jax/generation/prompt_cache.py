"""Prompts that are prefilled once and continued many times."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import tempfile
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from btlm_jax.generation import decode, prompts
from btlm_jax.generation.prefill import PromptState, extend_prefill, prefill
from btlm_jax.generation.request import RowRequest
from btlm_jax.model import sharding
from btlm_jax.model.btlm import BTLM
from btlm_jax.model.kv_cache import CACHE_DTYPES, KVCache
from btlm_jax.model.params import Params
from btlm_jax.utils import json_files
from btlm_jax.utils.dtypes import optional_dtype
from btlm_jax.utils.local_paths import local_path

_FORMAT = 1


@dataclasses.dataclass(frozen=True, eq=False)
class PromptCache:
    """Keys, values and next logits of prompts; `generate(..., prompt_cache=)` continues them.

    Created by `PromptCache.of`. It is immutable, so it can be used any number of times. It is valid
    only for the weights that it was created with.

    Attributes:
      ids, mask: int32 [B, T], the prompts and their mask, 0 for padding.
      prompt: the prefilled prompts, perhaps with extra rows that pad the batch on a mesh.
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
        """Prefills prompts.

        Args:
          model: the model.
          params: its weights, on a device or a mesh.
          input_ids: int [B, T], as for `generate`.
          attention_mask: [B, T], as for `generate`.
          cache_dtype: as for `generate`.

        Raises:
          ValueError: as `generate`.
        """
        c = model.config
        cache_dtype = optional_dtype(cache_dtype, "cache_dtype", CACHE_DTYPES)
        ids, mask = prompts.check_prompts(input_ids, attention_mask, c.vocab_size, None)
        rows, T = ids.shape
        prompts.check_context_length(prompts.LengthLimits(T, 0, T), c, None)
        extra_rows = -rows % decode.num_batch_shards(model, params)
        width = prompts.bucket_length(T)

        def pad(x: np.ndarray) -> np.ndarray:
            return np.pad(np.pad(x, ((0, extra_rows), (0, 0)), "edge"), ((0, 0), (0, width - T)))

        # No token attends to the padding on the right, which needs no mask.
        padded_mask = None if mask.all() else pad(mask)
        lengths = np.full(rows + extra_rows, T, np.int32)
        prompt = prefill(model, params, pad(ids), padded_mask, lengths, width, cache_dtype)
        return cls(ids, mask, prompt)

    def extend(
        self, model: BTLM, params: Params, prompt_rows: Sequence[RowRequest | None]
    ) -> PromptState:
        """Returns the prefilled state of prompts that begin with these; computes only the rest.

        Args:
          model: the model that the cache was created with.
          params: the weights that the cache was created with.
          prompt_rows: B prompts of equal length; None repeats the last one.

        Raises:
          ValueError: the prompts do not begin with these, row by row (a single row may begin all).
        """
        rows = [row for row in prompt_rows if row is not None]
        rows += rows[-1:] * (len(prompt_rows) - len(rows))
        ids = np.stack([row.ids for row in rows])
        mask = np.stack([row.mask for row in rows])
        (B, T), (num_cached, cached_length) = ids.shape, self.ids.shape
        # On a mesh, rows beyond the batch repeat its last row.
        index = np.minimum(np.arange(B), num_cached - 1)
        fits = cached_length <= T and (num_cached == 1 or num_cached <= B)
        fits = fits and (ids[:, :cached_length] == self.ids[index]).all()
        if not fits or (mask[:, :cached_length] != self.mask[index]).any():
            raise ValueError(
                f"prompt_cache: found {B} prompts of {T} tokens that do not begin with its "
                f"{num_cached} of {cached_length}, expected prompts that do (padding included); "
                "make another with PromptCache.of"
            )
        prompt = self.prompt
        if len(prompt.logits) != B or num_cached != B:
            prompt = _take_rows(model, params, prompt, index)
        if cached_length == T:
            return prompt
        tail_length = T - cached_length
        width = prompts.bucket_length(tail_length)
        tail = np.pad(ids[:, cached_length:], ((0, 0), (0, width - tail_length)))
        capacity = prompts.bucket_length(cached_length + width)
        return extend_prefill(model, params, tail, np.int32(tail_length), prompt.cache, capacity)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the cache to a file, atomically.

        Raises:
          FileExistsError: the file exists.
        """
        target = local_path(path, "path")
        if target.exists():
            raise FileExistsError(f"{target} exists: remove it, or choose another name")
        arrays = [np.asarray(x) for x in jax.tree.leaves(self.prompt)]
        dtypes = [str(x.dtype) for x in arrays]
        cache_dtype = str(self.prompt.cache.dtype)
        about = json.dumps({"format": _FORMAT, "dtypes": dtypes, "cache": cache_dtype})
        # NumPy's file format does not support bf16.
        storable = [x.view(np.uint16) if x.dtype == jnp.bfloat16 else x for x in arrays]
        by_name: dict[str, Any] = {str(i): x for i, x in enumerate(storable)}
        with tempfile.NamedTemporaryFile(dir=target.parent, delete=False, suffix=".partial") as f:
            try:
                np.savez(f, about=np.array(about), ids=self.ids, mask=self.mask, **by_name)
                f.flush()
                os.replace(f.name, target)
            except BaseException:
                Path(f.name).unlink(missing_ok=True)
                raise

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: BTLM, params: Params) -> PromptCache:
        """Loads a file of `save`, for the model and the weights that the cache was created with.

        Raises:
          FileNotFoundError: the file does not exist.
          ValueError: the file is not a prompt cache, or belongs to another model.
        """
        path = local_path(path, "path")
        try:
            with np.load(path) as file:
                about = json_files.parse_object(str(file["about"]).encode(), "about")
                ids, mask = file["ids"], file["mask"]
                arrays = [
                    file[str(i)].view(jnp.bfloat16) if d == "bfloat16" else file[str(i)]
                    for i, d in enumerate(about["dtypes"])
                ]
        except FileNotFoundError:
            raise FileNotFoundError(f"{path}: no such prompt cache") from None
        except OSError as e:
            if e.errno is not None:  # NumPy's own have none
                raise
            raise _not_a_cache(path, e) from e
        except (
            KeyError, IndexError, TypeError, ValueError, EOFError, zipfile.BadZipFile, zlib.error
        ) as e:  # fmt: skip
            raise _not_a_cache(path, e) from e
        if about.get("format") != _FORMAT:
            raise ValueError(f"{path}: found format {about.get('format')}, expected {_FORMAT}")
        rows, capacity = len(arrays[-1]), prompts.bucket_length(ids.shape[1])
        expected = jax.eval_shape(
            functools.partial(
                _blank_prompt, model, rows=rows, capacity=capacity, dtype=about["cache"]
            ),
            params,
        )
        leaves, tree = jax.tree.flatten(expected)
        shapes = [(x.shape, str(x.dtype)) for x in arrays]
        if shapes != [(x.shape, str(x.dtype)) for x in leaves]:
            raise ValueError(
                f"{path}: found a prompt cache of another model (or for another mesh, or compute "
                "dtype), expected one for these weights"
            )
        loaded = [jax.device_put(a, x.sharding) for a, x in zip(arrays, leaves, strict=True)]
        return cls(ids, mask, jax.tree.unflatten(tree, loaded))


def _not_a_cache(path: str | os.PathLike[str], reason: Exception) -> ValueError:
    first_line = (str(reason).splitlines() or [type(reason).__name__])[0][:200]
    return ValueError(
        f"{path}: found no prompt cache, or a damaged one ({first_line}), expected a file of "
        "PromptCache.save: prefill the prompts again"
    )


def _blank_prompt(
    model: BTLM, params: Params, *, rows: int, capacity: int, dtype: str
) -> PromptState:
    """Returns a prompt state that is used only for its shapes and shardings."""
    ids = jnp.zeros((rows, capacity), jnp.int32)
    return prefill(model, params, ids, None, np.int32(1), capacity, dtype)


@functools.partial(jax.jit, static_argnames="model")
def _take_rows(model: BTLM, params: Params, prompt: PromptState, index) -> PromptState:
    """Returns the prompts at the row indices `index`."""
    runtime = model.runtime(params)
    with sharding.on_mesh(runtime.mesh):

        def take(x, *axes):
            axes = (*axes, *(None,) * (x.ndim - len(axes)))
            return x.at[index].get(out_sharding=runtime.axes(*axes))

        cache = prompt.cache
        layers = jax.tree.map(lambda x: take(x, "batch", "heads"), cache.layers)
        segment_ids, segment = take(cache.segment_ids, "batch"), take(cache.segment, "batch")
        cache = KVCache(layers, segment_ids, segment, take(cache.length), cache.cursor)
        return PromptState(cache, take(prompt.logits))
