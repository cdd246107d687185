"""Training runs: a recipe that takes seconds, and what a run directory holds."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from support import golden
from support.tokens import write_tokens

TINY_MODEL = """
[model]
preset = "tiny"
[model.fields]
vocab_size = 61
n_embd = 32
n_head = 2
n_inner = 42
n_layer = 2
"""


def predictable_tokens(n: int) -> np.ndarray:
    """Returns tokens below 61, each of which follows from the two before it. int64 [n]."""
    tokens = np.zeros(n, np.int64)
    tokens[:2] = 1, 2
    for i in range(2, n):
        tokens[i] = (3 * tokens[i - 1] + tokens[i - 2]) % 61
    return tokens


def write_recipe(folder: Path, text: str, tokens: np.ndarray, num_train: int) -> Path:
    """Writes a recipe and its data, with a tokenizer. Returns the recipe's file.

    Args:
      folder: the directory to write to.
      text: the recipe, with {train} and {held} in place of the directories of tokens.
      tokens: the data.
      num_train: number of tokens to train on; the rest are held out.
    """
    for name, part in (("train", tokens[:num_train]), ("held", tokens[num_train:])):
        write_tokens(folder / name, part, vocab_size=61, eos_id=0)
        golden.write_tokenizer(folder / name / "tokenizer", 61)
    file = folder / "recipe.toml"
    file.write_text(text.format(train=folder / "train", held=folder / "held"))
    return file


def losses(run: Path) -> dict[int, float]:
    """Returns the training losses of a run: step -> nats per token."""
    from btlm_jax.train.metrics import read_metrics

    return {int(x["step"]): x["loss"] for x in read_metrics(run / "metrics.jsonl") if "loss" in x}


def final_weights(run: Path) -> dict:
    """Returns the weights of a run's newest checkpoint, by path."""
    import btlm_jax as btlm
    from btlm_jax.model.params import flatten_tree

    return flatten_tree(btlm.load(run)[1])


def copy_run(run: Path, target: Path) -> Path:
    """Copies a run directory; returns the copy."""
    return Path(shutil.copytree(run, target))


def same_bits(a: dict, b: dict) -> bool:
    """Returns whether two dictionaries hold equal arrays."""
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def assert_same_run(run: Path, reference: Path) -> None:
    """Asserts that two runs have bitwise the same losses and final weights."""
    assert losses(run) == losses(reference)
    assert same_bits(final_weights(run), final_weights(reference))


def assert_close_losses(run: Path, reference: Path, tolerance: float) -> None:
    """Asserts that two runs have the same steps, and losses within a tolerance."""
    a, b = losses(run), losses(reference)
    assert list(a) == list(b)
    assert max(abs(a[s] - b[s]) for s in a) < tolerance
