"""A checkpoint of either format: which one a source is, and what both can be asked for."""

from __future__ import annotations

from jax.sharding import Mesh
from jax.typing import DTypeLike
from tokenizers import Tokenizer

from btlm_jax.checkpoint import checkpoint, metadata
from btlm_jax.config import BTLMConfig
from btlm_jax.convert.hf.source import open_hf
from btlm_jax.convert.hf.source_config import read_source_config
from btlm_jax.convert.to_mesh import load_hf
from btlm_jax.data.tokenizer import load_tokenizer, tokenizer_directory
from btlm_jax.model import weights
from btlm_jax.model.btlm import BTLM
from btlm_jax.utils import paths


def is_huggingface(source: metadata.PathLike) -> bool:
    """Whether a source is to be opened as Hugging Face files, not as an Orbax checkpoint.

    It is if it is a local directory with a config.json, or if there is nothing of this name: then
    it may be a Hub id, and `open_hf` knows what to say if it is none.

    Raises:
      ValueError: a URL that `paths.location` refuses.
    """
    place = paths.location(source)
    return not paths.is_remote(place) and (not place.exists() or (place / "config.json").is_file())


def read_any_config(source: metadata.PathLike) -> BTLMConfig:
    """The configuration of a checkpoint of either format, with its stored ALiBi slopes.

    Raises:
      FileNotFoundError, ConnectionError, ValueError: as `open_hf`, `read_source_config` and
        `read_metadata`.
    """
    return (
        read_source_config(open_hf(source))
        if is_huggingface(source)
        else metadata.read_metadata(source).config
    )


def read_any_tokenizer(source: metadata.PathLike) -> Tokenizer | None:
    """The tokenizer that a checkpoint of either format carries; None if it carries none.

    Raises:
      FileNotFoundError, ConnectionError, ValueError: as `open_hf` and `load_tokenizer`.
    """
    home = open_hf(source).directory if is_huggingface(source) else tokenizer_directory(source)
    try:
        return load_tokenizer(home)
    except FileNotFoundError:
        return None


def load_any_checkpoint(
    source: metadata.PathLike,
    *,
    mesh: Mesh | None = None,
    dtype: DTypeLike | None = None,
    by_layer: bool = False,
) -> tuple[BTLM, weights.Params]:
    """`checkpoint.load` or `load_hf`, whichever reads this source."""
    read = load_hf if is_huggingface(source) else checkpoint.load
    return read(source, mesh=mesh, dtype=dtype, by_layer=by_layer)
