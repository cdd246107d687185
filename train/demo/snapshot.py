"""A checkpoint to try things on, as the notebooks do: the released model where it can be had and
held, otherwise a small one that is trained on the spot.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import jax

from btlm_jax.config import BTLMConfig
from btlm_jax.convert import export
from btlm_jax.convert.hf.source import open_hf
from btlm_jax.data import sample_text
from btlm_jax.data.prepare import HELD_OUT, TRAIN, prepare_tokens
from btlm_jax.model import weights
from btlm_jax.train.loop import train
from btlm_jax.train.recipe_file import load_recipe
from btlm_jax.utils.format import format_bytes

HUB, PRESET = "cerebras/btlm-3b-8k-base", "btlm-3b-8k"
# Set to anything, it asks for the small model.
SMALL = "BTLM_SMALL"
# Of Linux: kB, each 1024 bytes (proc_meminfo(5)).
MEMINFO = Path("/proc/meminfo")

_STEPS = 200
_SHAPE = dict(
    vocab_size=1024, n_embd=128, n_head=4, n_layer=3, n_inner=341, mup_width_scale=0.5
)  # fmt: skip


def choose(directory: Path, *, bytes_per_parameter: float, sharded: bool = False) -> str:
    """The released model, or a small one made in `directory`; prints which, and why.

    Args:
      directory: of the small one (`make`), which is also there to be trained on.
      bytes_per_parameter: of the memory that is meant to be used: 3 for reading and writing text
        with bf16 weights, 18 for training.
      sharded: the model will lie on all accelerators, whose memory counts together.

    Returns:
      A Hub id, whose files have been fetched, or a Hugging Face directory.

    Raises:
      OSError: the files cannot be written.
    """
    why = _refused(bytes_per_parameter, sharded)
    if why is None:
        print(f"{HUB}: fetched")
        return HUB
    print(f"{HUB} is not used: {why}.\nA small model instead, in {directory}")
    return str(make(directory))


def make(directory: Path, *, steps: int = _STEPS) -> Path:
    """Trains a model of 0.7 million parameters on Python's language reference.

    Beside the files for Hugging Face, `directory` has `text.txt`, `tokens` and the run. What is
    there already is kept, and a call that was stopped is gone on with.

    Args:
      steps: of training, of 1024 tokens each (of more on more than 8 devices).

    Returns:
      The directory with the files, `directory/hf`.
    """
    files, tokens, text = directory / "hf", directory / "tokens", directory / "text.txt"
    if files.exists():  # it appears when it is complete
        return files
    directory.mkdir(parents=True, exist_ok=True)
    text.write_text(sample_text.read_sample_text(), encoding="utf-8")
    prepare_tokens(text, tokens, new_tokenizer=_SHAPE["vocab_size"], held_out=0.1, overwrite=True)
    devices = jax.device_count()
    settings = [
        *(f"model.fields.{name}={value}" for name, value in _SHAPE.items()),
        f"data.train={json.dumps(str(tokens / TRAIN))}",
        f"data.held_out={json.dumps(str(tokens / HELD_OUT))}",
        f"phases.0.steps={steps}",
        f"phases.0.batch_size={-(-8 // devices) * devices}",
        f"optimizer.warmup_tokens={min(30, steps - 1) * 1024}",
        "optimizer.weight_decay=0.1",
        "run.eval_every=100",
        "run.checkpoint_every=0",
    ]
    train(load_recipe("tiny", settings), directory / "run")
    export(directory / "run", files)
    return files


def memory(*, sharded: bool) -> int:
    """Bytes that arrays may take.

    Of one accelerator, or of all: of a GPU what JAX reserves, by default three quarters. Without
    any, what the machine has available; where that is not told (Linux does), all it has.
    """
    if jax.default_backend() == "cpu":
        told = MEMINFO.read_text() if MEMINFO.exists() else ""
        available = re.search(r"^MemAvailable: +(\d+) kB$", told, re.MULTILINE)
        if available:
            return int(available[1]) * 1024
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [(d.memory_stats() or {}).get("bytes_limit", 0) for d in jax.local_devices()]
    return sum(limits) if sharded else limits[0]


def _refused(bytes_per_parameter: float, sharded: bool) -> str | None:
    """Why the released model cannot be used, in words; None if it can."""
    if os.environ.get(SMALL):
        return f"{SMALL} is set"
    need = round(weights.count_parameters(BTLMConfig.preset(PRESET)) * bytes_per_parameter)
    if (found := memory(sharded=sharded)) < need:
        return f"this takes {format_bytes(need)} of memory, and there is {format_bytes(found)}"
    try:
        open_hf(HUB)
    except ConnectionError as error:
        return str(error).rstrip(".")
    return None
