"""Names of the tensors of Hugging Face checkpoints: special ones, and what wrappers make of them.

A state_dict of a wrapped model (compiled, distributed, an adapter) has other names than that of the
model. `model_names` finds the names that the model would have given.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from btlm_jax.utils.format import join_first

EMBEDDING = "transformer.wte.weight"
LM_HEAD = "lm_head.weight"
SLOPES = "transformer.relative_pe.slopes"
# Causal masks, which old checkpoints of the family store and the model rebuilds from the shape.
MASK_BUFFER = re.compile(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)")

# Segments that wrappers insert anywhere: torch.compile, FSDP, activation checkpointing, DeepSpeed.
_INSERTED = re.compile(
    r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_fpw_module|_checkpoint_wrapped_module"
    r"|_forward_module|_module)\."
)
_ROOT = "transformer."
# First segments of names below and beside the root; a base model has them without the root.
_BODY = r"(?:wte|wpe|relative_pe|ln_f)\.|h\.\d+\."
_START = re.compile(rf"(?:^|(?<=\.))(?:transformer\.(?=(?:{_BODY}))|lm_head\.|{_BODY})")
# Parts of names that unmerged adapters and quantized weights add.
_ADAPTERS = re.compile(r"\.(lora_[AB]|lora_embedding_[AB]|base_layer|modules_to_save|ia3_l)\b")
_QUANTIZED = re.compile(
    r"\.(qweight|qzeros|g_idx|SCB|absmax|quant_map|nested_absmax|weight_scale(_inv)?|weight_packed"
    r"|scales|quant_state\..*)$"
)


class ModelNames(NamedTuple):
    """Names of the model for the names in a file.

    Attributes:
      names: name in the file -> name in the model.
      notice: what was changed, in words; empty if nothing was.
    """

    names: Mapping[str, str]
    notice: str


def model_names(stored: Iterable[str]) -> ModelNames:
    """Finds the names that the model itself gives to the tensors of a file.

    Raises:
      ValueError: names carry different prefixes, two names become one, or the tensors are of an
        unmerged adapter or quantized.
    """
    stored = list(stored)
    if adapters := [n for n in stored if _ADAPTERS.search(n)]:
        raise ValueError(
            f"holds an unmerged adapter ({join_first(map(repr, adapters), 1)}): merge it "
            "first, with model.merge_and_unload() of PEFT, and save the result"
        )
    if quantized := [n for n in stored if _QUANTIZED.search(n)]:
        raise ValueError(
            f"holds quantized weights ({join_first(map(repr, quantized), 1)}), which "
            "cannot be converted: use the original model, or dequantize it and save it in floats"
        )
    inner = {name: _INSERTED.sub("", name) for name in stored}
    prefixes: dict[str, str] = {}  # of every name that has the form of one of the model's
    for name, short in inner.items():
        if start := _START.search(short):
            prefixes[name] = short[: start.start()]
    counts = Counter(prefixes.values())
    if len(counts) > 1:
        found = join_first(
            [f"{p!r} on {n}" if p else f"none on {n}" for p, n in counts.most_common()]
        )
        raise ValueError(
            f"names of tensors carry different prefixes: {found} tensors. The file holds several "
            "models, or parts of a wrapped one: save the state_dict of the model alone"
        )
    prefix = next(iter(counts), "")
    names = {name: inner[name].removeprefix(prefix) for name in stored}
    inserted = [name for name in stored if inner[name] != name]
    changes = []
    if inserted:
        parts = dict.fromkeys(m for name in inserted for m in _INSERTED.findall(name))
        changes.append(f"without {join_first([repr(p) for p in parts])}")
    if prefix:
        changes.append(f"without the prefix {prefix!r}")
    body = [n for n in prefixes if not names[n].startswith("lm_head.")]
    if body and not any(names[n].startswith(_ROOT) for n in body):
        names |= {n: _ROOT + names[n] for n in body}
        changes.append(f"with the prefix {_ROOT!r}, which a base model lacks")
    twice = [n for n, count in Counter(names.values()).items() if count > 1]
    if twice:
        raise ValueError(
            f"two tensors of the file have the name {twice[0]!r} without their wrapper: save the "
            "state_dict of the model alone"
        )
    return ModelNames(names, f"read {' and '.join(changes)}" if changes else "")
