"""Download of the files of a model that conversion needs from the Hugging Face Hub."""

from __future__ import annotations

import errno
import glob
import logging
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from btlm_jax.utils.format import join_first

logger = logging.getLogger(__name__)

_HUB_NAME = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?"
_LOCAL_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS})


def is_hub_id(text: str) -> bool:
    """Returns whether `text` has the form of a Hub id, `org/name` in the Hub's characters."""
    legal = re.fullmatch(f"{_HUB_NAME}/{_HUB_NAME}", text) is not None
    return legal and ".." not in text and "--" not in text


def select_files(listed: Iterable[str], names: Sequence[str], mains: Sequence[str]) -> list[str]:
    """Selects the files to download from those that a model repository lists.

    Args:
      listed: paths of the repository's files.
      names: names of files to download if they exist (config and tokenizer).
      mains: names of the main weight files in order of preference; the first that exists is
        selected, with its shards if it is an index.

    Returns:
      Names of files in the repository's top folder, without weight files if `mains` has no match.
    """
    top = sorted(name for name in set(listed) if "/" not in name)
    selected = [name for name in top if name in names]
    main = next((m for m in mains if m in top), None)
    if main is None:
        return selected
    weights = [main]
    if main.endswith(".index.json"):
        # model.safetensors.index.json belongs to model-00001-of-00002.safetensors and so on.
        stem, suffix = os.path.splitext(main.removesuffix(".index.json"))
        weights += [n for n in top if n.startswith(stem) and n.endswith(suffix)]
    return selected + weights


def fetch_from_hub(
    repo_id: str, revision: str | None, names: Sequence[str], mains: Sequence[str]
) -> Path:
    """Downloads a model's config, tokenizer files and preferred weights into the Hub's cache.

    The access token is that of the environment variable `HF_TOKEN`; stored tokens are not used. If
    the Hub cannot be reached, a copy in the cache is used.

    Args:
      repo_id: for example "cerebras/btlm-3b-8k-base".
      revision: branch, tag or commit; None for the default branch.
      names, mains: see `select_files`.

    Returns:
      The directory of the downloaded snapshot.

    Raises:
      FileNotFoundError: the model or revision does not exist, or has no config or weights.
      ConnectionError: the Hub cannot be reached or refuses, and the cache has no copy.
      OSError: the files cannot be written.
    """
    import huggingface_hub as hub
    from huggingface_hub.errors import HfHubHTTPError

    token = os.environ.get("HF_TOKEN") or False
    # The exception types depend on the Hub library's version and its HTTP library.
    try:
        info = hub.model_info(repo_id, revision=revision, token=token)
    except Exception as error:
        if isinstance(error, HfHubHTTPError):
            raise _explain_hub_error(error, repo_id, revision) from None
        return _cached_snapshot(repo_id, revision, error)
    listed = [file.rfilename for file in info.siblings or ()]
    files = select_files(listed, names, mains)
    if "config.json" not in files or not set(mains) & set(files):
        raise FileNotFoundError(
            f"{repo_id!r} on the Hub has no config.json or no weights; expected config.json and "
            f"one of {', '.join(mains)}; it has {join_first(sorted(listed))}. "
            "Fix: name a model repository in the transformers layout."
        )
    # Downloads the listed commit, because the branch may have moved since.
    logger.info("fetching %d files of %s at commit %s", len(files), repo_id, info.sha)
    try:
        patterns = [glob.escape(name) for name in files]
        return Path(
            hub.snapshot_download(repo_id, revision=info.sha, token=token, allow_patterns=patterns)
        )
    except Exception as error:
        raise _explain_hub_error(error, repo_id, revision) from None


def _cached_snapshot(repo_id: str, revision: str | None, reason: Exception) -> Path:
    """Returns the snapshot in the Hub's cache; raises the error for `reason` if there is none."""
    import huggingface_hub as hub

    try:
        # config.json suffices to find the folder; opening reports missing shards.
        snapshot = hub.snapshot_download(
            repo_id, revision=revision, local_files_only=True, allow_patterns=["config.json"]
        )
    except Exception:
        raise _explain_hub_error(reason, repo_id, revision) from None
    logger.warning(
        "cannot reach the Hub (%s): using the cached copy %s", _first_line(reason), snapshot
    )
    return Path(snapshot)


def _explain_hub_error(error: Exception, repo_id: str, revision: str | None) -> OSError:
    """Returns the error to raise instead: one line with the model, the reason and the fix."""
    from huggingface_hub import errors

    if isinstance(error, errors.RevisionNotFoundError):
        return FileNotFoundError(
            f"{repo_id!r} on the Hub has no revision {revision!r}. "
            "Fix: name a branch, tag or full commit hash that the model page lists."
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return FileNotFoundError(
            f"no directory and no model on the Hub is named {repo_id!r}, or it is private or "
            "gated. Fix: check the name; for a private or gated model set HF_TOKEN."
        )
    if isinstance(error, OSError) and error.errno in _LOCAL_ERRORS:
        return OSError(
            error.errno,
            f"{_first_line(error)}, while downloading {repo_id!r}. "
            "Fix: free space, or set HF_HOME to a writable directory",
        )
    return ConnectionError(
        f"could not fetch {repo_id!r} from the Hugging Face Hub ({_first_line(error)}). Fix: "
        "check the network and HF_HUB_OFFLINE and try again, or pass a local directory."
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
