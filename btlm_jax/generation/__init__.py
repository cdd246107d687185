"""Text generation.

Data flows through these modules: options (what the user asks) -> request (checked prompts and
options) -> row_options (options as arrays) -> prefill (prompts to a KV cache and logits) ->
sample_loop or beam_loop (token by token) -> results. `generate` runs one batch to its end
(`row_batch`); an `engine` continues requests that come and go (`running_batch`), and `streaming`,
`continuous_batching` and files of prompts use it.
"""
