"""Comparison of two checkpoints tensor by tensor, or of one with the hashes that it records."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import math
from collections.abc import Iterable

import jax.numpy as jnp
import numpy as np

from btlm_jax.checkpoint import metadata, zarr
from btlm_jax.config import BTLMConfig, Positions
from btlm_jax.convert import auto
from btlm_jax.convert.conversion_report import weights_digest
from btlm_jax.convert.tensor_difference import block_difference
from btlm_jax.convert.threads import for_each_in_threads, num_threads
from btlm_jax.convert.verifiable import VerifiableCheckpoint, open_for_verification
from btlm_jax.data.encoder import TOKENIZER_FILES
from btlm_jax.model import alibi, weights
from btlm_jax.utils import paths
from btlm_jax.utils.format import DEFAULT_MEMORY, align_columns
from btlm_jax.utils.progress import Progress

logger = logging.getLogger(__name__)

Difference = tuple[str, str]  # (tensor, file or configuration field, description)


@dataclasses.dataclass(frozen=True)
class Verification:
    """The result of `verify`; true if there is no difference.

    Attributes:
      tensors: number of tensors of the first checkpoint.
      nbytes: bytes of the tensors that were read from it.
      differences: (tensor, file or configuration field, description) of every difference.
      digest: `weights_digest` of the first checkpoint, from the bytes that were read; it covers all
        tensors unless some are among the differences.
    """

    tensors: int
    nbytes: int
    differences: tuple[Difference, ...]
    digest: str

    def __bool__(self) -> bool:
        return not self.differences

    def __str__(self) -> str:
        if not self.differences:
            return (
                f"{self.tensors} tensors, {self.nbytes:,} bytes: no difference\n"
                f"sha256 of the tensors' sha256: {self.digest}"
            )
        rows = align_columns(self.differences, "<")
        plural = "s" * (len(rows) != 1)
        return f"{len(rows)} difference{plural} in {self.tensors} tensors:\n" + "\n".join(rows)


def verify(
    a: metadata.PathLike,
    b: metadata.PathLike | None = None,
    *,
    atol: float | None = None,
    logits: bool = False,
    max_memory: int = DEFAULT_MEMORY,
) -> Verification:
    """Compares two checkpoints, each of either format, or one with the hashes that it records.

    Args:
      a: an Orbax checkpoint (directory or URL), a Hugging Face directory or a Hub id.
      b: a second one. Without it, every array and copied file of `a` is hashed and compared with
        its record.
      atol: largest absolute difference of values to accept, also between dtypes; None accepts equal
        bits only.
      logits: also run both models on the same tokens and compare the logits.
      max_memory: budget for weights in flight, in bytes, to which `logits` adds one model.

    Raises:
      FileNotFoundError, ValueError: a source is not a checkpoint; there is no `b` and `a` records
        no hashes, or `atol` or `logits` is given; or the two have different quantizations.
    """
    for name, path in (("a", a), ("b", b)):
        if path is not None:
            paths.location(path, name)
    if b is None and (atol is not None or logits):
        given = f"atol={atol}" if atol is not None else f"logits={logits}"
        raise ValueError(
            f"{given} does nothing without a second checkpoint: name one, or omit it; alone, a "
            "checkpoint is compared with the hashes that it records"
        )
    first = open_for_verification(a)
    if b is None:
        return _verify_records(first, max_memory)
    second = open_for_verification(b)
    _check_comparable(first, second, atol)
    differences = _config_differences(first.config, second.config)
    same_config = not differences
    differences += _asset_differences(first, second)
    common, unmatched = _match_tensors(first, second)
    differences += unmatched
    unequal, sha256 = _compare_tensors(first, second, common, atol, max_memory)
    differences += unequal
    if logits and not same_config:
        logger.warning("logits=True: not compared, because the configurations differ")
    elif logits:
        differences += _logits_differences(a, b, first.config, atol)
    nbytes = sum(map(first.nbytes, common))
    return Verification(len(first.disk_leaves), nbytes, tuple(differences), weights_digest(sha256))


def _check_comparable(
    first: VerifiableCheckpoint, second: VerifiableCheckpoint, atol: float | None
) -> None:
    if first.quantized != second.quantized:
        kinds = " and ".join(str(x.quantized or "floats") for x in (first, second))
        raise ValueError(
            f"{first.name} and {second.name} hold {kinds}: only checkpoints of one kind can be "
            "compared; a quantized checkpoint records its quantization errors, see `btlm info`"
        )
    if first.quantized is not None and atol is not None:
        raise ValueError("atol: quantized checkpoints are compared bit for bit: omit it")


def _hf_shape(leaf: weights.DiskLeaf) -> tuple[int, ...]:
    return leaf.weight.hf_shape if leaf.part is None else leaf.shape


def _match_tensors(
    first: VerifiableCheckpoint, second: VerifiableCheckpoint
) -> tuple[list[weights.DiskLeaf], list[Difference]]:
    """Returns the tensors that both have in one shape, and the differences that the others are."""
    unmatched = {leaf.hf_name: leaf for leaf in second.disk_leaves}
    common, differences = [], []
    for leaf in first.disk_leaves:
        other = unmatched.pop(leaf.hf_name, None)
        if other is None:
            differences.append((leaf.hf_name, f"only in {first.name}"))
        elif _hf_shape(other) != _hf_shape(leaf):
            shapes = f"shape {_hf_shape(leaf)} and {_hf_shape(other)}"
            differences.append((leaf.hf_name, shapes))
        else:
            common.append(leaf)
    differences += [(name, f"only in {second.name}") for name in unmatched]
    return common, differences


def _compare_tensors(
    first: VerifiableCheckpoint,
    second: VerifiableCheckpoint,
    leaves: list[weights.DiskLeaf],
    atol: float | None,
    max_memory: int,
) -> tuple[list[Difference], dict[str, str]]:
    """Returns the differences between tensors, and SHA-256 by name of those of `first`."""
    descriptions: dict[str, str] = {}
    sha256: dict[str, str] = {}

    def compare(leaf: weights.DiskLeaf) -> None:
        name = leaf.hf_name
        dtype, other_dtype = first.dtypes[name], second.dtypes[name]
        width = max(dtype.itemsize, other_dtype.itemsize)
        digest = zarr.Digest()
        count, largest = 0, 0.0
        blocks = digest.watch(first.blocks(leaf, width))
        for x, y in zip(blocks, second.blocks(leaf, width), strict=True):
            block_count, block_largest = block_difference(x, y)
            count, largest = count + block_count, max(largest, block_largest)
            progress.update(x.nbytes)
        sha256[name] = digest.sha256
        if atol is not None and largest <= atol:
            return
        dtypes = "" if dtype == other_dtype else f"{dtype} and {other_dtype}, "
        if count:
            descriptions[name] = (
                f"{dtypes}{count:,} of {math.prod(leaf.shape):,} elements differ, "
                f"max |difference| {largest:.6g}"
            )
        elif dtypes:
            descriptions[name] = f"{dtypes}values equal"

    # Two blocks at a time, one of each checkpoint.
    threads = num_threads(max_memory, 2 * max(first.largest_block, second.largest_block))
    with Progress(sum(map(first.nbytes, leaves)), "B", "verify") as progress:
        for_each_in_threads(leaves, compare, threads)
    return _in_model_order(leaves, descriptions), sha256


def _in_model_order(
    leaves: list[weights.DiskLeaf], descriptions: dict[str, str]
) -> list[Difference]:
    names = (leaf.hf_name for leaf in leaves)
    return [(name, descriptions[name]) for name in names if name in descriptions]


def _verify_records(checkpoint: VerifiableCheckpoint, max_memory: int) -> Verification:
    """Compares a checkpoint with the hashes that it records."""
    if not checkpoint.sha256:
        raise ValueError(
            f"{checkpoint.name} records no SHA-256 of its tensors: compare it with another "
            f"checkpoint, `btlm verify {checkpoint.name} OTHER`"
        )
    leaves = checkpoint.disk_leaves
    descriptions: dict[str, str] = {}
    sha256: dict[str, str] = {}

    def check(leaf: weights.DiskLeaf) -> None:
        name, digest = leaf.hf_name, zarr.Digest()
        try:
            for block in digest.watch(checkpoint.blocks(leaf, checkpoint.dtypes[name].itemsize)):
                progress.update(block.nbytes)
        except ValueError as e:  # a damaged file
            descriptions[name] = str(e)
            return
        sha256[name] = digest.sha256
        recorded = checkpoint.sha256.get(name)
        if sha256[name] != recorded:
            descriptions[name] = f"sha256 {sha256[name]}, recorded {recorded}"

    nbytes = sum(map(checkpoint.nbytes, leaves))
    threads = num_threads(max_memory, checkpoint.largest_block)
    with Progress(nbytes, "B", "verify") as progress:
        for_each_in_threads(leaves, check, threads)
    differences = _in_model_order(leaves, descriptions)
    for name, (recorded, compute_sha256) in checkpoint.other_sha256.items():
        present = compute_sha256()
        if present != recorded:
            differences.append((name, f"sha256 {present}, recorded {recorded}"))
    for name, recorded in checkpoint.asset_sha256.items():
        if name not in checkpoint.assets:
            differences.append((name, f"missing, recorded {recorded}"))
            continue
        present = _sha256(checkpoint, name)
        if present != recorded:
            differences.append((name, f"sha256 {present}, recorded {recorded}"))
    return Verification(len(leaves), nbytes, tuple(differences), weights_digest(sha256))


def _config_differences(first: BTLMConfig, second: BTLMConfig) -> list[Difference]:
    differences = []
    for field in dataclasses.fields(first):
        x, y = getattr(first, field.name), getattr(second, field.name)
        if field.name == "alibi_slopes" and first.positions is second.positions is Positions.ALIBI:
            # None stands for the exact slopes, which may also be stored.
            x, y = (tuple(alibi.model_slopes(c).tolist()) for c in (first, second))
        if x != y:
            differences.append((f"config {field.name}", f"{x} and {y}"))
    return differences


def _asset_differences(
    first: VerifiableCheckpoint, second: VerifiableCheckpoint
) -> Iterable[Difference]:
    """Yields the files that differ or are missing.

    A file besides the tokenizer's that only one checkpoint has is a difference only if the other
    records it: exports write a generation_config.json of their own.
    """
    pair = first, second
    for name in sorted({name for c in pair for name in (*c.assets, *c.asset_sha256)}):
        having = [c for c in pair if name in c.assets]
        lacking = [c.name for c in pair if name in c.asset_sha256 and name not in c.assets]
        if len(having) == 2:
            if first.assets[name] != second.assets[name]:
                yield name, "the files differ"
        elif lacking:
            yield name, f"missing in {' and '.join(lacking)}, which records it"
        elif name in TOKENIZER_FILES:
            yield name, f"only in {having[0].name}"


def _sha256(checkpoint: VerifiableCheckpoint, name: str) -> str:
    return hashlib.sha256(checkpoint.assets[name]).hexdigest()


def _logits_differences(
    a: metadata.PathLike, b: metadata.PathLike, config: BTLMConfig, atol: float | None
) -> Iterable[Difference]:
    """Runs both models, one after the other, on the same random tokens in float32."""
    length = min(64, config.n_positions)
    tokens = np.random.default_rng(0).integers(config.vocab_size, size=(2, length))
    x, y = (compute_logits(source, tokens) for source in (a, b))
    difference = np.abs(x - y)
    difference[(x == y) | (np.isnan(x) & np.isnan(y))] = 0.0
    largest = float(np.nan_to_num(difference, nan=np.inf).max(initial=0.0))
    if (atol is not None and largest <= atol) or np.array_equal(x, y, equal_nan=True):
        return
    agreement = float((x.argmax(-1) == y.argmax(-1)).mean())
    yield (
        "logits",
        f"max |difference| {largest:.6g} of max |logit| {np.nanmax(np.abs(x)):.6g}, "
        f"the most likely token agrees at {agreement:.1%} of positions",
    )


def compute_logits(source: metadata.PathLike, tokens: np.ndarray) -> np.ndarray:
    """Returns the float32 logits [B, T, V] of a checkpoint of either format for tokens [B, T]."""
    # Loaded in float32, because layers of mixed dtypes cannot be stacked otherwise.
    model, params = auto.load_any_checkpoint(source, dtype=jnp.float32)
    model = dataclasses.replace(model, compute_dtype=jnp.float32)
    return np.asarray(model.apply(params, tokens))
