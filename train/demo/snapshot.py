"""A checkpoint for the notebooks: the released model if it fits, otherwise a small one.

The small one is trained on the spot.
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
from btlm_jax.model import sharding, weights
from btlm_jax.train.loop import train
from btlm_jax.train.recipe_file import load_recipe
from btlm_jax.utils.format import format_bytes

HUB, PRESET = "cerebras/btlm-3b-8k-base", "btlm-3b-8k"
SMALL_VARIABLE = "BTLM_SMALL"  # environment variable; any value asks for the small model
MEMINFO = Path("/proc/meminfo")  # Linux; in kB of 1024 bytes (proc_meminfo(5))

_STEPS = 200
_SMALL_FIELDS = dict(
    vocab_size=1024, n_embd=128, n_head=4, n_layer=3, n_inner=341, mup_width_scale=0.5
)  # fmt: skip


def choose_checkpoint(directory: Path, *, bytes_per_parameter: float, sharded: bool = False) -> str:
    """Returns the released model, or a small one trained in `directory`; prints which, and why.

    Args:
      directory: where the small one is trained (`train_small_checkpoint`).
      bytes_per_parameter: memory needed for the intended use: 3 to read and write text with bf16
        weights, 18 to train.
      sharded: whether the model is sharded over all accelerators, whose memory then adds up.

    Returns:
      A Hub id, whose files have been downloaded, or a Hugging Face directory.

    Raises:
      OSError: the files cannot be written.
    """
    reason = _reason_against_released(bytes_per_parameter, sharded)
    if reason is None:
        print(f"{HUB}: fetched")
        return HUB
    print(f"{HUB} is not used: {reason}.\nA small model instead, in {directory}")
    return str(train_small_checkpoint(directory))


def train_small_checkpoint(directory: Path, *, steps: int = _STEPS) -> Path:
    """Trains a model of 0.7 million parameters on Python's language reference.

    Besides the Hugging Face files, `directory` holds `text.txt`, `tokens` and the run. Finished
    work is kept, and an interrupted call is resumed.

    Args:
      directory: created if missing.
      steps: training steps, of 1024 tokens each (more on more than 8 devices).

    Returns:
      `directory/hf`, the directory of the Hugging Face files.
    """
    files, tokens, text = directory / "hf", directory / "tokens", directory / "text.txt"
    if files.exists():  # written atomically, so it is complete
        return files
    directory.mkdir(parents=True, exist_ok=True)
    text.write_text(sample_text.read_sample_text(), encoding="utf-8")
    vocab_size = _SMALL_FIELDS["vocab_size"]
    prepare_tokens(text, tokens, new_tokenizer=vocab_size, held_out=0.1, overwrite=True)
    settings = [
        *(f"model.fields.{name}={value}" for name, value in _SMALL_FIELDS.items()),
        f"data.train={json.dumps(str(tokens / TRAIN))}",
        f"data.held_out={json.dumps(str(tokens / HELD_OUT))}",
        f"phases.0.steps={steps}",
        f"phases.0.batch_size={sharding.round_up(8, jax.device_count())}",
        f"optimizer.warmup_tokens={min(30, steps - 1) * 1024}",
        "optimizer.weight_decay=0.1",
        "run.eval_every=100",
        "run.checkpoint_every=0",
    ]
    train(load_recipe("tiny", settings), directory / "run")
    export(directory / "run", files)
    return files


def available_memory(*, sharded: bool) -> int:
    """Returns the bytes that arrays may take, on one accelerator or (`sharded`) on all.

    On a GPU this is what JAX reserves, by default three quarters. Without accelerators it is the
    memory that the machine has available (Linux), or all of it where that is unknown.
    """
    if jax.default_backend() == "cpu":
        meminfo = MEMINFO.read_text() if MEMINFO.exists() else ""
        available = re.search(r"^MemAvailable: +(\d+) kB$", meminfo, re.MULTILINE)
        if available:
            return int(available[1]) * 1024
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [(d.memory_stats() or {}).get("bytes_limit", 0) for d in jax.local_devices()]
    return sum(limits) if sharded else limits[0]


def _reason_against_released(bytes_per_parameter: float, sharded: bool) -> str | None:
    """Returns why the released model cannot be used, in words; None if it can."""
    if os.environ.get(SMALL_VARIABLE):
        return f"{SMALL_VARIABLE} is set"
    parameters = weights.count_parameters(BTLMConfig.preset(PRESET))
    needed, available = round(parameters * bytes_per_parameter), available_memory(sharded=sharded)
    if available < needed:
        return (
            f"this takes {format_bytes(needed)} of memory, and there is {format_bytes(available)}"
        )
    try:
        open_hf(HUB)
    except ConnectionError as error:
        return str(error).rstrip(".")
    return None
