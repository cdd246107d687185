"""Text generation.

Data flows through these modules: options (what to compile) -> prompts (checked token ids, lengths,
seeds) -> prefill (prompts to a KV cache and logits) -> sample_loop or beam_loop (token by token) ->
results. `generate` runs one batch to its end; `continuous_batching` and `streaming` run `request`s,
in which every row has its own length.
"""
