"""Subcommands that evaluate a model."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg, subcommand

from btlm_jax.cli.arguments import Lengths, LongMesh, Mesh, check_output, write_json
from btlm_jax.cli.harness_command import Harness

if TYPE_CHECKING:
    from btlm_jax.evaluation.windows import TokenizedDocument


@dataclasses.dataclass(frozen=True)
class _Texts:
    """A checkpoint, and documents to read with it."""

    checkpoint: Positional[str]
    """An Orbax checkpoint that carries a tokenizer: a directory, or a gs:// URL."""
    text: tuple[str, ...] = ()
    """Files or globs, each file a document (also .gz, .zst); - is standard input."""
    jsonl: tuple[str, ...] = ()
    """Files or globs with a JSON object, a document, in each line (also .gz, .zst)."""
    field: str = "text"
    """Of JSON objects, that holds the text."""
    on_error: Literal["raise", "skip"] = "raise"
    """About a record that cannot be used: stop, or skip and count it."""
    eos: str | None = None
    """The token that documents start after; default the tokenizer's own EOS."""

    def _documents(self, encoder: Any) -> Iterator[TokenizedDocument]:
        from btlm_jax.data.encoder import encode_documents
        from btlm_jax.data.text_files import expand_inputs
        from btlm_jax.data.text_reader import TextReader
        from btlm_jax.evaluation.windows import TokenizedDocument

        given = {".txt": self.text, ".jsonl": self.jsonl}
        files = [
            file
            for kind, names in given.items()
            if names
            for file in expand_inputs(names, kind=kind, on_error=self.on_error)
        ]
        if not files:
            raise ValueError("found neither --text nor --jsonl, expected files to evaluate on")
        read = TextReader(files, self.field, on_error=self.on_error).documents()
        found = encode_documents(read, encoder, os.cpu_count() or 1)
        return (TokenizedDocument(ids[:-1], len(document.text.encode())) for document, ids in found)


def _loaded(checkpoint: str, dtype: str | None, mesh: Any, *, unstacked: bool = False) -> Any:
    """Model and weights, which compute in `--dtype` if that is given."""
    import btlm_jax as btlm

    model, params = btlm.load(checkpoint, dtype=dtype, mesh=mesh, unstacked=unstacked)
    return (dataclasses.replace(model, compute_dtype=dtype) if dtype else model), params


@dataclasses.dataclass(frozen=True)
class EvalPerplexity(_Texts):
    """Cross-entropy of texts: nats and bits per token, bits per byte, perplexity per token.

    Texts are cut into windows as lm-evaluation-harness cuts them: every token is predicted once, a
    document's first from the EOS token.
    """

    length: int | None = None
    """Tokens that a window reads; default the trained context, or the longest document."""
    stride: int | None = None
    """Tokens by which windows move on; default --length, as in lm-evaluation-harness. Half of it
    gives every token more context, for twice the work."""
    batch_size: int | None = None
    """Windows at a time, over all devices; default about 8192 tokens on each."""
    quantize: str | None = None
    """Also evaluate the weights quantized to these, such as int8,int4,int4:128; embedding int8."""
    dtype: Literal["bfloat16", "float32"] | None = None
    """Of weights and computation; default as stored, computing in the platform's."""
    mesh: Mesh = dataclasses.field(default_factory=Mesh)
    json: Path | None = None
    """A file for the numbers."""

    def run(self) -> None:
        from btlm_jax.checkpoint import metadata
        from btlm_jax.checkpoint.quantization import Quantization
        from btlm_jax.data.encoder import Encoder
        from btlm_jax.evaluation import quantization_cost, windows
        from btlm_jax.evaluation.batch_shapes import check_batch_size
        from btlm_jax.evaluation.perplexity import cross_entropy

        # Whatever can be refused is, before the weights, which may be large.
        check_output(self.json)
        meta = metadata.read_metadata(self.checkpoint)
        kinds = [Quantization.parse(kind.strip()) for kind in (self.quantize or "").split(",")
                 if self.quantize is not None]  # fmt: skip
        if kinds and meta.quantization is not None:
            raise ValueError(
                f"--quantize: {self.checkpoint} is quantized already ({meta.quantization}): leave "
                "it out, or name the checkpoint this one was made of"
            )
        mesh = self.mesh.made()
        if kinds and mesh is not None:
            raise ValueError(
                "--quantize: found a mesh, expected one device, where weights are quantized: leave "
                "--mesh out, or evaluate what `btlm convert --quantize` makes on it"
            )
        check_batch_size(self.batch_size, mesh)
        encoder = Encoder(self.checkpoint, self.eos, meta.config.vocab_size)
        options = dict(length=self.length, stride=self.stride)
        cut = windows.cut(meta.config, [*self._documents(encoder)], encoder.eos_id, **options)
        print(f"text: {len(cut.documents):,} documents, {cut.tokens:,} tokens, {cut.text_bytes:,} "
              f"bytes; {len(cut):,} windows of {cut.length} tokens, stride {cut.stride}",
              flush=True)  # fmt: skip
        model, params = _loaded(self.checkpoint, self.dtype, mesh)
        dtype = str(model.runtime(params).dtype)
        report: dict[str, Any] = {
            "checkpoint": self.checkpoint, "documents": len(cut.documents), "tokens": cut.tokens,
            "text_bytes": cut.text_bytes, "length": cut.length, "stride": cut.stride,
            "compute_dtype": dtype,
        }  # fmt: skip
        if kinds:
            rows = quantization_cost.compare(model, params, cut, kinds, batch_size=self.batch_size)
            found, report["compared"] = rows[0].found, quantization_cost.to_json(rows)
        else:
            found = cross_entropy(model, params, cut, batch_size=self.batch_size)
            rows = []
        print(f"cross-entropy: {found.nats_per_token:.5f} nats per token, "
              f"{found.bits_per_token:.5f} bits per token, {found.bits_per_byte:.5f} bits per byte"
              f"\nperplexity: {found.perplexity:.4f} per token (computed in {dtype})")  # fmt: skip
        if rows:
            print("\n".join(["", *quantization_cost.table(rows)]))
        write_json(self.json, report | found.numbers())


@dataclasses.dataclass(frozen=True)
class EvalLossByPosition(_Texts):
    """Cross-entropy at every position of long texts, beyond the trained length too, with plain,
    fixed and dynamic scaling of ALiBi beside one another.

    Documents are cut into whole windows of --length tokens; shorter ones are left out. Dynamic
    scaling divides distances by S / trained in a pass over S tokens: a position counts in the
    shortest of passes over the trained length, twice that, and so on to --length.
    """

    length: int | None = None
    """Tokens of a window; default four times the trained length."""
    trained_length: int | None = None
    """Tokens of the sequences the model was trained on; default its n_positions."""
    scaling: tuple[Literal["none", "fixed", "dynamic"], ...] = ()
    """What to compare: plain ALiBi, distances divided by length / trained, dynamic; default all."""
    windows: int = 100
    """To read, at most, in the order of the documents."""
    windows_per_document: int = 4
    """To read, at most, from its beginning: more documents tell more than more of one."""
    concatenate: bool = False
    """Read all documents as one stream, each after its EOS, as in training; without bands, as its
    windows are not independent."""
    batch_size: int | None = None
    """Windows at a time, over all devices; default about 8192 tokens on each."""
    dtype: Literal["bfloat16", "float32"] | None = None
    """Of weights and computation; default as stored, computing in the platform's."""
    mesh: LongMesh = dataclasses.field(default_factory=LongMesh)
    json: Path | None = None
    """A file for the numbers: of every position, and of bins."""
    plot: Path | None = None
    """A PNG for the curves, with bands of 1.96 standard errors over documents."""

    def run(self) -> None:
        import btlm_jax as btlm
        from btlm_jax.checkpoint import metadata
        from btlm_jax.data.encoder import Encoder
        from btlm_jax.evaluation import by_position_report as report
        from btlm_jax.evaluation import context_extension
        from btlm_jax.evaluation.batch_shapes import check_batch_size
        from btlm_jax.evaluation.by_position import check_length, loss_by_position
        from btlm_jax.evaluation.long_windows import LongWindows
        from btlm_jax.utils import plots

        # Whatever can be refused is, before the weights, which may be large.
        check_output(self.json)
        check_output(self.plot, ".png")
        if self.plot is not None:
            plots.require_matplotlib()
        meta = metadata.read_metadata(self.checkpoint)
        model = btlm.BTLM(meta.config, compute_dtype=self.dtype)
        trained = context_extension.trained_length(model, self.trained_length)
        length = 4 * trained if self.length is None else self.length
        check_length(length, trained)
        kinds = tuple(dict.fromkeys(self.scaling)) or context_extension.kinds(model)
        for kind in kinds:
            context_extension.scaled(model, kind, trained, length)
        mesh = self.mesh.made()
        check_batch_size(self.batch_size, mesh)
        encoder = Encoder(self.checkpoint, self.eos, meta.config.vocab_size)
        options: dict[str, Any] = dict(most=self.windows, each=self.windows_per_document)
        windows = LongWindows(
            self._documents(encoder),
            encoder.eos_id,
            length,
            concatenate=self.concatenate,
            **options,
        )
        model, params = _loaded(self.checkpoint, self.dtype, mesh)
        dtype = str(model.runtime(params).dtype)
        options = dict(trained=trained, kinds=kinds, batch_size=self.batch_size)
        found = loss_by_position(model, params, windows, **options)
        of = "one stream" if self.concatenate else f"{len(found.windows):,} documents"
        read = f"{found.count:,} windows of {length:,} tokens from {of}"
        print(f"{read}; {found.short:,} shorter documents left out; computed in {dtype}")
        print("\n".join(report.table(found)))
        same = {"checkpoint": self.checkpoint, "compute_dtype": dtype}
        write_json(self.json, same | report.to_json(found))
        if self.plot is not None:
            name = Path(self.checkpoint).name
            report.draw(self.plot, found, f"{name}, trained on {trained:,} tokens: {read}")


@dataclasses.dataclass(frozen=True)
class EvalRetrieval:
    """Ask for what stands far back in prompts of given lengths: accuracy of greedy answers.

    In the form of LongEval, made here from a seed. `lines` asks for the number in one of many
    lines, `topics` for the first topic of a conversation on several. Prompts have as many of them
    as fit into the length.
    """

    checkpoint: Positional[str]
    """An Orbax checkpoint that carries a tokenizer: a directory, or a gs:// URL."""
    task: Literal["lines", "topics"] = "lines"
    """What to ask for."""
    lengths: Lengths = ()
    """Tokens of the prompts, such as 512,1024; default a quarter, half, all, twice and four times
    the trained length."""
    samples: int = 20
    """Prompts of each length."""
    seed: int = 0
    """Of what is in them."""
    scaling: tuple[Literal["none", "fixed", "dynamic"], ...] = ("none",)
    """Of ALiBi: none, distances divided by length / trained, or dynamic; several are compared."""
    trained_length: int | None = None
    """Tokens of the sequences the model was trained on; default its n_positions."""
    lead: bool = True
    """End prompts with the beginning of the answer, as models want that were not taught to answer
    questions; LongEval does not."""
    max_new_tokens: int = 32
    """Of an answer."""
    batch_size: int = 4
    """Prompts at a time."""
    dtype: Literal["bfloat16", "float32"] | None = None
    """Of weights and computation; default as stored, computing in the platform's."""
    mesh: Mesh = dataclasses.field(default_factory=Mesh)
    json: Path | None = None
    """A file for the numbers and all answers."""
    plot: Path | None = None
    """A PNG of accuracy against length."""

    def run(self) -> None:
        import btlm_jax as btlm
        from btlm_jax.checkpoint import metadata
        from btlm_jax.data.tokenizer import check_vocabulary
        from btlm_jax.evaluation import context_extension, retrieval
        from btlm_jax.utils import plots

        # Whatever can be refused is, before the weights, which may be large.
        check_output(self.json)
        check_output(self.plot, ".png")
        if self.plot is not None:
            plots.require_matplotlib()
        for name in ("max_new_tokens", "batch_size"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name}: found {value}, expected at least 1")
        meta = metadata.read_metadata(self.checkpoint)
        tokenizer = btlm.load_tokenizer(self.checkpoint)
        check_vocabulary(tokenizer, meta.config.vocab_size)
        model = btlm.BTLM(meta.config, compute_dtype=self.dtype)
        trained = context_extension.trained_length(model, self.trained_length)
        lengths = self.lengths or tuple(trained * n // 4 for n in (1, 2, 4, 8, 16))
        kinds = tuple(dict.fromkeys(self.scaling))
        pairs = [(kind, n) for n in lengths for kind in kinds]
        for kind, n in pairs:
            context_extension.scaled(model, kind, trained, n, new=self.max_new_tokens)
        options: dict[str, Any] = dict(seed=self.seed, lead=self.lead)
        asked = {n: retrieval.prompts(self.task, tokenizer, n, self.samples, **options)
                 for n in lengths}  # fmt: skip
        mesh = self.mesh.made()
        model, params = _loaded(self.checkpoint, self.dtype, mesh, unstacked=True)
        options = dict(new=self.max_new_tokens, batch_size=self.batch_size)
        outcomes = []
        for kind, n in pairs:
            used = context_extension.scaled(model, kind, trained, n, new=self.max_new_tokens)
            continued = retrieval.continuation(used, params, tokenizer, **options)
            found = retrieval.evaluate(self.task, kind, n, asked[n], continued)
            outcomes.append(found)
            print(retrieval.line(self.task, found), flush=True)
        report: dict[str, Any] = {
            "checkpoint": self.checkpoint, "task": self.task, "trained": trained,
            "seed": self.seed, "lead": self.lead,
            "compute_dtype": str(model.runtime(params).dtype),
            "outcomes": retrieval.to_json(outcomes),
        }  # fmt: skip
        write_json(self.json, report)
        if self.plot is not None:
            name = f"{Path(self.checkpoint).name}: {self.task}, {self.samples} prompts a length"
            retrieval.draw(self.plot, outcomes, trained, name)


# Its field is named "", so that options keep their names, and those of a mesh their prefix.
@dataclasses.dataclass(frozen=True)
class Eval:
    """Measure what a model knows, and how far it reads."""

    what: Annotated[
        Annotated[EvalPerplexity, subcommand("perplexity", prefix_name=False)]
        | Annotated[EvalLossByPosition, subcommand("loss-by-position", prefix_name=False)]
        | Annotated[EvalRetrieval, subcommand("retrieval", prefix_name=False)]
        | Annotated[Harness, subcommand("harness", prefix_name=False)],
        arg(name=""),
    ]

    def run(self) -> None:
        self.what.run()
