"""The cost of quantization, against independent computations."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from btlm_jax import load_tokenizer
from btlm_jax.checkpoint import quantization
from btlm_jax.checkpoint.quantization import Quantization
from btlm_jax.evaluation import quantization_cost
from btlm_jax.evaluation.documents import TokenizedDocument
from btlm_jax.evaluation.perplexity import CrossEntropy, cross_entropy
from btlm_jax.evaluation.rolling_windows import cut_rolling_windows
from btlm_jax.model import packed, weights
from btlm_jax.model.params import Params, flatten_tree, unflatten_tree
from btlm_jax.train.demo import quickstart


def test_int8_costs_little_and_int4_more(trained):
    folder, model, params, text, loss = trained
    ids = np.array(load_tokenizer(folder).encode(text).ids)
    letters = quickstart.unigram_entropy(ids)
    windows = cut_rolling_windows(model.config, [TokenizedDocument(ids, len(text))], 95)
    kinds = [Quantization.parse(kind) for kind in ("int8", "int4", "int4:128")]
    costs = quantization_cost.compare_quantizations(model, params, windows, kinds)
    baseline = costs[0].loss.nats_per_token
    assert max(baseline, loss) < letters - 0.5, "the model has learned"
    int8, int4, int4_128 = (cost.loss.nats_per_token - baseline for cost in costs[1:])
    # The log-probability of a token is off by about 0.03 in int8 and 0.1 in int4, in either
    # direction. In the mean over 2000 tokens, chance leaves 0.1 / 2000 ** 0.5 = 0.002, and the
    # divergence of the two softmaxes adds 0.1 ** 2 / 2 = 0.005.
    assert abs(int8) < 0.01 and max(abs(int4), abs(int4_128)) < 0.03
    # The mean size of the changes of many texts depends less on chance. The relative error of
    # weights is 0.09 in int4 and 0.007 in int8, as for the embedding and rounded inputs.
    sizes = [rms_change(model, params, ids, scheme) for scheme in kinds[:2]]
    assert 0 < 2 * sizes[0] < sizes[1]
    # The loss of the stored values, independently: dequantized weights in the original layout.
    for scheme, cost in zip(kinds[1:], costs[2:], strict=True):
        quantized = quantization.quantize_params(params, model.config, scheme)
        dequantized = dequantize_params(params, quantized, model.config)
        plain = cross_entropy(model, dequantized, windows).nats_per_token
        assert abs(cost.loss.nats_per_token - plain) < 1e-4  # fp32, in another order


def rms_change(model, params, ids, scheme) -> float:
    """Returns the root mean square, over texts of 60 tokens, of the changes of nats per token."""
    both = params, quantization.quantize_params(params, model.config, scheme)
    changes = []
    for start in range(0, len(ids) - 60, 60):
        windows = cut_rolling_windows(
            model.config, [TokenizedDocument(ids[start:][:60], 60)], 95, length=60
        )
        original, quantized = (cross_entropy(model, p, windows).nats_per_token for p in both)
        changes.append(quantized - original)
    assert len(changes) > 25
    return float(np.sqrt(np.square(changes).mean()))


def dequantize_params(params, quantized_params, config) -> Params:
    """Returns stacked float weights: the quantized values times their scales."""
    leaves = {path: [] for path in flatten_tree(params)}
    flat = flatten_tree(quantized_params)
    for leaf in weights.disk_leaves(config):
        w, x = leaf.weight, flat[leaf.path]
        if isinstance(x, packed.PackedWeight):
            x = packed.dequantize(x, jnp.float32)
            outputs = [i for i in range(len(w.shape)) if i not in w.inputs]
            order = [*outputs, *w.inputs]
            x = x.reshape([w.shape[i] for i in order]).transpose(np.argsort(order))
        leaves[w.path].append(x)
    stacked = {w.path: jnp.stack(leaves[w.path]) if w.stacked else leaves[w.path][0]
               for w in weights.weight_table(config)}  # fmt: skip
    return unflatten_tree(stacked)


def test_the_table_shows_changes_against_the_first_row():
    costs = [
        quantization_cost.QuantizationCost("float32", 4096, 32.0, CrossEntropy(200.0, 100, 300)),
        quantization_cost.QuantizationCost("int8", 1024, 8.0, CrossEntropy(201.0, 100, 300)),
    ]
    head, baseline, int8, note = quantization_cost.format_quantization_costs(costs)
    assert head.split()[0] == "weights" and len(head) == len(baseline) == len(int8)
    assert baseline.split()[-4:] == ["2.00000", "+0.00000", "7.3891", "+0.000%"]
    assert int8.split()[-4:] == ["2.01000", "+0.01000", "7.4633", "+1.005%"]
    assert "rounded to int8 too" in note
    assert len(quantization_cost.format_quantization_costs(costs[:1])) == 2
