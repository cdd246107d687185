"""The BTLM language model as functions of its weights: init, apply, hidden, logits, caches.

On a mesh the model reads the mesh from the types of the weights, so callers need not set one.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import ArrayLike, DTypeLike

from btlm_jax.config import BTLMConfig
from btlm_jax.hf_generation_config import GenerationConfigFile
from btlm_jax.model import attention, forward, sharding
from btlm_jax.model.forward import Intermediates
from btlm_jax.model.kv_cache import KVCache
from btlm_jax.model.params import Params, check_params, init_params
from btlm_jax.model.remat import SAVED_NAMES, Remat
from btlm_jax.model.runtime import Runtime
from btlm_jax.utils.dtypes import optional_dtype


@dataclasses.dataclass(frozen=True)
class BTLM:
    """A BTLM language model: a configuration and how to compute it. It holds no weights.

    Attributes:
      config: the architecture.
      compute_dtype: the dtype of activations and matrix products; None is bfloat16 on TPU and GPU,
        float32 on CPU. float32 means full precision on every platform.
      rules: logical axis -> mesh axis, used if the weights are on a mesh.
      attention_implementation: see `attention.attention`.
      remat: what the forward pass saves for the backward pass (`remat.SAVED_NAMES`): "none"
        recomputes nothing, "dots" saves matrix products and attention, "attention" only the
        latter, "full" only the input of every block.
      generation_config: defaults of `generate`, which `load` reads from the checkpoint. Models that
        differ in them only are equal, and share compiled programs.
    """

    config: BTLMConfig
    compute_dtype: DTypeLike | None = None
    rules: sharding.Rules = sharding.RULES
    attention_implementation: attention.Implementation | None = None
    remat: Remat = "dots"
    generation_config: GenerationConfigFile | None = dataclasses.field(
        default=None, compare=False, repr=False
    )

    def __post_init__(self) -> None:
        if self.remat not in SAVED_NAMES:
            expected = ", ".join(SAVED_NAMES)
            raise ValueError(f"remat: found {self.remat!r}, expected one of {expected}")
        compute_dtype = optional_dtype(self.compute_dtype, "compute_dtype")
        object.__setattr__(self, "compute_dtype", compute_dtype)
        # Rules may be a mapping, but the model must be hashable to be a static argument of jit.
        object.__setattr__(self, "rules", tuple(dict(self.rules).items()))

    def init(
        self,
        key: jax.Array,
        *,
        dtype: DTypeLike = jnp.float32,
        mesh: Mesh | None = None,
        truncation: float | None = None,
    ) -> Params:
        """Draws fresh weights, sharded over `mesh` if one is given; see `params.init_params`.

        Returns:
          A nested dict of arrays; the same values on every mesh, up to zero padding.

        Raises:
          ValueError: the dtype is not a float that weights can have.
        """
        if mesh is None:
            return init_params(key, self.config, dtype, truncation=truncation)
        padding = sharding.param_padding(self.config, mesh, self.rules)
        shardings = sharding.param_shardings(self.config, mesh, self.rules, padding)
        return init_params(key, self.config, dtype, padding, shardings, truncation)

    def init_cache(
        self,
        params: Params,
        batch_size: int,
        capacity: int,
        *,
        dtype: DTypeLike | None = None,
    ) -> KVCache:
        """Returns an empty cache of `capacity` slots, sharded like the activations of `params`.

        Args:
          params: the weights it will be used with.
          batch_size: the number of rows.
          capacity: the number of slots, for one token each.
          dtype: "int8" halves a bf16 cache, with a scale for every slot and head; None is the
            compute dtype.

        Raises:
          ValueError: the batch does not divide over the mesh, or the dtype is none of a cache.
        """
        runtime = self.runtime(params)
        return forward.init_cache(runtime, params, batch_size, capacity, dtype=dtype)

    def fork(self, params: Params, cache: KVCache, copies: int, capacity: int) -> KVCache:
        """Returns an empty cache in which `copies` rows continue each row of `cache`.

        They share the keys and values of `cache`, in its dtype; under jit nothing is copied.
        """
        return forward.fork_cache(self.runtime(params), params, cache, copies, capacity)

    def apply(
        self,
        params: Params,
        input_ids: ArrayLike,
        *,
        attention_mask: ArrayLike | None = None,
        segment_ids: ArrayLike | None = None,
        positions: ArrayLike | None = None,
        token_type_ids: ArrayLike | None = None,
        cache: KVCache | None = None,
        length: ArrayLike | None = None,
    ) -> Any:
        """Computes the logits.

        Args:
          params: as from `init` or `load`.
          input_ids: int [B, T]; an id outside the vocabulary turns the logits of its row into NaN.
          attention_mask: [B, T], nonzero for valid tokens; with a cache it covers the T new tokens.
            The logits of padding tokens are finite but have no meaning.
          segment_ids: int [B, T], >= 1; attention stays within equal ids (packed documents). With
            a cache the default continues the last segment of each row.
          positions: int [B, T] for learned positions, by default the slots; ALiBi counts slots and
            ignores them, like the original.
          token_type_ids: int [B, T]; their embeddings are added unscaled, like in the original.
          cache: of earlier tokens; see `init_cache`.
          length: int scalar, the number of valid tokens; the rest of T are padding at the end. The
            cache advances by it (later tokens overwrite the padding), and dynamic ALiBi scaling
            does not count the padding. The logits of padding have no meaning.

        Returns:
          fp32 logits [B, T, V], or with a cache the pair (logits, extended cache).

        Raises:
          ValueError: shapes that do not agree, weights that do not match the configuration, or
            more tokens than the cache holds (inside `jax.jit`, where the length of the cache is
            unknown, the logits are NaN instead).
        """
        runtime = self.runtime(params)
        h_BTD, new_cache = forward.hidden(
            runtime,
            params,
            input_ids,
            attention_mask=attention_mask,
            segment_ids=segment_ids,
            positions=positions,
            token_type_ids=token_type_ids,
            cache=cache,
            length=length,
        )
        logits = forward.logits(runtime, params, h_BTD)
        return logits if cache is None else (logits, new_cache)

    def hidden(
        self,
        params: Params,
        input_ids: ArrayLike,
        *,
        attention_mask: ArrayLike | None = None,
        segment_ids: ArrayLike | None = None,
        positions: ArrayLike | None = None,
        token_type_ids: ArrayLike | None = None,
        cache: KVCache | None = None,
        length: ArrayLike | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """Computes the final hidden states, after ln_f: [B, T, D] in the compute dtype.

        Arguments and errors as in `apply`.

        Returns:
          (hidden states, extended cache or None).
        """
        return forward.hidden(
            self.runtime(params),
            params,
            input_ids,
            attention_mask=attention_mask,
            segment_ids=segment_ids,
            positions=positions,
            token_type_ids=token_type_ids,
            cache=cache,
            length=length,
        )

    def logits(self, params: Params, hidden: jax.Array) -> jax.Array:
        """Computes fp32 logits [..., V] from final hidden states [..., D]."""
        return forward.logits(self.runtime(params), params, hidden)

    def intermediates(
        self,
        params: Params,
        input_ids: ArrayLike,
        *,
        attention_mask: ArrayLike | None = None,
        segment_ids: ArrayLike | None = None,
        positions: ArrayLike | None = None,
        token_type_ids: ArrayLike | None = None,
    ) -> Intermediates:
        """Returns all intermediate activations.

        They include Hugging Face's `output_hidden_states` and `output_attentions`. This is for
        study and tests: unlike `apply` it holds [L, B, H, T, T] attention probabilities. Arguments
        as in `apply`.
        """
        return forward.intermediates(
            self.runtime(params),
            params,
            input_ids,
            attention_mask=attention_mask,
            segment_ids=segment_ids,
            positions=positions,
            token_type_ids=token_type_ids,
        )

    def runtime(self, params: Params) -> Runtime:
        """Binds the model to weights: returns the static arguments of a forward pass.

        They follow from the model and the shapes and types of the weights, which may be abstract
        (`jax.eval_shape`). The functions of `forward` take them.

        Raises:
          ValueError: the weights do not match the configuration or the mesh.
        """
        padding = check_params(params, self.config)
        mesh = sharding.mesh_of(params["wte"])
        if mesh is not None:
            sharding.check_params_fit(self.config, mesh, self.rules, tuple(padding.items()))
        elif padding:
            raise ValueError(
                f"the weights are larger than the configuration off any mesh: found {padding}, "
                f"expected vocab {self.config.vocab_size} and mlp {self.config.n_inner}; padding "
                "belongs to a mesh (save and load strip it)"
            )
        return Runtime(
            config=self.config,
            dtype=self.dtype_on(mesh),
            rules=self.rules,
            padding=tuple(sorted(padding.items())),
            mesh=mesh,
            implementation=self.attention_implementation,
            remat=self.remat,
        )

    def dtype_on(self, mesh: jax.sharding.AbstractMesh | None) -> np.dtype:
        """Returns the compute dtype on a mesh, or without one; see `compute_dtype`."""
        if self.compute_dtype is not None:
            return jnp.dtype(self.compute_dtype)
        return jnp.dtype(jnp.float32 if sharding.mesh_platform(mesh) == "cpu" else jnp.bfloat16)
