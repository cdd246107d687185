"""The options of rows as arrays, so that changing their values compiles nothing.

A row that does not use a rule has values with which the rule changes nothing, so rows with
different options share a batch. A rule that no row uses is None and costs nothing. Which rules are
present, and the padded sizes of lists of tokens, select the compiled program.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from btlm_jax.generation.options import GenerationOptions

_NO_TOKEN = -1  # pads lists of tokens
_ANY_TOKEN = -1  # in the context of a bias
_MIN_LIST = 4  # padded size of the shortest lists
_FEW_CANDIDATES = 128  # more than the largest top_k, so that ties with it fit
_ALL_CANDIDATES = np.iinfo(np.int32).max


@dataclasses.dataclass(frozen=True)
class RuleSizes:
    """Static sizes of the rules of rows; each compiles a program.

    Attributes:
      ngram_sizes: the values of `no_repeat_ngram_size`, without 0.
      candidates: number of most likely tokens among which top_k and top_p select, capped by the
        vocabulary: few if every top_k is small, because sorting all takes long; 0 without both.
    """

    ngram_sizes: tuple[int, ...] = ()
    candidates: int = 0


class Sampling(NamedTuple):
    """The rules of rows that sample."""

    do_sample: Any  # bool [R]; the other rows take the most likely token
    temperature: Any  # fp32 [R]
    top_k: Any  # int32 [R]
    tail: Any  # fp32 [R], 1 - top_p; -1 keeps all


class Cutoffs(NamedTuple):
    """Minimum probabilities of sampled tokens, fp32 [R] each."""

    min_p: Any
    epsilon: Any
    eta: Any


class LengthDecay(NamedTuple):
    """The exponential decay of a text's length."""

    start: Any  # int32 [R]
    factor: Any  # fp32 [R]


class Search(NamedTuple):
    """The rules of beam searches."""

    early_stopping: Any  # bool [R], end as soon as all beams have ended
    allows_longer: Any  # bool [R], continue while a longer beam could be better
    length_penalty: Any  # fp32 [R]


class TokenBias(NamedTuple):
    """Numbers added to the scores of tokens where the row ends with their contexts."""

    context: Any  # int32 [R, N, W], aligned on the right; -1 matches any token
    token: Any  # int32 [R, N]; -1 is none
    value: Any  # fp32 [R, N]


class RowOptions(NamedTuple):
    """The options of R rows; None for a rule that no row uses. See `options.GenerationOptions`."""

    eos: Any  # int32 [R, E], ids that end the row; -1 is none
    bias: TokenBias | None = None
    repetition_penalty: Any = None  # fp32 [R]
    ngram_size: Any = None  # int32 [R]; 0 is none
    bad_words: TokenBias | None = None
    forced_bos: Any = None  # int32 [R]; -1 is none
    forced_eos: Any = None  # int32 [R, F]; -1 is none
    remove_invalid: Any = None  # bool [R]
    decay: LengthDecay | None = None
    suppressed: Any = None  # int32 [R, N]; -1 is none
    begin_suppressed: Any = None  # int32 [R, N]; -1 is none
    sampling: Sampling | None = None
    cutoffs: Cutoffs | None = None
    typical_p: Any = None  # fp32 [R]
    renormalize: Any = None  # bool [R]
    search: Search | None = None


def row_options(options: Sequence[GenerationOptions], eos: Sequence[tuple[int, ...]]) -> RowOptions:
    """Returns the options of rows as NumPy arrays.

    Args:
      options: the options of each row.
      eos: the ids that end each row.
    """

    samples = [o.do_sample for o in options]

    def column(dtype: Any, values: Iterable[Any], used: Iterable[bool] = (True,)) -> Any:
        return np.array(list(values), dtype) if any(used) else None

    def sampled(name: str, neutral: Any) -> list[Any]:
        """Returns the option for rows that sample, and a value without effect for the others."""
        return [getattr(o, name) if o.do_sample else neutral for o in options]

    off = np.iinfo(np.int32).max  # more tokens than there are
    sampling = Sampling(
        column(bool, samples),
        column(np.float32, sampled("temperature", 1.0)),
        column(np.int32, (min(k or off, off) for k in sampled("top_k", off))),
        # In float64 up to here, as in transformers. A tail of 0 would remove probabilities of 0.
        column(np.float32, (1 - p if p < 1 else -1.0 for p in sampled("top_p", 1.0))),
    )
    min_p = [-1.0 if p is None else p for p in sampled("min_p", None)]
    epsilon, eta = sampled("epsilon_cutoff", 0.0), sampled("eta_cutoff", 0.0)
    cutoffs = Cutoffs(*(column(np.float32, values) for values in (min_p, epsilon, eta)))
    typical = [p if p < 1 else math.inf for p in sampled("typical_p", 1.0)]
    decays = [o.exponential_decay_length_penalty or (off, 1.0) for o in options]
    decay = LengthDecay(
        column(np.int32, (start for start, _ in decays)),
        column(np.float32, (factor for _, factor in decays)),
    )
    search = Search(
        column(bool, (o.early_stopping is True for o in options)),
        column(bool, (o.early_stopping == "never" and o.length_penalty > 0 for o in options)),
        column(np.float32, (o.length_penalty for o in options)),
    )
    forced_bos = [o.forced_bos_token_id for o in options]
    penalties = [o.repetition_penalty for o in options]
    sizes = [o.no_repeat_ngram_size for o in options]
    removes = [o.remove_invalid_values for o in options]
    renormalizes = [o.renormalize_logits for o in options]
    biases = [(*o.sequence_bias, *(((t,), b) for t, b in o.logit_bias)) for o in options]
    bad_words = [
        [(ids, -math.inf) for ids in _bannable(o, ends)]
        for o, ends in zip(options, eos, strict=True)
    ]
    has_cutoffs = max(min_p) >= 0 or max(epsilon) > 0 or max(eta) > 0
    return RowOptions(
        eos=_padded(eos, _MIN_LIST),
        bias=_token_bias(biases),
        repetition_penalty=column(np.float32, penalties, (p != 1 for p in penalties)),
        ngram_size=column(np.int32, sizes, map(bool, sizes)),
        bad_words=_token_bias(bad_words),
        forced_bos=column(
            np.int32,
            (_NO_TOKEN if t is None else t for t in forced_bos),
            (t is not None for t in forced_bos),
        ),
        forced_eos=_padded(o.forced_eos_token_id for o in options),
        remove_invalid=column(bool, removes, removes),
        decay=decay if any(o.exponential_decay_length_penalty for o in options) else None,
        suppressed=_padded(o.suppress_tokens for o in options),
        begin_suppressed=_padded(o.begin_suppress_tokens for o in options),
        sampling=sampling if any(samples) else None,
        cutoffs=cutoffs if has_cutoffs else None,
        # A mass that is never reached keeps all tokens.
        typical_p=column(np.float32, typical, (math.isfinite(p) for p in typical)),
        renormalize=column(bool, renormalizes, renormalizes),
        search=search if any(o.num_beams > 1 for o in options) else None,
    )


def rule_sizes(options: Iterable[GenerationOptions]) -> RuleSizes:
    """Returns the static sizes of the rules of rows."""
    sizes, candidates = set(), 0
    for o in options:
        sizes.add(o.no_repeat_ngram_size)
        if o.do_sample and (o.top_k or o.top_p < 1):
            few = 0 < o.top_k < _FEW_CANDIDATES
            candidates = max(candidates, _FEW_CANDIDATES if few else _ALL_CANDIDATES)
    return RuleSizes(tuple(sorted(sizes - {0})), candidates)


def take_rows(options: RowOptions, index: Any) -> RowOptions:
    """Returns the options of the rows at `index`."""
    return jax.tree.map(lambda x: x[index], options)


def _bannable(options: GenerationOptions, eos: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Returns the bad words without those that are a single EOS, because no row could end."""
    return [ids for ids in options.bad_words_ids if len(ids) > 1 or ids[0] not in eos]


def _list_size(longest: int, smallest: int = 0) -> int:
    """Returns the padded size of lists: 0, 4, 16, 64, ...; each is a program."""
    size = max(smallest, _MIN_LIST if longest else 0)
    while size < longest:
        size *= 4
    return size


def _padded(lists: Iterable[Sequence[int]], smallest: int = 0) -> np.ndarray | None:
    """Returns lists of tokens as an array [R, N]; None if all are empty and may be left out."""
    lists = list(lists)
    size = _list_size(max(map(len, lists)), smallest)
    if not size:
        return None
    return np.array([[*tokens, *[_NO_TOKEN] * (size - len(tokens))] for tokens in lists], np.int32)


def _token_bias(rows: Sequence[Sequence[tuple[Sequence[int], float]]]) -> TokenBias | None:
    """Returns (token sequence, number) pairs of every row as arrays; None if there are none."""
    size = _list_size(max(map(len, rows)))
    if not size:
        return None
    width = _list_size(max(len(ids) - 1 for row in rows for ids, _ in row), _MIN_LIST)
    context = np.full((len(rows), size, width), _ANY_TOKEN, np.int32)
    token = np.full((len(rows), size), _NO_TOKEN, np.int32)
    value = np.zeros((len(rows), size), np.float32)
    for r, row in enumerate(rows):
        for n, (ids, number) in enumerate(row):
            context[r, n, width - len(ids) + 1 :] = ids[:-1]
            token[r, n], value[r, n] = ids[-1], number
    return TokenBias(context, token, value)
