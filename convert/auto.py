"""Loading from a checkpoint of either format, Hugging Face or Orbax, whichever a source is."""

from __future__ import annotations

from jax.sharding import Mesh
from jax.typing import DTypeLike
from tokenizers import Tokenizer

from btlm_jax.checkpoint import checkpoint, metadata
from btlm_jax.checkpoint.assets import warn_of_changed_assets
from btlm_jax.checkpoint.orbax_metadata import MARKER_FILE
from btlm_jax.config import BTLMConfig
from btlm_jax.convert.hf.source import open_hf
from btlm_jax.convert.hf.source_config import open_model
from btlm_jax.convert.hf.weight_files import WEIGHT_FORMS
from btlm_jax.convert.to_mesh import load_hf
from btlm_jax.data.tokenizer import load_tokenizer
from btlm_jax.model.btlm import BTLM
from btlm_jax.model.params import Params
from btlm_jax.utils import paths


def is_huggingface(source: metadata.PathLike) -> bool:
    """Returns whether to open a source as Hugging Face files rather than as an Orbax checkpoint.

    True for a local directory with a config.json (beside an Orbax checkpoint only if it has
    weights too, which `open_hf` refuses), for an adapter, and for a name that does not exist
    locally: it may be a Hub id, and `open_hf` raises a helpful error if it is not.

    Raises:
      ValueError: a URL that `paths.location` refuses.
    """
    location = paths.location(source, "source")
    if paths.is_remote(location):
        return False
    if not location.exists() or (location / "adapter_config.json").exists():
        return True
    if (location / MARKER_FILE).exists():
        return any((location / form.main).exists() for form in WEIGHT_FORMS)
    return (location / "config.json").exists()


def read_any_config(source: metadata.PathLike) -> BTLMConfig:
    """Reads the configuration of a checkpoint of either format, with its stored ALiBi slopes.

    Raises:
      FileNotFoundError, ConnectionError, ValueError: as `open_model` and `metadata.read_metadata`.
    """
    if is_huggingface(source):
        return open_model(source)[1]
    return metadata.read_metadata(source).config


def read_any_tokenizer(source: metadata.PathLike) -> Tokenizer | None:
    """Reads the tokenizer of a checkpoint of either format; None if it has no tokenizer files.

    Raises:
      FileNotFoundError, ConnectionError, ValueError: as `open_hf`, `metadata.read_metadata` and
        `load_tokenizer`.
    """
    if is_huggingface(source):
        folder: metadata.PathLike = open_hf(source).directory
    else:
        meta = metadata.read_metadata(source)
        warn_of_changed_assets(meta)
        folder = meta.path
    try:
        return load_tokenizer(folder)
    except FileNotFoundError:
        return None


def load_any_checkpoint(
    source: metadata.PathLike,
    *,
    mesh: Mesh | None = None,
    dtype: DTypeLike | None = None,
    unstacked: bool = False,
) -> tuple[BTLM, Params]:
    """Loads model and weights with `load_hf` or `checkpoint.load`, according to the format."""
    load = load_hf if is_huggingface(source) else checkpoint.load
    return load(source, mesh=mesh, dtype=dtype, unstacked=unstacked)
