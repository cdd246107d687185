"""Compare checkpoints tensor by tensor, or one with the hashes it records."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping

import jax.numpy as jnp
import numpy as np
from safetensors import safe_open

from btlm_jax.checkpoint import metadata, quantization, zarr
from btlm_jax.checkpoint.assets import asset_files
from btlm_jax.checkpoint.quantization import Quantization
from btlm_jax.config import BTLMConfig
from btlm_jax.convert import auto
from btlm_jax.convert.conversion_report import weights_digest
from btlm_jax.convert.hf.safetensors_writer import SHA256
from btlm_jax.convert.hf.source import HFSource, open_hf
from btlm_jax.convert.hf.source_config import read_source_config
from btlm_jax.convert.hf.tensor_names import SLOPES
from btlm_jax.convert.threads import for_each_in_threads, num_threads
from btlm_jax.model import alibi, weights
from btlm_jax.utils.format import DEFAULT_MEMORY, align_columns
from btlm_jax.utils.progress import Progress


@dataclasses.dataclass(frozen=True)
class Opened:
    """A checkpoint of either kind, as the comparison sees it.

    Attributes:
      name: what the user called it.
      config: the model, with its stored slopes.
      to: what its weights are quantized to.
      dtypes: of every tensor, by Hugging Face name.
      blocks: yields a tensor in 1-D blocks; the last argument is bytes of a block per element's
        width, so that two checkpoints of different dtypes come in step.
      sha256: what the checkpoint records of its tensors, by Hugging Face name.
      assets: its tokenizer and other small files.
      asset_sha256: what it records of them, by file name.
      rest: what else it records a SHA-256 of, and how to find out what that is now: the files that
        describe its arrays, or the ALiBi slopes where they are a tensor.
      largest_block: bytes of the largest block.
    """

    name: str
    config: BTLMConfig
    to: Quantization | None
    dtypes: Mapping[str, np.dtype]
    blocks: Callable[[weights.DiskLeaf, int], Iterator[np.ndarray]]
    sha256: Mapping[str, str]
    assets: Mapping[str, bytes]
    asset_sha256: Mapping[str, str]
    rest: Mapping[str, tuple[str | None, Callable[[], str | None]]]
    largest_block: int = zarr.BLOCK_BYTES

    @property
    def disk_leaves(self) -> list[weights.DiskLeaf]:
        """Every tensor."""
        return list(quantization.stored_leaves(self.config, self.to))


@dataclasses.dataclass(frozen=True)
class Verification:
    """The outcome of `verify`.

    Attributes:
      tensors, nbytes: what was compared.
      differences: (what, what was found) for everything that differs; empty if all is well.
      digest: of the first checkpoint's weights (`weights_digest`), from the bytes just read: of all
        of them, if none is among the differences.
    """

    tensors: int
    nbytes: int
    differences: tuple[tuple[str, str], ...]
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
    """Compares two checkpoints, each of either format, or one with the hashes it records.

    Args:
      a, b: Orbax checkpoints (directories or URLs), Hugging Face directories or Hub ids. Without
        `b`, every array and carried file of `a` is hashed again.
      atol: largest absolute difference of values to accept; then dtypes may differ. None accepts
        equal bits only.
      logits: run both through the model on the same tokens as well.
      max_memory: bytes of weights in flight; `logits` needs one model in memory besides.

    Raises:
      FileNotFoundError, ValueError: not a checkpoint; without `b`, one that records no hashes; or
        two that are not quantized alike.
    """
    one = open_for_verification(a)
    if b is None:
        return _against_record(one, max_memory)
    two = open_for_verification(b)
    _check_comparable(one, two, atol)
    differences = list(_config_rows(one.config, two.config))
    differences += _asset_rows(one, two)
    leaves = one.disk_leaves
    theirs = {leaf.hf_name: leaf for leaf in two.disk_leaves}
    common = []
    for leaf in leaves:
        other = theirs.pop(leaf.hf_name, None)
        if other is None:
            differences.append((leaf.hf_name, f"only in {one.name}"))
        elif _shape(other) != _shape(leaf):
            found = f"shape {_shape(leaf)} and {_shape(other)}"
            differences.append((leaf.hf_name, found))
        else:
            common.append(leaf)
    differences += [(name, f"only in {two.name}") for name in theirs]
    rows: dict[str, str] = {}
    sha256: dict[str, str] = {}

    def compare(leaf: weights.DiskLeaf, progress: Progress) -> None:
        name = leaf.hf_name
        width = max(one.dtypes[name].itemsize, two.dtypes[name].itemsize)
        hashed = hashlib.sha256()
        unequal, worst = 0, 0.0
        same_dtype = one.dtypes[name] == two.dtypes[name]
        for x, y in zip(one.blocks(leaf, width), two.blocks(leaf, width), strict=True):
            hashed.update(x.view(np.uint8).data)
            count, largest = _difference(x, y)
            unequal, worst = unequal + count, max(worst, largest)
            progress.update(x.nbytes)
        sha256[name] = hashed.hexdigest()
        if atol is not None and worst <= atol:
            return
        dtypes = "" if same_dtype else f"{one.dtypes[name]} and {two.dtypes[name]}, "
        if unequal:
            rows[name] = (
                f"{dtypes}{unequal:,} of {math.prod(leaf.shape):,} elements differ, "
                f"max |difference| {worst:.6g}"
            )
        elif dtypes:
            rows[name] = f"{dtypes}values equal"

    nbytes = sum(_nbytes(one, leaf) for leaf in common)
    threads = num_threads(max_memory, 2 * max(one.largest_block, two.largest_block))
    with Progress(nbytes, "B", "verify") as progress:
        for_each_in_threads(common, lambda leaf: compare(leaf, progress), threads)
    differences += [(x.hf_name, rows[x.hf_name]) for x in common if x.hf_name in rows]
    if logits and not any(_config_rows(one.config, two.config)):
        differences += _logits_rows(a, b, one, atol)
    return Verification(len(leaves), nbytes, tuple(differences), weights_digest(sha256))


def _check_comparable(one: Opened, two: Opened, atol: float | None) -> None:
    if one.to != two.to:
        kinds = " and ".join(str(x.to) if x.to else "floats" for x in (one, two))
        raise ValueError(
            f"{one.name} and {two.name} hold {kinds}: only checkpoints of one kind can be "
            "compared; what quantizing has cost stands in the quantized one, see `btlm info`"
        )
    if one.to is not None and atol is not None:
        raise ValueError("atol: quantized checkpoints are compared bit for bit: leave it out")


def _shape(leaf: weights.DiskLeaf) -> tuple[int, ...]:
    return leaf.weight.hf_shape if leaf.part is None else leaf.shape


def _difference(x: np.ndarray, y: np.ndarray) -> tuple[int, float]:
    """Number of differing elements and the largest difference; infinite if one is not a number."""
    bits = {1: np.uint8, 2: np.uint16, 4: np.uint32}[x.dtype.itemsize]
    same_dtype = x.dtype == y.dtype
    if same_dtype and np.array_equal(x.view(bits), y.view(bits)):
        return 0, 0.0
    unequal, worst, size = 0, 0.0, 1 << 18  # float64 copies of a whole block would break the budget
    for i in range(0, len(x), size):
        a, b = x[i : i + size], y[i : i + size]
        p, q = a.astype(np.float64), b.astype(np.float64)
        alike = (p == q) | (np.isnan(p) & np.isnan(q))
        unequal += int((a.view(bits) != b.view(bits)).sum() if same_dtype else (~alike).sum())
        with np.errstate(invalid="ignore"):
            difference = np.where(alike, 0.0, np.abs(p - q))
        worst = max(worst, float(np.nan_to_num(difference, nan=np.inf, posinf=np.inf).max()))
    return unequal, worst


def open_for_verification(source: metadata.PathLike) -> Opened:
    """Opens a checkpoint of either format; see `verify`."""
    text = os.fspath(source)
    if auto.is_huggingface(source):
        return _open_hf(text, open_hf(source))
    meta = metadata.read_metadata(source)
    leaves = {leaf.hf_name: leaf for leaf in meta.disk_leaves}

    def structure() -> str | None:
        return metadata.structure_sha256(meta.path, meta.leaves)

    return Opened(
        name=text,
        config=meta.config,
        to=meta.quantization,
        dtypes={name: np.dtype(meta.leaves[leaf.path].dtype) for name, leaf in leaves.items()},
        blocks=meta.blocks,
        sha256={n: meta.sha256[x.path] for n, x in leaves.items() if x.path in meta.sha256},
        assets={file.name: file.read_bytes() for file in asset_files(meta.path)},
        asset_sha256=meta.asset_sha256,
        rest={"zarr.json, _METADATA": (meta.structure_sha256, structure)},
        largest_block=meta.largest_block,
    )


def _open_hf(name: str, hf: HFSource) -> Opened:
    def blocks(leaf: weights.DiskLeaf, width: int) -> Iterator[np.ndarray]:
        return hf.blocks(leaf.hf_name, zarr.block_size(leaf.weight.shape, width))

    recorded: dict[str, str] = {}
    for file in {info.file for info in hf.tensors.values()}:
        if file.suffix == ".safetensors":
            with safe_open(file, "numpy") as opened:
                recorded |= json.loads((opened.metadata() or {}).get(SHA256, "{}"))

    def slopes() -> str:
        return hashlib.sha256(hf.read_tensor(SLOPES).tobytes()).hexdigest()

    return Opened(
        name=name,
        config=read_source_config(hf),
        to=None,
        dtypes={name: info.dtype for name, info in hf.tensors.items()},
        blocks=blocks,
        sha256=recorded,
        assets={file.name: file.read_bytes() for file in hf.assets},
        asset_sha256={},
        rest={SLOPES: (recorded[SLOPES], slopes)} if SLOPES in recorded else {},
    )


def _against_record(opened: Opened, max_memory: int) -> Verification:
    if not opened.sha256:
        raise ValueError(
            f"{opened.name} records no SHA-256 of its tensors: compare it with another checkpoint, "
            f"`btlm verify {opened.name} OTHER`"
        )
    leaves = opened.disk_leaves
    rows: dict[str, str] = {}
    sha256: dict[str, str] = {}

    def check(leaf: weights.DiskLeaf, progress: Progress) -> None:
        name, hashed = leaf.hf_name, hashlib.sha256()
        try:
            for block in opened.blocks(leaf, opened.dtypes[name].itemsize):
                hashed.update(block.view(np.uint8).data)
                progress.update(block.nbytes)
        except ValueError as e:
            rows[name] = str(e)
            return
        sha256[name] = hashed.hexdigest()
        if sha256[name] != opened.sha256.get(name):
            rows[name] = f"sha256 {sha256[name]}, recorded {opened.sha256.get(name)}"

    nbytes = sum(_nbytes(opened, leaf) for leaf in leaves)
    with Progress(nbytes, "B", "verify") as progress:
        threads = num_threads(max_memory, opened.largest_block)
        for_each_in_threads(leaves, lambda leaf: check(leaf, progress), threads)
    differences = [(leaf.hf_name, rows[leaf.hf_name]) for leaf in leaves if leaf.hf_name in rows]
    for what, (recorded, now) in opened.rest.items():
        if recorded != (found := now()):
            differences.append((what, f"sha256 {found}, recorded {recorded}"))
    for name, recorded in opened.asset_sha256.items():
        data = opened.assets.get(name)
        found = "missing" if data is None else f"sha256 {hashlib.sha256(data).hexdigest()}"
        if data is None or hashlib.sha256(data).hexdigest() != recorded:
            differences.append((name, f"{found}, recorded {recorded}"))
    return Verification(len(leaves), nbytes, tuple(differences), weights_digest(sha256))


def _nbytes(opened: Opened, leaf: weights.DiskLeaf) -> int:
    return math.prod(leaf.shape) * opened.dtypes[leaf.hf_name].itemsize


def _config_rows(one: BTLMConfig, two: BTLMConfig) -> Iterable[tuple[str, str]]:
    for field in dataclasses.fields(one):
        a, b = getattr(one, field.name), getattr(two, field.name)
        if field.name == "alibi_slopes" and one.alibi and two.alibi:
            # None stands for the exact slopes, which may as well be stored.
            a, b = (tuple(alibi.model_slopes(c).tolist()) for c in (one, two))
        if a != b:
            yield f"config {field.name}", f"{a} and {b}"


def _asset_rows(one: Opened, two: Opened) -> Iterable[tuple[str, str]]:
    for name in sorted({*one.assets} & {*two.assets}):
        if one.assets[name] != two.assets[name]:
            yield name, "the files differ"


def _logits_rows(
    a: metadata.PathLike, b: metadata.PathLike, opened: Opened, atol: float | None
) -> Iterable[tuple[str, str]]:
    """Runs both models, one after the other, on the same random tokens, computing in fp32."""
    length = min(64, opened.config.n_positions)
    tokens = np.random.default_rng(0).integers(opened.config.vocab_size, size=(2, length))
    one, two = (_logits(source, tokens) for source in (a, b))
    difference = np.abs(one - two)
    difference[(one == two) | (np.isnan(one) & np.isnan(two))] = 0.0
    worst = float(np.nan_to_num(difference, nan=np.inf).max(initial=0.0))
    if (atol is not None and worst <= atol) or np.array_equal(one, two, equal_nan=True):
        return
    agree = float((one.argmax(-1) == two.argmax(-1)).mean())
    yield (
        "logits",
        f"max |difference| {worst:.6g} of max |logit| {np.nanmax(np.abs(one)):.6g}, "
        f"the most likely token agrees at {agree:.1%} of positions",
    )


def _logits(source: metadata.PathLike, tokens: np.ndarray) -> np.ndarray:
    # In fp32, because layers of mixed dtypes cannot be stacked otherwise.
    model, params = auto.load_any_checkpoint(source, dtype=jnp.float32)
    model = dataclasses.replace(model, compute_dtype=jnp.float32)
    return np.asarray(model.apply(params, tokens))
