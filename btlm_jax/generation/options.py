"""How to generate: the static options, checked, with transformers' names, defaults and meaning.

Nothing here needs JAX. An `Options` is hashable and static under `jax.jit`: another one is another
program. Lengths and seeds are not among them; those may change without compiling.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

Bias = tuple[tuple[tuple[int, ...], float], ...]

# Those that do nothing unless tokens are drawn, or beams are searched.
_OF_SAMPLING = (
    "temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"
)  # fmt: skip
_OF_BEAMS = ("early_stopping", "length_penalty")


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of `generate` that decide which program runs. None is the default everywhere.

    Attributes:
      do_sample: draw from the distribution; otherwise take the most likely token (the lowest id of
        equals).
      temperature: divides the scores; > 0. This and the next six need `do_sample`.
      top_k: keep the k most likely tokens (and ties with the last); 0 keeps all.
      top_p: keep the smallest set of most likely tokens whose probability reaches p, in (0, 1].
      min_p: drop tokens less likely than this fraction of the most likely one, in [0, 1].
      typical_p: keep the tokens whose information is nearest the entropy, up to this probability,
        in (0, 1]; arXiv 2202.00666.
      epsilon_cutoff: drop tokens less likely than this, in [0, 1); 0 drops none.
      eta_cutoff: the same, with a threshold that falls with the entropy; arXiv 2210.15191.
      num_beams: 1, or the width of a beam search (with `do_sample`, of beam sampling).
      early_stopping: of beams: True ends as soon as `num_beams` have ended, False when a better one
        is unlikely, "never" when none can be better.
      length_penalty: the score of an ended beam is its log-probability divided by the number of its
        new tokens to this power.
      num_return_sequences: continuations of each prompt: at most `num_beams`, or any number when
        sampling.
      repetition_penalty: > 0; scores of tokens seen in prompt and text are divided by it (negative
        ones multiplied), once each.
      no_repeat_ngram_size: no n tokens in a row appear twice, prompt included; 0 is off.
      bad_words_ids: sequences of ids that may not appear.
      sequence_bias: {sequence of ids: number added to the score of its last}; also as pairs.
      logit_bias: {id: number added to its score}.
      forced_bos_token_id: the second token, after a prompt of one.
      forced_eos_token_id: one or several ids, one of which ends a row of the greatest length.
      suppress_tokens, begin_suppress_tokens: ids that never appear, or not as the first new token.
      exponential_decay_length_penalty: (start, factor): from `start` new tokens on, the scores of
        EOS rise by factor ** (tokens since).
      remove_invalid_values: NaN becomes 0, infinities the extreme finite values.
      renormalize_logits: the final scores are log-probabilities that sum to 1.

    Raises:
      ValueError: a value outside its range, or options that contradict each other.
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
            value = field.default if value is None else _plain(field.name, value)
            object.__setattr__(self, field.name, value)
        for name in ("do_sample", "remove_invalid_values", "renormalize_logits"):
            _expect(name, getattr(self, name), isinstance(getattr(self, name), bool), "a bool")
        for name in ("num_beams", "num_return_sequences"):
            _expect_int(name, getattr(self, name), 1)
        for name in ("no_repeat_ngram_size",) + (("top_k",) if self.do_sample else ()):
            _expect_int(name, getattr(self, name), 0, " (0 is off)")
        stops = isinstance(self.early_stopping, bool) or self.early_stopping == "never"
        _expect("early_stopping", self.early_stopping, stops, 'True, False or "never"')
        _expect_number("length_penalty", self.length_penalty, math.isfinite, "a finite number")
        _expect_number("repetition_penalty", self.repetition_penalty, lambda x: x > 0, "> 0")
        if self.do_sample:
            self._check_sampling()
        self._check_sequences()
        self._check_forced()

    def _check_sampling(self) -> None:
        # fp32 would flush smaller ones to zero, or scores to infinity.
        hint = "> 0 (for greedy decoding do not sample)"
        _expect_number("temperature", self.temperature, lambda x: 1e-30 < x < math.inf, hint)
        for name in ("top_p", "typical_p"):
            what = "a probability in (0, 1]"
            _expect_number(name, getattr(self, name), lambda x: 0 < x <= 1, what)
        if self.min_p is not None:
            _expect_number("min_p", self.min_p, lambda x: 0 <= x <= 1, "a fraction in [0, 1]")
        for name in ("epsilon_cutoff", "eta_cutoff"):
            what = "a probability in [0, 1), 0 for none"
            _expect_number(name, getattr(self, name), lambda x: 0 <= x < 1, what)

    def _check_forced(self) -> None:
        bos = () if self.forced_bos_token_id is None else (self.forced_bos_token_id,)
        named = {"forced_bos_token_id": bos, "forced_eos_token_id": self.forced_eos_token_id}
        for name, forced in named.items():
            if forced and set(forced) <= set(self.suppress_tokens):
                raise ValueError(
                    f"{name}: found {list(forced)}, all in suppress_tokens too, expected one "
                    "that is not: no token would be left (against an early end, min_new_tokens)"
                )

    def _check_sequences(self) -> None:
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

    @property
    def copies(self) -> int:
        """Rows decoded for each prompt."""
        return self.num_beams if self.num_beams > 1 else self.num_return_sequences

    @property
    def idle(self) -> list[str]:
        """Options that are set, but do nothing in this way of decoding, with what they need."""
        inert = {} if self.do_sample else dict.fromkeys(_OF_SAMPLING, "do_sample=True")
        inert |= {} if self.num_beams > 1 else dict.fromkeys(_OF_BEAMS, "num_beams > 1")
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        return [
            f"{name}={getattr(self, name)} does nothing without {needed}"
            for name, needed in inert.items()
            if getattr(self, name) != defaults[name]
        ]

    def check_vocabulary(self, size: int) -> None:
        """Raises ValueError if any option names a token outside 0 to size - 1."""
        biased = (*self.bad_words_ids, *(ids for ids, _ in self.sequence_bias))
        named = {
            "bad_words_ids": [t for ids in self.bad_words_ids for t in ids],
            "sequence_bias": [t for ids in biased for t in ids],
            "logit_bias": [t for t, _ in self.logit_bias],
            "forced_bos_token_id": [t for t in [self.forced_bos_token_id] if t is not None],
            "forced_eos_token_id": self.forced_eos_token_id,
            "suppress_tokens": self.suppress_tokens,
            "begin_suppress_tokens": self.begin_suppress_tokens,
        }
        for name, tokens in named.items():
            if unknown := [t for t in tokens if not 0 <= t < size]:
                raise ValueError(f"{name}: found {unknown}, expected ids from 0 to {size - 1}")


def from_names(named: Mapping[str, Any], also: Iterable[str]) -> Options:
    """Options from keyword arguments.

    Args:
      named: values by name.
      also: names that the caller takes itself, to suggest.

    Raises:
      ValueError: an unknown name, with the nearest known one; or as `Options`.
    """
    known = {f.name for f in dataclasses.fields(Options)}
    for name in named:
        if name not in known:
            near = difflib.get_close_matches(name, [*known, *also], 1)
            hint = f"did you mean {near[0]}?" if near else "see `help(btlm.generate)`"
            raise ValueError(f"generate has no argument {name!r}: {hint}")
    return Options(**named)


def _plain(name: str, value: Any) -> Any:
    """The value as hashable Python scalars and tuples."""
    if name in ("suppress_tokens", "begin_suppress_tokens", "forced_eos_token_id"):
        return _ids(name, np.atleast_1d(np.asarray(value)).tolist())
    if name == "bad_words_ids":
        words = tuple(dict.fromkeys(_ids(name, ids) for ids in _iterable(name, value)))
        _expect(name, value, all(words), "lists of at least one id each")
        return words
    if name == "sequence_bias":
        bias = tuple({_ids(name, ids): _bias(name, b) for ids, b in _pairs(name, value)}.items())
        _expect(name, value, all(ids for ids, _ in bias), "sequences of at least one id each")
        return bias
    if name == "logit_bias":
        return tuple({_ids(name, [t])[0]: _bias(name, b) for t, b in _pairs(name, value)}.items())
    if name == "forced_bos_token_id":
        return _ids(name, [value])[0]
    if name == "exponential_decay_length_penalty":
        ((start, factor),) = _pairs(name, [value])
        _expect_int(name, start, 0, " for its start")
        _expect_number(name, factor, lambda x: 0 < x < math.inf, "a factor > 0")
        return start, float(factor)
    return value.item() if isinstance(value, np.generic) else value


def _iterable(name: str, value: Any) -> Iterable[Any]:
    _expect(name, value, isinstance(value, Iterable) and not isinstance(value, str), "a list")
    return value


def _pairs(name: str, value: Any) -> list[tuple[Any, Any]]:
    pairs = list(value.items() if isinstance(value, Mapping) else _iterable(name, value))
    for pair in pairs:
        _expect(name, pair, isinstance(pair, Sequence) and len(pair) == 2, "pairs of two")
    return pairs


def _ids(name: str, value: Any) -> tuple[int, ...]:
    good = isinstance(value, Sequence | np.ndarray) and not isinstance(value, str)
    good = good and all(isinstance(t, int | np.integer) for t in value)
    _expect(name, value, good, "token ids")
    return tuple(int(t) for t in value)


def _bias(name: str, value: Any) -> float:
    _expect_number(name, value, lambda x: x < math.inf, "numbers (-inf forbids a token)")
    return float(value)


def _expect(name: str, found: Any, holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(f"{name}: found {found!r}, expected {what}")


def _expect_int(name: str, found: Any, least: int, hint: str = "") -> None:
    whole = isinstance(found, int) and not isinstance(found, bool)
    _expect(name, found, whole and found >= least, f">= {least}{hint}")


def _expect_number(name: str, found: Any, holds: Any, what: str) -> None:
    number = isinstance(found, int | float | np.number) and not isinstance(found, bool)
    _expect(name, found, bool(number and holds(found)), what)
