"""Options of `generate`: every rule at once, and the recorded beam search."""

from __future__ import annotations

from btlm_jax.generation import request, row_options
from btlm_jax.generation.options import GenerationOptions

# Token ids below 23.
SAMPLING = dict(
    do_sample=True, temperature=0.7, top_k=9, top_p=0.8, min_p=0.02, typical_p=0.9,
    epsilon_cutoff=0.01, eta_cutoff=0.02,
)  # fmt: skip
PROCESSORS = dict(
    repetition_penalty=1.3, no_repeat_ngram_size=2, bad_words_ids=[[3], [1, 4], [0, 1, 2, 3, 4]],
    sequence_bias={(2,): 1.5, (1, 5): -2.0}, logit_bias={7: 0.5}, forced_bos_token_id=4,
    forced_eos_token_id=[6, 9], suppress_tokens=[11, 12, 13, 14, 15], begin_suppress_tokens=[16],
    exponential_decay_length_penalty=(1, 1.2), remove_invalid_values=True, renormalize_logits=True,
)  # fmt: skip
# The first example of the model card, as it was recorded.
BEAMS = dict(
    num_beams=5, no_repeat_ngram_size=2, early_stopping=True, max_new_tokens=20, pad_token_id=96,
    return_dict_in_generate=True,
)  # fmt: skip


def share_programs(monkeypatch) -> None:
    """Makes all requests use the program of every processor, as if another row needed them all."""
    other = GenerationOptions(**PROCESSORS)

    def beside_other(options, eos):
        together = row_options.row_options([*options, other], [*eos, ()])
        return row_options.take_rows(together, slice(0, -1))

    sizes = row_options.RuleSizes(ngram_sizes=(1, 2, 3))
    monkeypatch.setattr(request, "row_options", beside_other)
    monkeypatch.setattr(request, "rule_sizes", lambda options: sizes)
