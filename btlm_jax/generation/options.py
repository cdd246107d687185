"""The options of `generate` besides lengths and seeds, with transformers' names and defaults.

This module does not need JAX. The rules that options use select the compiled program; their values
are arguments of it (`row_options`).
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

TokenBias = tuple[tuple[tuple[int, ...], float], ...]

# Without effect unless tokens are sampled, or beams are searched.
SAMPLING_ONLY = (
    "temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"
)  # fmt: skip
BEAMS_ONLY = ("early_stopping", "length_penalty")


@dataclasses.dataclass(frozen=True)
class GenerationOptions:
    """The options of `generate`, checked. None means the default.

    Attributes:
      do_sample: sample from the distribution; otherwise take the most likely token (of equally
        likely ones, the lowest id).
      temperature: divides the scores; > 0. `do_sample` enables this and the next six.
      top_k: keep the k most likely tokens, and any that tie with the last of them; 0 keeps all.
      top_p: keep the smallest set of most likely tokens whose probability reaches p, in (0, 1].
      min_p: drop tokens less likely than this fraction of the most likely one, in [0, 1].
      typical_p: keep the tokens whose information is nearest to the entropy, up to this total
        probability, in (0, 1]; arXiv 2202.00666.
      epsilon_cutoff: drop tokens less likely than this, in [0, 1); 0 drops none.
      eta_cutoff: like `epsilon_cutoff`, with a threshold that falls as the entropy rises; arXiv
        2210.15191.
      num_beams: 1, or the width of a beam search (with `do_sample`, of beam sampling).
      early_stopping: when a beam search ends: True as soon as `num_beams` beams have ended, False
        when a better one is unlikely, "never" when a better one is impossible.
      length_penalty: exponent of the length normalization: a finished beam's score is its
        log-probability divided by (number of new tokens) ** length_penalty.
      num_return_sequences: continuations per prompt: at most `num_beams` with beams, any number
        when sampling.
      repetition_penalty: > 0; positive scores of tokens that occur in the prompt or the text are
        divided by it and negative ones multiplied, once each.
      no_repeat_ngram_size: no n-gram of this size occurs twice, prompt included; 0 is off.
      bad_words_ids: token sequences that must not occur.
      sequence_bias: {token sequence: number added to the score of its last token}; or pairs.
      logit_bias: {token id: number added to its score}.
      forced_bos_token_id: the second token, if the prompt has one token.
      forced_eos_token_id: one id or several, one of which ends a row that reaches its maximum
        length.
      suppress_tokens, begin_suppress_tokens: ids that never occur, or not as the first new token.
      exponential_decay_length_penalty: (start, factor): after `start` new tokens, the scores of
        the EOS tokens rise by factor ** (tokens since then).
      remove_invalid_values: replace NaN by 0 and infinities by the largest finite values.
      renormalize_logits: make the final scores log-probabilities that sum to 1.

    Raises:
      ValueError: a value is out of range, or two options contradict each other.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    min_p: float | None = None
    typical_p: float = 1.0
    epsilon_cutoff: float = 0.0
    eta_cutoff: float = 0.0
    num_beams: int = 1
    early_stopping: bool | Literal["never"] = False
    length_penalty: float = 1.0
    num_return_sequences: int = 1
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    bad_words_ids: Any = ()
    sequence_bias: Any = ()
    logit_bias: Any = ()
    forced_bos_token_id: int | None = None
    forced_eos_token_id: Any = ()
    suppress_tokens: Any = ()
    begin_suppress_tokens: Any = ()
    exponential_decay_length_penalty: Any = None
    remove_invalid_values: bool = False
    renormalize_logits: bool = False

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            value = field.default if value is None else _to_hashable(field.name, value)
            object.__setattr__(self, field.name, value)
        for name in ("do_sample", "remove_invalid_values", "renormalize_logits"):
            _expect(name, getattr(self, name), isinstance(getattr(self, name), bool), "a bool")
        for name in ("num_beams", "num_return_sequences"):
            _expect_int(name, getattr(self, name), 1)
        for name in ("no_repeat_ngram_size", "top_k"):
            _expect_int(name, getattr(self, name), 0, " (0 is off)")
        is_rule = isinstance(self.early_stopping, bool) or self.early_stopping == "never"
        _expect("early_stopping", self.early_stopping, is_rule, 'True, False or "never"')
        _expect_number("length_penalty", self.length_penalty, math.isfinite, "a finite number")
        _expect_number(
            "repetition_penalty", self.repetition_penalty, lambda x: 0 < x < math.inf, "> 0"
        )
        self._check_sampling()
        self._check_num_return_sequences()
        self._check_forced_tokens()

    def _check_sampling(self) -> None:
        # Where nothing is sampled, 0 turns them off, as other tools write it.
        off = () if self.do_sample else (0,)
        # A smaller temperature would be flushed to zero in fp32, or send scores to infinity.
        hint = "> 0 (for greedy decoding do not sample)"
        _expect_number(
            "temperature", self.temperature, lambda x: x in off or 1e-30 < x < math.inf, hint
        )
        for name in ("top_p", "typical_p"):
            expected = "a probability in (0, 1]"
            _expect_number(name, getattr(self, name), lambda x: x in off or 0 < x <= 1, expected)
        if self.min_p is not None:
            _expect_number("min_p", self.min_p, lambda x: 0 <= x <= 1, "a fraction in [0, 1]")
        for name in ("epsilon_cutoff", "eta_cutoff"):
            expected = "a probability in [0, 1), 0 for none"
            _expect_number(name, getattr(self, name), lambda x: 0 <= x < 1, expected)

    def _check_forced_tokens(self) -> None:
        bos = () if self.forced_bos_token_id is None else (self.forced_bos_token_id,)
        forced_tokens = {
            "forced_bos_token_id": bos,
            "forced_eos_token_id": self.forced_eos_token_id,
        }
        for name, tokens in forced_tokens.items():
            if tokens and set(tokens) <= set(self.suppress_tokens):
                raise ValueError(
                    f"{name}: found {list(tokens)}, all in suppress_tokens too, which leaves no "
                    "token; expected at least one that is not suppressed (to prevent an early "
                    "end, set min_new_tokens instead)"
                )

    def _check_num_return_sequences(self) -> None:
        if self.num_return_sequences > self.num_beams > 1:
            raise ValueError(
                f"num_return_sequences: found {self.num_return_sequences}, expected at most "
                f"num_beams = {self.num_beams}: search more beams"
            )
        if self.num_return_sequences > 1 and self.num_beams == 1 and not self.do_sample:
            raise ValueError(
                f"num_return_sequences: found {self.num_return_sequences}, expected 1: greedy "
                "decoding has one result; set do_sample=True or num_beams"
            )

    @classmethod
    def from_kwargs(
        cls, kwargs: Mapping[str, Any], other_names: Iterable[str] = ()
    ) -> GenerationOptions:
        """Builds options from keyword arguments.

        Args:
          kwargs: values by option name.
          other_names: argument names that the caller handles itself; used for suggestions only.

        Raises:
          ValueError: an unknown name (the message suggests the nearest known one), or as the
            constructor.
        """
        known_names = {f.name for f in dataclasses.fields(cls)}
        for name in kwargs:
            if name not in known_names:
                near = difflib.get_close_matches(name, [*known_names, *other_names], 1)
                hint = f"did you mean {near[0]}?" if near else "see `help(btlm.generate)`"
                raise ValueError(f"generate has no argument {name!r}: {hint}")
        return cls(**kwargs)

    @property
    def rows_per_prompt(self) -> int:
        """Rows decoded for each prompt."""
        return self.num_beams if self.num_beams > 1 else self.num_return_sequences

    @property
    def unused(self) -> list[str]:
        """One message for each option that is set but has no effect, with the option it needs."""
        needed = {} if self.do_sample else dict.fromkeys(SAMPLING_ONLY, "do_sample=True")
        needed |= {} if self.num_beams > 1 else dict.fromkeys(BEAMS_ONLY, "num_beams > 1")
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        return [
            f"{name}={getattr(self, name)} does nothing without {requirement}"
            for name, requirement in needed.items()
            if getattr(self, name) != defaults[name]
        ]

    def check_vocabulary(self, size: int) -> None:
        """Raises ValueError if any option names a token outside 0 to size - 1."""
        sequences = (*self.bad_words_ids, *(ids for ids, _ in self.sequence_bias))
        tokens_by_option = {
            "bad_words_ids": [t for ids in self.bad_words_ids for t in ids],
            "sequence_bias": [t for ids in sequences for t in ids],
            "logit_bias": [t for t, _ in self.logit_bias],
            "forced_bos_token_id": [t for t in [self.forced_bos_token_id] if t is not None],
            "forced_eos_token_id": self.forced_eos_token_id,
            "suppress_tokens": self.suppress_tokens,
            "begin_suppress_tokens": self.begin_suppress_tokens,
        }
        for name, tokens in tokens_by_option.items():
            if unknown := [t for t in tokens if not 0 <= t < size]:
                raise ValueError(f"{name}: found {unknown}, expected ids from 0 to {size - 1}")


def _to_hashable(name: str, value: Any) -> Any:
    """Returns the option's value as hashable Python scalars and tuples."""
    if name in ("suppress_tokens", "begin_suppress_tokens", "forced_eos_token_id"):
        return _to_ids(name, np.atleast_1d(np.asarray(value)).tolist())
    if name == "bad_words_ids":
        words = tuple(dict.fromkeys(_to_ids(name, ids) for ids in _to_iterable(name, value)))
        _expect(name, value, all(words), "lists of at least one id each")
        return words
    if name == "sequence_bias":
        bias = {_to_ids(name, ids): _to_bias(name, b) for ids, b in _to_pairs(name, value)}
        _expect(name, value, all(bias), "sequences of at least one id each")
        return tuple(bias.items())
    if name == "logit_bias":
        bias = {_to_ids(name, [t])[0]: _to_bias(name, b) for t, b in _to_pairs(name, value)}
        return tuple(bias.items())
    if name == "forced_bos_token_id":
        return _to_ids(name, [value])[0]
    if name == "exponential_decay_length_penalty":
        ((start, factor),) = _to_pairs(name, [value])
        _expect_int(name, start, 0, " for its start")
        _expect_number(name, factor, lambda x: 0 < x < math.inf, "a factor > 0")
        return start, float(factor)
    return value.item() if isinstance(value, np.generic) else value


def _to_iterable(name: str, value: Any) -> Iterable[Any]:
    _expect(name, value, isinstance(value, Iterable) and not isinstance(value, str), "a list")
    return value


def _to_pairs(name: str, value: Any) -> list[tuple[Any, Any]]:
    pairs = list(value.items() if isinstance(value, Mapping) else _to_iterable(name, value))
    for pair in pairs:
        _expect(name, pair, isinstance(pair, Sequence) and len(pair) == 2, "pairs of two")
    return pairs


def _to_ids(name: str, value: Any) -> tuple[int, ...]:
    valid = isinstance(value, Sequence | np.ndarray) and not isinstance(value, str)
    valid = valid and all(isinstance(t, int | np.integer) for t in value)
    _expect(name, value, valid, "token ids")
    return tuple(int(t) for t in value)


def _to_bias(name: str, value: Any) -> float:
    _expect_number(name, value, lambda x: x < math.inf, "numbers (-inf forbids a token)")
    return float(value)


def _expect(name: str, value: Any, valid: bool, expected: str) -> None:
    if not valid:
        raise ValueError(f"{name}: found {value!r}, expected {expected}")


def _expect_int(name: str, value: Any, minimum: int, hint: str = "") -> None:
    is_int = isinstance(value, int) and not isinstance(value, bool)
    _expect(name, value, is_int and value >= minimum, f">= {minimum}{hint}")


def _expect_number(name: str, value: Any, in_range: Any, expected: str) -> None:
    is_number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    _expect(name, value, bool(is_number and in_range(value)), expected)
