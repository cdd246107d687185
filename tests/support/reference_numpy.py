"""The BTLM forward pass in float64 NumPy, written from the specification alone.

It shares no code with the library, is slow and returns all activations. It computes one sequence at
a time; only `forward` and `decode` loop over the batch. test_reference_numpy.py checks it against
the original PyTorch code. T new tokens, S keys (cache + new), D width, H heads, K = D / H,
V vocabulary.
"""

import math

import numpy as np

MASKED = -1e30  # finite, so that a padding query that sees no key is not NaN
DEFAULTS = {  # of the original's config class, for absent keys (not the values of the 3B model)
    "activation_function": "gelu_new", "position_embedding_type": "learned", "n_inner": None,
    "layer_norm_epsilon": 1e-5, "alibi_scaling": None, "tie_word_embeddings": True,
    "mup_width_scale": 1.0, "mup_embeddings_scale": 1.0, "mup_output_alpha": 1.0,
    "mup_scale_qk_dot_by_d": False, "scale_attn_weights": True,
    "completep_base_layers": None, "completep_alpha": 1.0,  # not the original's: arXiv 2505.01618
}  # fmt: skip


def alibi_slopes(n_head):
    p = 2 ** (n_head.bit_length() - 1)  # the largest power of two <= H
    p_slopes, slopes_2p = (2.0 ** (-8.0 * np.arange(1, n + 1) / n) for n in (p, 2 * p))
    # Unless H is a power of two, every other slope of 2p heads follows: appended, not interleaved.
    return np.concatenate([p_slopes, slopes_2p[0::2][: n_head - p]])


def alibi_scale(scaling, k_len):
    """Returns the divisor of the slopes; k_len counts every key, cached and padding ones too."""
    if scaling is None:
        return 1.0
    factor, trained = scaling.get("factor"), scaling.get("train_seq_len")
    if len(scaling) == 2 and scaling.get("type") == "linear":
        if type(factor) is float and factor > 1.0:
            return factor  # at every length, short ones too
        if type(trained) is int and trained > 1:
            return max(1.0, k_len / trained)
    raise ValueError(f"alibi_scaling: {scaling}")


def alibi_bias(slopes, q_len, k_len, scale):
    """Returns [H, q_len, k_len]; the queries are the last q_len of the k_len slots."""
    q, k = np.arange(k_len - q_len, k_len)[:, None], np.arange(k_len)[None, :]
    slopes = np.asarray(slopes, np.float64).reshape(-1, 1, 1)  # stored as [H, 1]
    return -(slopes / scale) * np.abs(k - q)  # slot distance: left padding does not change it


def layer_norm(w, name, x, eps):
    centered = x - x.mean(-1, keepdims=True)
    variance = (centered**2).mean(-1, keepdims=True)  # biased
    return centered / np.sqrt(variance + eps) * w[name + ".weight"] + w[name + ".bias"]


def softmax(s):
    e = np.exp(s - s.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def silu(x):
    return x * 0.5 * (1.0 + np.tanh(0.5 * x))  # x * sigmoid(x), without overflow


def gelu(x):  # the exact erf form
    return 0.5 * x * (1.0 + np.vectorize(math.erf, otypes=[float])(x / math.sqrt(2.0)))


def gelu_new(x):  # the tanh form
    return 0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def linear(w, name, x):
    return x @ w[name + ".weight"] + w[name + ".bias"]  # Conv1D stores [in, out]: no transpose


def mlp(w, name, cfg, x):
    up, kind = linear(w, name + ".c_fc", x), cfg["activation_function"]
    if up.shape[-1] != (cfg["n_inner"] or 4 * cfg["n_embd"]):
        raise ValueError(f"n_inner {cfg['n_inner']}, but c_fc is {up.shape[-1]} wide")
    if kind == "swiglu":
        up = up * silu(linear(w, name + ".c_fc2", x))  # the gate is c_fc2, not c_fc
    else:
        up = {"gelu": gelu, "gelu_new": gelu_new}[kind](up)
    return linear(w, name + ".c_proj", up)


def visible(t_len, s_len, key_mask, segments):
    """Returns bool [T, S]: causal, key not padding, query and key in the same document."""
    q, k = np.arange(s_len - t_len, s_len)[:, None], np.arange(s_len)[None, :]
    allowed = k <= q
    if key_mask is not None:
        allowed = allowed & (np.asarray(key_mask)[k] != 0)
    if segments is not None:
        allowed = allowed & (np.asarray(segments)[q] == np.asarray(segments)[k])
    return allowed


def attention(w, name, cfg, x, past, allowed, bias):
    q, k, v = np.split(linear(w, name + ".c_attn", x), 3, axis=-1)  # columns [Q | K | V] ...
    q, k, v = (a.reshape(len(x), cfg["n_head"], -1).swapaxes(0, 1) for a in (q, k, v))  # ... (H, K)
    if past is not None:
        k, v = np.concatenate([past[0], k], 1), np.concatenate([past[1], v], 1)
    scores = q @ k.swapaxes(1, 2)
    if cfg["scale_attn_weights"]:  # muP divides by the head size itself, not by its root
        scores = scores / q.shape[-1] ** (1.0 if cfg["mup_scale_qk_dot_by_d"] else 0.5)
    probs = softmax(np.where(allowed, scores, MASKED) + bias)
    merged = (probs @ v).swapaxes(0, 1).reshape(x.shape)
    return linear(w, name + ".c_proj", merged), probs, k, v


def embed(w, cfg, ids, types, positions):
    h = w["transformer.wte.weight"][ids]
    if cfg["position_embedding_type"] == "learned":
        h = h + w["transformer.wpe.weight"][positions]
    elif cfg["position_embedding_type"] != "alibi":
        raise ValueError(f"position_embedding_type {cfg['position_embedding_type']!r}")
    h = h * cfg["mup_embeddings_scale"]  # scales the positions too, but not the token types
    return h if types is None else h + w["transformer.wte.weight"][types]


def sequence(w, cfg, ids, mask=None, types=None, positions=None, segments=None, past=None):
    """Computes one sequence [T] after `past`, an earlier result; masks cover all S keys."""
    offset = past["keys"][0].shape[1] if past else 0
    s_len, eps = offset + len(ids), cfg["layer_norm_epsilon"]
    # Padding does not move the default positions: learned ones need position_ids for that.
    positions = np.arange(offset, s_len) if positions is None else positions
    allowed, bias = visible(len(ids), s_len, mask, segments), 0.0
    if cfg["position_embedding_type"] == "alibi":
        # Stored slopes may be rounded to bf16; the original uses them as they are in every dtype.
        slopes = w.get("transformer.relative_pe.slopes", alibi_slopes(cfg["n_head"]))
        bias = alibi_bias(slopes, len(ids), s_len, alibi_scale(cfg["alibi_scaling"], s_len))
    depth = cfg["n_layer"] / (cfg["completep_base_layers"] or cfg["n_layer"])
    branch = depth ** -cfg["completep_alpha"]  # 1 at the base depth, and without CompleteP
    h = embed(w, cfg, ids, types, positions)
    out = {"hidden_states": [h], "attentions": [], "keys": [], "values": [], "streams": []}
    for i in range(cfg["n_layer"]):
        name = f"transformer.h.{i}"
        layer_past = (past["keys"][i], past["values"][i]) if past else None
        x = layer_norm(w, name + ".ln_1", h, eps)
        a, probs, k, v = attention(w, name + ".attn", cfg, x, layer_past, allowed, bias)
        h = h + branch * a
        h = h + branch * mlp(w, name + ".mlp", cfg, layer_norm(w, name + ".ln_2", h, eps))
        for key, value in zip(out, (h, probs, k, v, h), strict=True):
            out[key].append(value)
    # As in Hugging Face, the last hidden state is after ln_f; "streams" has it before.
    h = out["hidden_states"][-1] = layer_norm(w, "transformer.ln_f", h, eps)
    # Tied: the head is wte, and a stored lm_head only its copy. Either is [V, D], without a bias.
    head = w["transformer.wte.weight" if cfg["tie_word_embeddings"] else "lm_head.weight"]
    return {"logits": h @ head.T * (cfg["mup_output_alpha"] * cfg["mup_width_scale"]), **out}


def prepare(weights, config):
    if config.get("scale_attn_by_inverse_layer_idx") or config["n_embd"] % config["n_head"]:
        raise ValueError("scale_attn_by_inverse_layer_idx, or n_embd not a multiple of n_head")
    return {k: np.asarray(a, np.float64) for k, a in weights.items()}, {**DEFAULTS, **config}


def stack(outs):
    """Stacks results of sequences into a batch; all but the logits are lists over the layers."""
    lists = {k: zip(*(o[k] for o in outs), strict=True) for k in outs[0] if k != "logits"}
    logits = np.stack([o["logits"] for o in outs])
    return {"logits": logits, **{k: [np.stack(a) for a in v] for k, v in lists.items()}}


def forward(
    weights, config, input_ids,
    *, attention_mask=None, token_type_ids=None, position_ids=None, segment_ids=None,
):  # fmt: skip
    """Computes a batch; all arguments [B, T]. Padding queries are finite but have no meaning."""
    w, cfg = prepare(weights, config)
    extras = (attention_mask, token_type_ids, position_ids, segment_ids)
    rows = ([None if a is None else a[b] for a in extras] for b in range(len(input_ids)))
    return stack([sequence(w, cfg, ids, *row) for ids, row in zip(input_ids, rows, strict=True)])


def decode(weights, config, input_ids, prefix_len, *, attention_mask=None, position_ids=None):
    """Computes the prefix at once, then token by token; returns the final keys and values too.

    It uses a real cache: with dynamic ALiBi scaling every step divides by its own length, while
    earlier tokens keep their keys and values, so the result is not a row of the full forward.
    """
    (w, cfg), outs = prepare(weights, config), []
    for b, ids in enumerate(input_ids):
        steps, start = [], 0
        for end in range(prefix_len, len(ids) + 1):
            mask = None if attention_mask is None else attention_mask[b][:end]
            positions = None if position_ids is None else position_ids[b][start:end]
            past = steps[-1] if steps else None
            steps.append(sequence(w, cfg, ids[start:end], mask, positions=positions, past=past))
            start = end
        logits = np.concatenate([s["logits"] for s in steps])
        outs.append({"logits": logits, **{k: steps[-1][k] for k in ("keys", "values")}})
    return stack(outs)


def incremental(weights, config, input_ids, prefix_len, **masks_and_positions):
    return decode(weights, config, input_ids, prefix_len, **masks_and_positions)["logits"]


def cross_entropy(logits, labels):
    """Returns the mean over labels that are not -100; position t predicts label t + 1."""
    logits, labels = np.asarray(logits, np.float64)[:, :-1], np.asarray(labels)[:, 1:]
    b, t = np.nonzero(labels != -100)
    return -np.log(softmax(logits)[b, t, labels[b, t]]).mean()
