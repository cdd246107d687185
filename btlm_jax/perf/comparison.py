"""Comparison with the 7B models of the model card: FLOPs, memory, and the card's claims.

The peers, with sources for every shape and token count, are in `peers.toml`. All models are counted
with the same formulas (`FORMULAS`). Memory always comes with its context and cache dtype.
"""

from __future__ import annotations

import dataclasses
import functools
import tomllib
from importlib import resources
from typing import Any, Literal, NamedTuple

from btlm_jax.checkpoint.schemes import padded_inputs
from btlm_jax.config import BTLMConfig
from btlm_jax.perf import accounting

Precision = Literal["bf16", "int8", "int4"]
Cache = Literal["bf16", "int8"]
PRECISIONS: tuple[Precision, ...] = ("bf16", "int8", "int4")
CACHES: tuple[Cache, ...] = ("bf16", "int8")
CONTEXTS = (0, 2048, 4096, 8192)

# The published run of BTLM-3B-8K (the recipe of that name): tokens, tokens per sequence.
BTLM_PHASES = ((119_727 * 1920 * 2048, 2048), (39_909 * 480 * 8192, 8192))
FORMULAS = (
    "forward FLOPs per token with S keys: 2 (kernels + V D) + 4 L D S; kernels are the entries of "
    "q, k, v, out and MLP of L layers",
    "training FLOPs: 3 x forward x tokens, S the sequence length (full attention); 6 N D leaves "
    "attention out and counts embeddings",
    "weights: in int8 a scale (fp32) per output, in int4 one (bf16) per 64 inputs, embedding and "
    "head int8 in both, biases and norms bf16: what `btlm convert --quantize` writes",
    "cache per token: 2 L x key-value heads x (head_dim x bytes, in int8 + 4 of a scale)",
    "memory: weights and the cache of one sequence, without activations and libraries",
)


@dataclasses.dataclass(frozen=True)
class DecoderShape:
    """The sizes of a decoder on which FLOPs and bytes depend.

    Attributes:
      name: name of the model.
      vocab, width, layers, heads, kv_heads, inner: sizes.
      gated: whether the MLP has two matrices from width to inner.
      tied: whether the head is the embedding.
      biases: whether all projections have biases.
      norms: normalizations per layer; there is one more at the end.
      norm_arrays: arrays per normalization: 2 with biases, else 1.
      phases: (tokens, tokens per sequence) of each phase of the training.
      positions: rows of the learned position embedding.
      sources: URLs for the shape and the training.
    """

    name: str
    vocab: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    inner: int
    gated: bool
    tied: bool
    biases: bool
    norms: int
    norm_arrays: int
    phases: tuple[tuple[float, int], ...]
    positions: int = 0
    sources: tuple[str, ...] = ()

    @property
    def head_dim(self) -> int:
        """The width of one attention head."""
        return self.width // self.heads

    @property
    def kernels(self) -> tuple[tuple[int, int], ...]:
        """(inputs, outputs) of every matrix of one layer."""
        keys = self.kv_heads * self.head_dim
        attention = ((self.width, self.width), *[(self.width, keys)] * 2, (self.width, self.width))
        return (*attention, *[(self.width, self.inner)] * (1 + self.gated),
                (self.inner, self.width))  # fmt: skip

    @property
    def vectors(self) -> int:
        """Parameters outside matrix products: normalizations and biases."""
        biases = sum(n for _, n in self.kernels) if self.biases else 0
        norm = self.norm_arrays * self.width
        return self.layers * (self.norms * norm + biases) + norm

    @property
    def parameters(self) -> int:
        """N, the number of parameters; a tied head counts once."""
        kernels = self.layers * sum(i * o for i, o in self.kernels)
        embeddings = (self.vocab * (1 if self.tied else 2) + self.positions) * self.width
        return kernels + embeddings + self.vectors

    @property
    def tokens(self) -> float:
        """Tokens that the model was trained on."""
        return sum(tokens for tokens, _ in self.phases)

    def forward_flops(self, keys: float) -> float:
        """Returns the FLOPs of one token that attends to `keys` keys."""
        kernels = self.layers * sum(i * o for i, o in self.kernels)
        return accounting.forward_flops(kernels, self.vocab, self.width, self.layers, keys)

    @property
    def training_flops(self) -> float:
        """FLOPs of the whole training, attention and head included."""
        return sum(3 * tokens * self.forward_flops(length) for tokens, length in self.phases)

    @property
    def six_n_d(self) -> float:
        """6 N D, the usual rule of thumb for `training_flops`."""
        return 6.0 * self.parameters * self.tokens

    def weight_bytes(self, precision: Precision) -> int:
        """Returns the bytes of all weights, as quantized on disk (int4 in groups of 64)."""
        if precision == "bf16":
            return 2 * self.parameters
        per_layer = 0
        for inputs, outputs in self.kernels:
            if precision == "int4":
                filled = padded_inputs(inputs)
                per_layer += outputs * (filled // 2 + filled // 64 * 2)
            else:
                per_layer += outputs * (inputs + 4)
        rows = self.vocab * (1 if self.tied else 2)
        return (
            self.layers * per_layer + rows * (self.width + 4)
            + 2 * (self.vectors + self.positions * self.width)
        )  # fmt: skip

    def cache_bytes(self, context: int, cache: Cache) -> int:
        """Returns the bytes of the keys and values of one sequence, as `kv_cache` holds them."""
        per_head = {"bf16": 2 * self.head_dim, "int8": self.head_dim + 4}[cache]
        return 2 * self.layers * self.kv_heads * per_head * context


class SequenceMemory(NamedTuple):
    """Bytes of weights and cache, with the conditions under which they hold."""

    bytes: int
    precision: Precision
    context: int
    cache: Cache

    def __str__(self) -> str:
        cache = (
            f"a cache of {self.context:,} tokens in {self.cache}" if self.context else "no cache"
        )
        return f"{self.bytes / 1e9:.2f} GB ({self.precision} weights, {cache})"


def sequence_memory(
    shape: DecoderShape, precision: Precision, context: int, cache: Cache
) -> SequenceMemory:
    """Returns the memory of the weights and the cache of one sequence.

    Raises:
      ValueError: a negative context.
    """
    if context < 0:
        raise ValueError(f"context: found {context}, expected a number of tokens >= 0")
    n = shape.weight_bytes(precision) + shape.cache_bytes(context, cache)
    return SequenceMemory(n, precision, context, cache)


@functools.cache
def load_peers() -> tuple[DecoderShape, ...]:
    """Reads the 7B models of `peers.toml`."""
    text = resources.files("btlm_jax.perf").joinpath("peers.toml").read_text(encoding="utf-8")
    shapes = []
    for raw in tomllib.loads(text)["model"]:
        sources = raw.pop("shape"), raw.pop("training")
        phases = tuple((float(tokens), int(length)) for tokens, length in raw.pop("phases"))
        shapes.append(DecoderShape(**raw, phases=phases, sources=sources))
    return tuple(shapes)


def shape_of_config(config: BTLMConfig, name: str) -> DecoderShape:
    """Returns the shape of a BTLM, with the training of BTLM-3B-8K: 627.7B tokens, 157B at 8k."""
    c = config
    return DecoderShape(
        name=name, vocab=c.vocab_size, width=c.n_embd, layers=c.n_layer, heads=c.n_head,
        kv_heads=c.n_head, inner=c.n_inner, gated=c.gated, tied=c.tie_word_embeddings, biases=True,
        norms=2, norm_arrays=2, phases=BTLM_PHASES, positions=c.position_limit or 0,
    )  # fmt: skip


def is_released(shape: DecoderShape) -> bool:
    """Returns whether a shape is that of BTLM-3B-8K, the subject of the claims."""
    released = shape_of_config(BTLMConfig.preset("btlm-3b-8k"), shape.name)
    return shape == released


def saving(ours: float, theirs: float) -> float:
    """Returns the fraction by which ours is smaller than theirs."""
    return 1 - ours / theirs


class Claim(NamedTuple):
    """A claim of the model card.

    Attributes:
      claim: the text of the claim.
      verdict: whether our counts confirm it.
      found: the counts, one line each. The name is a key of `btlm info --json`.
    """

    claim: str
    verdict: Literal["holds", "holds under conditions", "does not hold"]
    found: tuple[str, ...]


def check_claims(ours: DecoderShape) -> list[Claim]:
    """Checks the four claims of the model card against our own counts."""
    others = load_peers()
    return [_training(ours, others), _inference(ours, others), _memory(ours, others),
            _three_gigabytes(ours)]  # fmt: skip


def _training(ours: DecoderShape, others: tuple[DecoderShape, ...]) -> Claim:
    lines, by_tokens = [], dict[float, dict[str, float]]()
    for p in sorted(others, key=lambda p: p.tokens):
        saved = saving(ours.training_flops, p.training_flops)
        by_tokens.setdefault(p.tokens, {})[p.name] = saved
    for tokens, savings in by_tokens.items():
        named = ", ".join(f"{name} {s:.1%}" for name, s in savings.items())
        lines.append(f"against 7B models of {tokens / 1e12:g}T tokens: {named}")
    holds = all(s >= 0.705 for s in next(iter(by_tokens.values())).values())
    return Claim("71 % fewer training FLOPs", "holds" if holds else "does not hold", tuple(lines))


def _inference(ours: DecoderShape, others: tuple[DecoderShape, ...]) -> Claim:
    lines = []
    for context in CONTEXTS:
        ratios = {p.name: p.forward_flops(context) / ours.forward_flops(context) for p in others}
        low, high = min(ratios, key=lambda n: ratios[n]), max(ratios, key=lambda n: ratios[n])
        lines.append(
            f"after {context:,} tokens: {ratios['LLaMA-7B']:.2f}x less than LLaMA-7B; "
            f"{ratios[low]:.2f}x ({low}) to {ratios[high]:.2f}x ({high})"
        )
    at_zero = [p.forward_flops(0) / ours.forward_flops(0) for p in others]
    holds = min(at_zero) >= 2.45
    return Claim(
        "2.5x less inference compute",
        "holds under conditions" if holds else "does not hold",
        (*lines, "attention is a larger part of BTLM's FLOPs, so the ratio falls as contexts grow"),
    )  # fmt: skip


class Combination(NamedTuple):
    """Memory of our model and of a peer under the same conditions."""

    ours: SequenceMemory
    theirs: SequenceMemory

    @property
    def saving(self) -> float:
        """The fraction by which ours is smaller."""
        return saving(self.ours.bytes, self.theirs.bytes)


def memory_combinations(
    ours: DecoderShape, peer: DecoderShape, contexts: tuple[int, ...] = CONTEXTS
) -> list[Combination]:
    """Returns every combination of precision, context and cache dtype; one cache dtype at 0."""
    return [
        Combination(
            sequence_memory(ours, precision, context, cache),
            sequence_memory(peer, precision, context, cache),
        )
        for precision in PRECISIONS
        for cache in CACHES
        for context in contexts
        if context or cache == CACHES[0]
    ]


def _memory(ours: DecoderShape, others: tuple[DecoderShape, ...]) -> Claim:
    lines, holds = [], False
    llama = next(p for p in others if p.name == "LLaMA-7B")
    every = memory_combinations(ours, llama)
    weights = [c.saving for c in every if not c.ours.context]
    lines.append(f"weights alone, against LLaMA-7B: {min(weights):.1%} to {max(weights):.1%}")
    for c in every:
        if round(100 * c.saving) == 58 and c.ours.context:
            holds = True
            theirs = f"LLaMA-7B {c.theirs.bytes / 1e9:.2f} GB"
            lines.append(f"{c.saving:.2%}, rounded 58 %: {c.ours}, {theirs}")
    rest = [c for c in every if c.ours.context and round(100 * c.saving) != 58]
    lines.append(
        f"elsewhere {min(c.saving for c in rest):.1%} to {max(c.saving for c in rest):.1%}; the "
        "card does not say which conditions it means"
    )
    verdict = "holds under conditions" if holds else "does not hold"
    return Claim("58 % less memory", verdict, tuple(lines))


def longest_context(shape: DecoderShape, precision: Precision, cache: Cache, limit: float) -> int:
    """Returns the longest context that fits `limit` bytes, weights included; 0 if none fits."""
    room = limit - shape.weight_bytes(precision)
    return max(0, int(room // shape.cache_bytes(1, cache)))


def _three_gigabytes(ours: DecoderShape) -> Claim:
    lines = [
        f"up to {longest_context(ours, 'int4', cache, 3e9):,} tokens in a cache of {cache}; "
        + ", ".join(str(sequence_memory(ours, "int4", context, cache)) for context in CONTEXTS[2:])
        for cache in CACHES
    ]
    holds = longest_context(ours, "int4", "int8", 3e9) > 0
    verdict = "holds under conditions" if holds else "does not hold"
    return Claim("3 GB at 4 bits", verdict, tuple(lines))


def comparison_numbers(ours: DecoderShape, contexts: tuple[int, ...] = CONTEXTS) -> dict[str, Any]:
    """Returns the whole comparison as plain values, for a JSON file."""

    def described(shape: DecoderShape) -> dict[str, Any]:
        return dataclasses.asdict(shape) | {
            "parameters": shape.parameters,
            "tokens": shape.tokens,
            "training_flops": shape.training_flops,
            "six_n_d": shape.six_n_d,
            "forward_flops": {str(s): shape.forward_flops(s) for s in contexts},
            "memory": [
                sequence_memory(shape, precision, context, cache)._asdict()
                for precision in PRECISIONS
                for cache in CACHES
                for context in contexts
            ],
        }

    released = is_released(ours)
    return {
        "formulas": list(FORMULAS),
        "model": described(ours),
        "peers": [
            described(p)
            | {
                "saves_training_flops": saving(ours.training_flops, p.training_flops),
                "saves_six_n_d": saving(ours.six_n_d, p.six_n_d),
                "inference_ratio": {
                    str(s): p.forward_flops(s) / ours.forward_flops(s) for s in contexts
                },
            }
            for p in load_peers()
        ],
        "claims": [c._asdict() for c in check_claims(ours)] if released else [],
    }
