"""The train step in PyTorch, written for speed; the baseline of `step_bench`.

`python -m btlm_jax.train.bench.torch_step FILE` reads a problem (`write_problem`) and prints its
versions. Then it takes a step for every line of its input, and prints loss and seconds as JSON. It
never imports JAX.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]


def write_problem(path: Path, problem: dict[str, Any], arrays: Arrays) -> None:
    """Writes the problem for the baseline's process.

    Args:
      path: the file.
      problem: dtype, device, mode ("eager" or "compile"), attention ("bias", or "flex": ALiBi
        inside a fused kernel that torch.compile generates), lr, weight_decay, b1, b2, eps,
        clip_norm, width_scale, embeddings_scale, logits_scale, attention_scale, epsilon, layers,
        heads.
      arrays: the weights by Hugging Face name, `slopes` [H], `tokens` int [B, T + 1].
    """
    encoded = np.frombuffer(json.dumps(problem).encode(), np.uint8)
    contents: Any = {"problem": encoded, **arrays}
    np.savez(path, **contents)


def main(path: str) -> None:
    """Takes steps of the problem in `path` until standard input ends."""
    torch: Any = importlib.import_module("torch")
    with np.load(path) as file:
        problem = json.loads(file["problem"].tobytes())
        device = problem["device"]
        arrays = {k: torch.from_numpy(file[k]).to(device) for k in file.files if k != "problem"}
    slopes, tokens = arrays.pop("slopes"), arrays.pop("tokens").long()
    params = _parameters(arrays)
    loss_fn = _make_loss(problem, slopes, tokens.shape[1] - 1)
    if problem["mode"] == "compile":
        loss_fn = torch.compile(loss_fn)
    optimizer = torch.optim.AdamW(
        _param_groups(problem, params),
        betas=(problem["b1"], problem["b2"]),
        eps=problem["eps"],
        fused=True,
    )
    weights = list(params.values())
    cast = torch.autocast(device, torch.bfloat16, enabled=problem["dtype"] == "bfloat16")
    print(json.dumps({"torch": torch.__version__, "threads": torch.get_num_threads()}), flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        with cast:
            loss = loss_fn(params, tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, problem["clip_norm"], foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        value = loss.item()  # waits for a GPU
        if device == "cuda":
            torch.cuda.synchronize()
        print(json.dumps({"loss": value, "seconds": time.perf_counter() - start}), flush=True)


def _parameters(arrays: dict[str, Any]) -> dict[str, Any]:
    """Returns the trainable tensors, with kernels as (out, in), the faster layout of nn.Linear."""
    params = {}
    for name, x in arrays.items():
        is_kernel = x.ndim == 2 and not name.startswith("transformer.wte")
        params[name] = (x.t().contiguous() if is_kernel else x).requires_grad_()
    return params


def _param_groups(problem: dict[str, Any], params: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the original's muP groups: kernels at a scaled rate, vectors without weight decay."""
    lr, decay = problem["lr"], problem["weight_decay"]
    wte = "transformer.wte.weight"
    hidden = [p for n, p in params.items() if p.ndim == 2 and n != wte]
    vectors = [p for p in params.values() if p.ndim == 1]
    return [
        dict(params=[params[wte]], lr=lr, weight_decay=decay),
        dict(params=hidden, lr=lr * problem["width_scale"], weight_decay=decay),
        dict(params=vectors, lr=lr, weight_decay=0.0),
    ]


def _make_attention(problem: dict[str, Any], slopes: Any, length: int) -> Any:
    """Returns causal ALiBi attention: (q, k, v) [B, H, T, K] -> [B, H, T, K]."""
    torch: Any = importlib.import_module("torch")
    scale = problem["attention_scale"]
    if problem["attention"] == "flex":
        flex: Any = importlib.import_module("torch.nn.attention.flex_attention")

        def causal(batch, head, query, key):
            return query >= key

        def with_bias(score, batch, head, query, key):
            return score - slopes[head] * (query - key)

        device = slopes.device.type
        mask = flex.create_block_mask(causal, None, None, length, length, device=device)
        return lambda q, k, v: flex.flex_attention(
            q, k, v, score_mod=with_bias, block_mask=mask, scale=scale
        )
    position = torch.arange(length, device=slopes.device)
    distance = (position[:, None] - position[None]).float()
    bias = (-slopes[:, None, None] * distance).masked_fill(distance < 0, float("-inf"))[None]
    bias = bias.to(getattr(torch, problem["dtype"]))
    attend = torch.nn.functional.scaled_dot_product_attention
    return lambda q, k, v: attend(q, k, v, attn_mask=bias, scale=scale)


def _make_loss(problem: dict[str, Any], slopes: Any, length: int) -> Any:
    """Returns (params, tokens [B, T + 1]) -> mean cross-entropy, computed in fp32."""
    torch: Any = importlib.import_module("torch")
    F = torch.nn.functional
    H, eps = problem["heads"], problem["epsilon"]
    attend = _make_attention(problem, slopes, length)

    def norm(params, name, h):
        return F.layer_norm(h, h.shape[-1:], params[f"{name}.weight"], params[f"{name}.bias"], eps)

    def linear(params, name, x):
        return F.linear(x, params[f"{name}.weight"], params[f"{name}.bias"])

    def loss(params, tokens):
        wte = params["transformer.wte.weight"]
        h = F.embedding(tokens[:, :-1], wte) * problem["embeddings_scale"]
        B, T, D = h.shape
        for layer in range(problem["layers"]):
            block = f"transformer.h.{layer}"
            x = linear(params, f"{block}.attn.c_attn", norm(params, f"{block}.ln_1", h))
            q, k, v = x.view(B, T, 3, H, D // H).permute(2, 0, 3, 1, 4).unbind(0)
            x = attend(q, k, v)
            h = h + linear(params, f"{block}.attn.c_proj", x.transpose(1, 2).reshape(B, T, D))
            x = norm(params, f"{block}.ln_2", h)
            gate = F.silu(linear(params, f"{block}.mlp.c_fc2", x))
            h = h + linear(
                params, f"{block}.mlp.c_proj", linear(params, f"{block}.mlp.c_fc", x) * gate
            )
        logits = F.linear(norm(params, "transformer.ln_f", h), wte) * problem["logits_scale"]
        return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())

    return loss


if __name__ == "__main__":
    main(sys.argv[1])
