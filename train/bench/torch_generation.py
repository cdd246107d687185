"""Prefill and decoding in PyTorch, written for speed; the baseline of `generation_bench`.

`python -m btlm_jax.train.bench.torch_generation PROBLEM` draws random weights for a problem (JSON:
layers, heads, D, F, V, dtype, device; with SwiGLU and a tied head) and prints its versions. Then it
does the work in every line of its input (JSON: batch_size, length and, to decode, steps), and
prints the seconds. It never imports JAX.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from typing import Any


def main(problem: str) -> None:
    """Does the work in standard input until it ends."""
    torch: Any = importlib.import_module("torch")
    sizes = json.loads(problem)
    torch.manual_seed(0)
    with torch.inference_mode():
        forward = _make_forward(sizes)
        versions = {"torch": torch.__version__, "threads": torch.get_num_threads()}
        print(json.dumps(versions), flush=True)
        for line in sys.stdin:
            work = json.loads(line)
            run = _decode if "steps" in work else _prefill
            print(json.dumps({"seconds": run(forward, sizes, **work)}), flush=True)


def _prefill(forward: Any, sizes: dict[str, Any], batch_size: int, length: int) -> float:
    """Returns the seconds of reading prompts."""
    torch: Any = importlib.import_module("torch")
    cache = _cache(sizes, batch_size, length)
    tokens = torch.randint(0, sizes["V"], (batch_size, length), device=sizes["device"])
    start = _now(sizes)
    forward(tokens, cache, 0)
    return _now(sizes) - start


def _decode(forward: Any, sizes: dict[str, Any], batch_size: int, length: int, steps: int) -> float:
    """Returns the seconds of all steps after a context of `length` tokens."""
    torch: Any = importlib.import_module("torch")
    cache = _cache(sizes, batch_size, length + steps)
    token = torch.zeros((batch_size, 1), dtype=torch.long, device=sizes["device"])
    start = _now(sizes)
    for i in range(steps):
        token = forward(token, cache, length + i).argmax(-1, keepdim=True)
    return _now(sizes) - start


def _now(sizes: dict[str, Any]) -> float:
    """Returns the time, after waiting for the device."""
    if sizes["device"] == "cuda":
        torch: Any = importlib.import_module("torch")
        torch.cuda.synchronize()
    return time.perf_counter()


def _cache(sizes: dict[str, Any], batch_size: int, length: int) -> list[Any]:
    """Returns zeros for the keys and values of every layer, [2, B, H, S, K]."""
    torch: Any = importlib.import_module("torch")
    shape = 2, batch_size, sizes["heads"], length, sizes["D"] // sizes["heads"]
    options = dict(dtype=getattr(torch, sizes["dtype"]), device=sizes["device"])
    return [torch.zeros(shape, **options) for _ in range(sizes["layers"])]


def _make_forward(sizes: dict[str, Any]) -> Any:
    """Returns (tokens [B, T], cache, cached tokens) -> fp32 logits [B, V] of the last token."""
    torch: Any = importlib.import_module("torch")
    F, options = torch.nn.functional, dict(device=sizes["device"])
    D, H = sizes["D"], sizes["heads"]
    dtype = getattr(torch, sizes["dtype"])

    def weight(*shape):
        return (0.02 * torch.randn(shape, **options)).to(dtype)

    wte, one, zero = weight(sizes["V"], D), weight(D) + 1, weight(D)
    inner = sizes["F"]
    layers = [
        (weight(3 * D, D), weight(D, D), weight(inner, D), weight(inner, D), weight(D, inner))
        for _ in range(sizes["layers"])
    ]
    biases = weight(3 * D), weight(D), weight(inner), weight(inner), weight(D)
    slopes = 2.0 ** (-8.0 * torch.arange(1, H + 1, **options) / H)

    def forward(tokens, cache, filled):
        B, T = tokens.shape
        h = F.embedding(tokens, wte)
        end = filled + T
        distance = torch.arange(filled, end, **options)[:, None] - torch.arange(end, **options)
        bias = -slopes[:, None, None] * distance
        bias = bias.masked_fill(distance < 0, float("-inf"))[None].to(dtype)
        for (qkv, out, fc, fc2, proj), kv in zip(layers, cache, strict=True):
            x = F.linear(F.layer_norm(h, (D,), one, zero), qkv, biases[0])
            q, k, v = x.view(B, T, 3, H, D // H).permute(2, 0, 3, 1, 4).unbind(0)
            kv[0, :, :, filled:end], kv[1, :, :, filled:end] = k, v
            x = F.scaled_dot_product_attention(
                q, kv[0, :, :, :end], kv[1, :, :, :end], attn_mask=bias, scale=H / D
            )
            h = h + F.linear(x.transpose(1, 2).reshape(B, T, D), out, biases[1])
            x = F.layer_norm(h, (D,), one, zero)
            x = F.linear(x, fc, biases[2]) * F.silu(F.linear(x, fc2, biases[3]))
            h = h + F.linear(x, proj, biases[4])
        return F.linear(F.layer_norm(h[:, -1], (D,), one, zero), wte).float()

    return forward


if __name__ == "__main__":
    main(sys.argv[1])
