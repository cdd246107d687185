"""Writes the fixtures of this folder with torch (2.13.0): `python make_fixtures.py`.

`state_dict.npz` holds the expected values of `state_dict.bin` and of the two shards, with bfloat16
as uint16.
"""

import collections
import json
from pathlib import Path

import numpy as np
import torch

OUT = Path(__file__).parent
SHARDS = ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin")


def make_state_dict() -> dict:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    base = torch.arange(12, dtype=torch.float32) * 0.5
    state = collections.OrderedDict()
    state["f32.weight"] = randn(2, 3)
    state["bf16.weight"] = randn(3, 4).to(torch.bfloat16)
    state["f16.bias"] = randn(5).half()
    state["steps"] = torch.tensor([1, -2, 2**40])
    state["mask"] = torch.tensor([[True, False], [True, True]])
    state["transposed"] = randn(3, 2).t()
    state["shared.head"] = base[:6].view(2, 3)
    state["shared.tail"] = base[4:10]
    state["shared.strided"] = base[1::4]
    state["param"] = torch.nn.Parameter(randn(2, 2))
    state["scalar"] = torch.tensor(0.125)
    state["empty"] = torch.zeros(0, 4)
    # The attribute that a module's state_dict() has besides its tensors.
    state._metadata = torch.nn.Linear(1, 1).state_dict()._metadata
    return state


def as_numpy(tensor):
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(np.uint16)
    return tensor.numpy()


def main() -> None:
    state = make_state_dict()
    torch.save(state, OUT / "state_dict.bin")
    np.savez_compressed(OUT / "state_dict.npz", **{k: as_numpy(v) for k, v in state.items()})

    sharded = OUT / "sharded"
    sharded.mkdir(exist_ok=True)
    weight_map = {name: SHARDS[i >= 6] for i, name in enumerate(state)}
    for shard in SHARDS:
        torch.save({n: state[n] for n, s in weight_map.items() if s == shard}, sharded / shard)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (sharded / "pytorch_model.bin.index.json").write_text(json.dumps(index, indent=1) + "\n")

    torch.save({"state_dict": {"a": torch.zeros(2)}, "epoch": 3}, OUT / "nested.bin")
    torch.save({"a": torch.zeros(2), "lr": 0.1, "names": ["x"]}, OUT / "mixed.bin")
    torch.save({"a": torch.zeros(2, dtype=torch.float8_e4m3fn)}, OUT / "float8.bin")
    torch.save({"a": torch.zeros(2, dtype=torch.complex64).conj()}, OUT / "conj.bin")
    torch.save({"a": torch.ones(1).expand(4)}, OUT / "expanded.bin")
    torch.save(torch.ones(2), OUT / "bare_tensor.bin")
    torch.save({"a": torch.ones(2)}, OUT / "protocol4.bin", pickle_protocol=4)
    legacy = {"_use_new_zipfile_serialization": False}
    torch.save({"a": torch.ones(2)}, OUT / "legacy.bin", **legacy)
    torch.serialization.set_crc32_options(False)
    torch.save({"a": torch.arange(3.0)}, OUT / "no_crc.bin")


if __name__ == "__main__":
    main()
