"""Writes the fixtures of this folder with torch (2.13.0): `python make_fixtures.py`.

They are a BTLM of 2 layers in the form of the released checkpoint (bf16 .bin files, single and
sharded, with the tied head and the mask buffers of older files), and the same weights as .npz, with
bf16 as uint16.
"""

import json
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parent
D, H, L, F, V = 8, 2, 2, 12, 11
config = {
    "model_type": "btlm", "vocab_size": V, "n_positions": 32, "n_embd": D, "n_layer": L,
    "n_head": H, "n_inner": F, "activation_function": "swiglu", "position_embedding_type": "alibi",
    "mup_width_scale": 0.1, "mup_embeddings_scale": 14.6, "mup_output_alpha": 2.22,
    "mup_scale_qk_dot_by_d": True, "bos_token_id": 0, "eos_token_id": 0, "torch_dtype": "bfloat16",
}  # fmt: skip
torch.manual_seed(0)


def rand(*shape):
    return torch.randn(*shape).to(torch.bfloat16)


state = {"transformer.wte.weight": rand(V, D)}
for i in range(L):
    h = f"transformer.h.{i}."
    for name, shape in {
        "ln_1.weight": (D,), "ln_1.bias": (D,), "attn.c_attn.weight": (D, 3 * D),
        "attn.c_attn.bias": (3 * D,), "attn.c_proj.weight": (D, D), "attn.c_proj.bias": (D,),
        "ln_2.weight": (D,), "ln_2.bias": (D,), "mlp.c_fc.weight": (D, F), "mlp.c_fc.bias": (F,),
        "mlp.c_fc2.weight": (D, F), "mlp.c_fc2.bias": (F,), "mlp.c_proj.weight": (F, D),
        "mlp.c_proj.bias": (D,),
    }.items():  # fmt: skip
        state[h + name] = rand(*shape)
state |= {"transformer.ln_f.weight": rand(D), "transformer.ln_f.bias": rand(D)}
state["transformer.relative_pe.slopes"] = torch.tensor([[0.83984375], [0.0625]]).to(torch.bfloat16)
arrays = {k: v.view(torch.uint16).numpy() for k, v in state.items()}
np.savez(HERE / "weights.npz", **arrays)

tensors = dict(state)
tensors["lm_head.weight"] = tensors[
    "transformer.wte.weight"
]  # one storage, as in a saved tied model
tensors["transformer.h.0.attn.bias"] = torch.ones(1, 1, 4, 4, dtype=torch.uint8)
tensors["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e4)

for folder, shards in (
    ("single", [list(tensors)]),
    ("sharded", [list(tensors)[::2], list(tensors)[1::2]]),
):
    out = HERE / folder
    out.mkdir(exist_ok=True)
    (out / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    if len(shards) == 1:
        torch.save(tensors, out / "pytorch_model.bin")
        continue
    weight_map = {}
    for i, part in enumerate(shards):
        file = f"pytorch_model-{i + 1:05d}-of-{len(shards):05d}.bin"
        torch.save({n: tensors[n] for n in part}, out / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (out / "pytorch_model.bin.index.json").write_text(json.dumps(index, indent=1) + "\n")
