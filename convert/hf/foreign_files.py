"""Recognizes files and directories that are no Hugging Face checkpoint, and says what to do."""

from __future__ import annotations

import fnmatch
import json
from pathlib import Path
from typing import NamedTuple

from btlm_jax.checkpoint.orbax_metadata import MARKER_FILE
from btlm_jax.convert.hf.advice import REDOWNLOAD, RESAVE
from btlm_jax.data.token_shards import is_token_directory
from btlm_jax.utils.format import join_first


class _Foreign(NamedTuple):
    """A format of another program.

    Attributes:
      patterns: names of which one must exist.
      what: the format.
      fix: what to do.
    """

    patterns: tuple[str, ...]
    what: str
    fix: str


_TO_HUGGING_FACE = "export it to Hugging Face files with the program that wrote it"
# The first that matches is reported: the specific ones come before the general ones.
_FORMATS = (
    _Foreign(
        ("zero_to_fp32.py", "*_optim_states.pt", "global_step*"),
        "a DeepSpeed ZeRO checkpoint",
        "run `python zero_to_fp32.py . OUTPUT` in it, and add config.json to OUTPUT",
    ),
    _Foreign(
        ("*.distcp",),
        "a distributed checkpoint of PyTorch (FSDP)",
        "run `python -m torch.distributed.checkpoint.format_utils dcp_to_torch DIR FILE`, save the "
        "model's state_dict as pytorch_model.bin, and add config.json",
    ),
    _Foreign(
        ("latest_checkpointed_iteration.txt", "mp_rank_*"),
        "a Megatron checkpoint",
        _TO_HUGGING_FACE,
    ),
    _Foreign(("*.gguf",), "a GGUF file (llama.cpp)", "use the Hugging Face files it was made from"),
    _Foreign(
        ("consolidated*.pth", "consolidated*.safetensors", "params.json"),
        "weights in Meta's or Mistral's format",
        "use the version of the model in transformers' format",
    ),
    _Foreign(("*.mdl",), "a checkpoint of Cerebras Model Zoo", _TO_HUGGING_FACE),
    _Foreign(
        ("flax_model.msgpack", "flax_model*.msgpack"),
        "weights of Flax",
        "load them in transformers 4 with from_flax=True, and call save_pretrained",
    ),
    _Foreign(
        ("tf_model.h5", "model.ckpt.index", "*.ckpt.index", "saved_model.pb"),
        "weights of TensorFlow",
        "load them in transformers 4 with from_tf=True, and call save_pretrained",
    ),
    _Foreign(("*.keras", "*.weights.h5"), "weights of Keras", _TO_HUGGING_FACE),
    _Foreign(("*.onnx",), "an ONNX model", "use the PyTorch weights it was exported from"),
    _Foreign(
        ("_CHECKPOINT_METADATA", "_METADATA", "commit_success.txt", ".orbax_metadata"),
        "an Orbax checkpoint",
        "if btlm made it, use it as it is (`btlm generate`, `btlm export`); one of another program "
        "must be exported to Hugging Face files there",
    ),
    _Foreign(
        ("recipe.json",),
        "a run of `btlm train`",
        "its checkpoints are Orbax already: use it as it is (`btlm generate`, `btlm export`)",
    ),
    _Foreign(
        ("manifest.ocdbt", "train_state", "optimizer_state"),
        "a checkpoint in TensorStore's format (Levanter, MaxText)",
        _TO_HUGGING_FACE,
    ),
    _Foreign(
        ("*.pth", "*.pt", "*.ckpt"),
        "a PyTorch checkpoint under a name that transformers does not know",
        "torch.save the model's state_dict alone as pytorch_model.bin, beside config.json",
    ),
    _Foreign(("*.npz", "*.npy"), "NumPy arrays", "save them as model.safetensors"),
    _Foreign(
        ("snapshots",),
        "a folder of the Hub's cache",
        "pass the directory under snapshots/ instead, or the Hub id",
    ),
)
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")


def describe_foreign_files(directory: Path) -> str | None:
    """Returns what a directory without (all) files of a model holds instead, and the fix.

    Returns:
      A predicate of the directory such as "holds … . Fix: …", or None if nothing is recognized.
    """
    names = sorted(p.name for p in directory.iterdir())
    if set(_ADAPTER) & set(names):
        return (
            f"holds a PEFT adapter{_adapter_base(directory)}, not a model. Fix: merge it first: "
            "PeftModel.from_pretrained(base, DIR).merge_and_unload().save_pretrained(MERGED)."
        )
    for form in _FORMATS:
        if found := [n for p in form.patterns for n in fnmatch.filter(names, p)]:
            return f"holds {form.what} ({join_first(found, 3)}). Fix: {form.fix}."
    if is_token_directory(directory):
        return "holds tokens of `btlm tokenize`. Fix: pass the directory of a model."
    if steps := [n for n in names if (directory / n / MARKER_FILE).exists()]:
        return (
            f"holds Orbax checkpoints ({join_first(steps, 3)}). Fix: those that btlm made are used "
            "as they are (`btlm generate`, `btlm export`); those of another program must be "
            "exported to Hugging Face files there."
        )
    inside = [n for n in names if (directory / n / "config.json").is_file()]
    if inside:
        return f"holds the directories {join_first(inside, 5)}. Fix: pass one of them."
    return None


def _adapter_base(directory: Path) -> str:
    """Returns " of BASE" if the adapter's configuration names its base model."""
    try:
        base = json.loads((directory / _ADAPTER[0]).read_bytes())["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return f" of {base}" if isinstance(base, str) else ""


def describe_content(directory: Path) -> str:
    """Returns the names of the files in a directory, for error messages."""
    names = sorted(p.name for p in directory.iterdir())
    return f"it holds {join_first(names)}" if names else "it is empty"


def describe_foreign_bytes(head: bytes) -> str | None:
    """Recognizes a file that is something else than its name says, by its first bytes.

    Returns:
      A predicate of the file with the fix, or None if nothing is recognized.
    """
    start = head.lstrip()[:100].lower()
    if head.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the file itself. Fix: run `git lfs pull`."
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        return (
            "is a web page, not the file itself. Fix: download it with `hf download`, or from the "
            "URL with /resolve/ instead of /blob/."
        )
    if head.startswith(b"GGUF"):
        return "is a GGUF file (llama.cpp). Fix: use the Hugging Face files it was made from."
    if head.startswith(b"\x89HDF"):
        return f"is an HDF5 file (Keras, TensorFlow). Fix: {_TO_HUGGING_FACE}."
    return None


def describe_foreign_weights(file: Path) -> str | None:
    """Like `describe_foreign_bytes`, for a file of weights, which is not empty and not JSON."""
    with file.open("rb") as opened:
        head = opened.read(512)
    if not head:
        return f"is empty (0 bytes): its download or writing was interrupted. {REDOWNLOAD}"
    if wrong := describe_foreign_bytes(head):
        return wrong
    if not any(head):
        return f"begins with zero bytes only: its download or writing was interrupted. {REDOWNLOAD}"
    is_bin = file.suffix == ".bin"
    if head.startswith(b"PK\x03\x04") and not is_bin:
        return "is a torch or other zip archive, not safetensors. Fix: name it pytorch_model.bin."
    if head[8:9] == b"{" and head[6:8] == b"\0\0" and is_bin:
        return "is a safetensors file, not a torch archive. Fix: name it model.safetensors."
    if head.startswith(b"{"):
        return f"is JSON text, not weights (an error message?). {REDOWNLOAD}"
    if head.startswith(b"\x80") and not is_bin:
        return f"is a pickle, not safetensors. {RESAVE}"
    return None
