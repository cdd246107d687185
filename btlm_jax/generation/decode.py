"""The decoding loops: prefill, then one token at a time from the KV cache, wholly inside jit.

Shapes are static: B prompts of at most P slots, filled up on the right; R rows, which are
`options.copies` for each prompt; S slots of tokens and cache. The true lengths are arguments. Slots
count as without filling, so the size of the buckets changes no result.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from btlm_jax import sharding
from btlm_jax.generation import beam, stopping
from btlm_jax.generation.options import Options
from btlm_jax.generation.processors import Context, Processor, process
from btlm_jax.generation.sampling import draw, warp
from btlm_jax.layers import KVCache
from btlm_jax.model import BTLM


@dataclasses.dataclass(frozen=True)
class Program:
    """What is static: one program is compiled for each, and for each shape of a `Request`."""

    model: BTLM
    options: Options
    eos: tuple[int, ...]
    processors: tuple[Processor, ...] = ()
    # For how many steps the scores and the logits are kept; 0 does not keep them.
    score_steps: int = 0
    logit_steps: int = 0


class Request(NamedTuple):
    """What a program is run on."""

    ids: Any  # int32 [B, S], prompts, then `fill`
    mask: Any  # int32 [B, P], 0 for padding and filling
    prompt_length: Any  # int32 scalars
    min_length: Any
    max_length: Any
    rows: Any  # how many of the B are meant; the others fill up the batch
    seeds: Any  # uint32 [B] and int32 [B]: a row's key is fold_in(key(seed), stream)
    streams: Any
    fill: Any  # int32 scalar, the token after the end of a row
    stop: Any  # `stopping.table`, and the state of every prompt, int32 [B]
    stop_state: Any


class Result(NamedTuple):
    """Of R rows. What is per token lies at its slot; log-probabilities are the model's own."""

    ids: jax.Array  # int32 [R, S]
    lengths: jax.Array  # int32 [R], of the row with its prompt and EOS
    logprobs: jax.Array  # fp32 [R, S], of new tokens
    sequences_scores: jax.Array | None  # fp32 [R], of beams
    beam_indices: jax.Array | None  # int32 [R, S], of beams: the row each new token came from
    scores: jax.Array | None  # fp32 [score_steps, rows, V], after all processors
    logits: jax.Array | None  # fp32 [logit_steps, rows, V]


@functools.partial(jax.jit, static_argnames="program")
def run(program: Program, params: Any, request: Request) -> Result:
    """Decodes a batch."""
    spec = program.model.spec(params)
    with sharding.on_mesh(spec.mesh):
        request = jax.tree.map(jnp.asarray, request)
        how = _search if program.options.num_beams > 1 else _sample
        return how(program, params, request)


class _Rows(NamedTuple):
    """The rows of a request, and what every loop does with them."""

    program: Program
    params: Any
    request: Request
    source: jax.Array  # int32 [R], the prompt of each row
    real: jax.Array  # int32 [R], how many tokens of the prompt are no padding
    first: jax.Array  # int32 [R], its first one

    @classmethod
    def of(cls, program: Program, params: Any, request: Request) -> _Rows:
        source = jnp.repeat(jnp.arange(request.mask.shape[0]), program.options.copies)
        real, first = request.mask.sum(1), request.mask.argmax(1)
        return cls(program, params, request, source, real[source], first[source])

    def keys(self, step: jax.Array) -> jax.Array:
        """A random key for every prompt, which depends on nothing but its own seed and the step."""

        def key(seed, stream):
            return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), stream), step)

        return jax.vmap(key)(self.request.seeds, self.request.streams)

    def prefill(self) -> tuple[jax.Array, KVCache]:
        """(fp32 logits [R, V] of the first new token, the cache of the rows)."""
        model, request = self.program.model, self.request
        (B, S), P = request.ids.shape, request.mask.shape[1]
        # Made here: an argument would be held beside the loop's own copy.
        cache = model.init_cache(self.params, B, S)
        length = request.prompt_length
        prompt = jnp.where(jnp.arange(P) < length, request.ids[:, :P], 0)
        # Learned positions count the real tokens of a row, as transformers does; ALiBi slots.
        positions = jnp.maximum(jnp.cumsum(request.mask, 1) - 1, 0)
        filled: Any = model.hidden(
            self.params,
            prompt,
            attention_mask=request.mask,
            positions=None if model.config.alibi else positions,
            cache=cache,
            length=length,
        )
        h, cache = filled
        logits = self._logits(jax.lax.dynamic_slice_in_dim(h, length - 1, 1, axis=1))
        if self.program.options.copies == 1:
            return logits, cache
        return logits[self.source], self.gathered(cache, self.source)

    def forward(self, ids_RS, length, cache: KVCache) -> tuple[jax.Array, KVCache]:
        """(logits [R, V] of the token after the first `length`, the cache with these)."""
        model = self.program.model
        token = jax.lax.dynamic_slice_in_dim(ids_RS, length - 1, 1, axis=1)
        positions = (self.real + length - self.request.prompt_length - 1)[:, None]
        at = None if model.config.alibi else positions
        extended: Any = model.hidden(self.params, token, positions=at, cache=cache)
        return self._logits(extended[0]), extended[1]

    def _logits(self, h_R1D: jax.Array) -> jax.Array:
        # Choosing is cheap and done everywhere at once: the logits of all rows are replicated.
        logits = self.program.model.logits(self.params, h_R1D)
        return self.program.model.spec(self.params).place(logits, None, None, None)[:, 0]

    def gathered(self, cache: KVCache, rows: jax.Array) -> KVCache:
        """The cache of other rows, or of the same ones in another order."""
        spec = self.program.model.spec(self.params)
        axes = spec.axes(None, "batch", "heads", None, None)

        def of(x):
            return x.at[:, rows].get(out_sharding=axes, mode="promise_in_bounds")

        segments = cache.segment_ids.at[rows].get(out_sharding=spec.axes("batch", None))
        return KVCache(of(cache.key), of(cache.value), segments, cache.length)

    def processed(self, scores_RV: jax.Array, ids_RS: jax.Array, length: jax.Array) -> jax.Array:
        """The scores after processors, warpers and normalisation."""
        p, request, options = self.program, self.request, self.program.options
        context = Context(
            ids_RS, length, self.first, request.prompt_length, request.min_length,
            request.max_length,
        )  # fmt: skip
        scores = process(scores_RV, context, options, p.eos, p.processors)
        if options.do_sample:
            # Of beams, one at least must be able to go on.
            keep = max(1, len(p.eos)) + 1 if options.num_beams > 1 else 1
            scores = warp(scores, options, keep)
        return jax.nn.log_softmax(scores, -1) if options.renormalize_logits else scores

    def ended(self, token: jax.Array, state: jax.Array | None) -> tuple[jax.Array, Any]:
        """(whether a token ends its row, the next state of the stop strings), of any shape."""
        hit = jnp.isin(token, jnp.asarray(self.program.eos, jnp.int32))
        if state is None:
            return hit, None
        state, stopped = stopping.advance(self.request.stop, state, token)
        return hit | stopped, state

    def record(self, kept: dict[str, jax.Array], index, **values: jax.Array) -> dict:
        """`kept` with the values of this step, of those that are kept."""
        return {
            name: jax.lax.dynamic_update_index_in_dim(buffer, values[name], index, 0)
            for name, buffer in kept.items()
        }

    def buffers(self, like_RV: jax.Array) -> dict[str, jax.Array]:
        """Empty buffers of scores and logits, of those that are kept."""
        steps = {"scores": self.program.score_steps, "logits": self.program.logit_steps}
        return {name: jnp.zeros((n, *like_RV.shape)) for name, n in steps.items() if n}


class _Sampled(NamedTuple):
    """The state of greedy decoding and sampling."""

    length: jax.Array
    ids: jax.Array
    lengths: jax.Array
    done: jax.Array
    logprobs: jax.Array
    stop_state: jax.Array | None
    cache: KVCache
    kept: dict[str, jax.Array]


def _sample(program: Program, params: Any, request: Request) -> Result:
    rows = _Rows.of(program, params, request)
    copies, T = program.options.copies, request.prompt_length

    def choose(scores, step):
        if not program.options.do_sample:
            return jnp.argmax(scores, -1).astype(jnp.int32)
        # Each copy has a key of its own, the same however many there are.
        keys = jax.vmap(jax.random.fold_in)(
            rows.keys(step)[rows.source], jnp.arange(rows.source.size) % copies
        )
        return draw(scores, keys, 1)[:, 0].astype(jnp.int32)

    def append(s: _Sampled, logits: jax.Array) -> _Sampled:
        step = s.length - T
        scores = rows.processed(logits, s.ids, s.length)
        token = jnp.where(s.done, request.fill, choose(scores, step))
        at = jnp.clip(token, 0, logits.shape[1] - 1)  # the filling may be no token
        logprob = jnp.take_along_axis(jax.nn.log_softmax(logits, -1), at[:, None], 1)
        logprob = jnp.where(s.done[:, None], jnp.nan, logprob)
        hit, stop_state = rows.ended(at, s.stop_state)
        return s._replace(
            length=s.length + 1,
            ids=jax.lax.dynamic_update_slice(s.ids, token[:, None], (0, s.length)),
            lengths=s.lengths + ~s.done,
            done=s.done | hit,
            logprobs=jax.lax.dynamic_update_slice(s.logprobs, logprob, (0, s.length)),
            stop_state=stop_state,
            kept=rows.record(s.kept, step, scores=scores, logits=logits),
        )

    def advance(s: _Sampled) -> _Sampled:
        logits, cache = rows.forward(s.ids, s.length, s.cache)
        return append(s._replace(cache=cache), logits)

    def unfinished(s: _Sampled) -> jax.Array:
        return (s.length < request.max_length) & ~s.done.all()

    logits, cache = rows.prefill()
    ids = request.ids[rows.source]
    start = _Sampled(
        T,
        ids,
        jnp.broadcast_to(T, rows.source.shape),
        rows.source >= request.rows,
        jnp.full(ids.shape, jnp.nan),
        None if request.stop is None else request.stop_state[rows.source],
        cache,
        rows.buffers(logits),
    )
    end = jax.lax.while_loop(unfinished, advance, append(start, logits))
    kept = end.kept.get
    return Result(end.ids, end.lengths, end.logprobs, None, None, kept("scores"), kept("logits"))


class _Searched(NamedTuple):
    """The state of beam search. The tracks hold ids, log-probabilities, rows and stop states."""

    length: jax.Array
    beams: beam.Beams
    cache: KVCache
    kept: dict[str, jax.Array]


def _search(program: Program, params: Any, request: Request) -> Result:
    rows, options = _Rows.of(program, params, request), program.options
    (B, S), K, T = request.ids.shape, options.num_beams, request.prompt_length
    count = max(2, 1 + len(program.eos)) * K
    powers = np.arange(S + 1, dtype=np.float64)
    powers[1:] **= options.length_penalty  # in float64, as Python does
    powers = powers.astype(np.float32)
    active = jnp.arange(B)[:, None] < request.rows
    row_of = jnp.arange(B)[:, None] * K

    def append(s: _Searched, logits: jax.Array) -> _Searched:
        length, step = s.length, s.length - T
        own = jax.nn.log_softmax(logits, -1)
        V = own.shape[1]
        scores = rows.processed(own, s.beams.running["ids"].reshape(B * K, S), length)
        totals = scores.reshape(B, K, V) + s.beams.running_scores[:, :, None]
        if options.do_sample:
            chosen = draw(totals.reshape(B, K * V), rows.keys(step), count)
        else:
            chosen = jax.lax.top_k(totals.reshape(B, K * V), count)[1]
        found = beam.candidates(totals, chosen)
        tracks = beam.take(s.beams.running, found.parents)
        hit, state = rows.ended(found.tokens, tracks.get("stop"))
        hit = hit | (length + 1 >= request.max_length)
        logprob = jnp.take_along_axis(own.reshape(B, K * V), chosen, 1)
        tracks = {
            "ids": tracks["ids"].at[:, :, length].set(found.tokens),
            "logprobs": tracks["logprobs"].at[:, :, length].set(logprob),
            "rows": tracks["rows"].at[:, :, length].set(found.parents + row_of),
        } | ({} if state is None else {"stop": state})
        beams, kept = beam.step(
            s.beams, found, tracks, hit, step + 1, request.max_length - T, powers, options, active
        )
        parents = jnp.take_along_axis(found.parents, kept, 1) + row_of
        return _Searched(
            length + 1,
            beams,
            rows.gathered(s.cache, parents.reshape(-1)),
            rows.record(s.kept, step, scores=scores, logits=logits),
        )

    def advance(s: _Searched) -> _Searched:
        ids = s.beams.running["ids"].reshape(B * K, S)
        logits, cache = rows.forward(ids, s.length, s.cache)
        return append(s._replace(cache=cache), logits)

    logits, cache = rows.prefill()
    tracks = {
        "ids": request.ids[rows.source].reshape(B, K, S),
        "logprobs": jnp.full((B, K, S), jnp.nan),
        "rows": jnp.full((B, K, S), -1, jnp.int32),
    }
    if request.stop is not None:
        tracks["stop"] = request.stop_state[rows.source].reshape(B, K)
    first = _Searched(T, beam.start(tracks, B, K, active), cache, rows.buffers(logits))
    end = jax.lax.while_loop(lambda s: s.beams.go_on, advance, append(first, logits))

    beams, n = end.beams, options.num_return_sequences
    best = jax.tree.map(lambda x: x[:, :n].reshape(B * n, *x.shape[2:]), beams.finished)
    lengths = T + beams.lengths[:, :n].reshape(-1)
    return Result(
        best["ids"], lengths, best["logprobs"], beams.scores[:, :n].reshape(-1), best["rows"],
        end.kept.get("scores"), end.kept.get("logits"),
    )  # fmt: skip
