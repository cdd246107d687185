"""Subcommands that evaluate a model."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import arg, subcommand

from btlm_jax.cli.arguments import (
    Lengths,
    Overrides,
    mesh_from_overrides,
    write_json,
)
from btlm_jax.cli.harness_command import EvalHarness
from btlm_jax.cli.path_arguments import Checkpoint, LocalNames, OutputFile, Picture

if TYPE_CHECKING:
    from btlm_jax.evaluation.documents import TextInputs

# Lines appear at once, though a pipe reads them: an evaluation may take hours.
_show = functools.partial(print, flush=True)


@dataclasses.dataclass(frozen=True)
class _TextOptions:
    """A checkpoint, and documents to read with it."""

    checkpoint: Checkpoint
    """An Orbax checkpoint with a tokenizer: a directory, or a gs:// URL."""
    text: LocalNames = ()
    """Files or globs, each file a document (also .gz, .zst, .xz, .bz2); - is standard input."""
    jsonl: LocalNames = ()
    """Files or globs with a JSON object, a document, in each line (also .gz, .zst,
    .xz, .bz2)."""
    field: str = "text"
    """Field of the JSON objects that holds the text."""
    on_error: Literal["raise", "skip"] = "raise"
    """For a record that cannot be used: stop, or skip and count it."""
    eos: str | None = None
    """The token that precedes documents; default that of training, or the tokenizer's EOS."""

    def _texts(self) -> TextInputs:
        from btlm_jax.evaluation.documents import TextInputs

        return TextInputs(self.text, self.jsonl, self.field, self.on_error, self.eos)


def _check_plot(file: Path | None) -> None:
    from btlm_jax.utils import plots

    if file is not None:
        plots.require_matplotlib()


@dataclasses.dataclass(frozen=True)
class EvalPerplexity(_TextOptions):
    """Measure the cross-entropy of texts: nats and bits per token, bits per byte, perplexity per
    token.

    Texts are cut into windows like those of lm-evaluation-harness: every token is predicted once, a
    document's first one from the EOS token.
    """

    documents: Literal["separate", "joined"] | None = None
    """Read each document alone, as in training with data.mask_documents, or all as one stream;
    default as in training, or separate if the checkpoint does not record it."""

    length: int | None = None
    """Tokens per window; default the trained context, or the longest document."""
    stride: int | None = None
    """Distance between windows, in tokens; default --length, as in lm-evaluation-harness. Half of
    it gives every token more context, for twice the work."""
    batch_size: int | None = None
    """Windows per batch, over all devices; default about 8192 tokens on each."""
    quantize: str | None = None
    """Also evaluate the weights quantized to these, such as int8,int4,int4:128; embedding int8."""
    dtype: Literal["bfloat16", "float32"] | None = None
    """Dtype of weights and computation; default as stored, computing in the platform's."""
    set: Overrides = ()
    """Split over devices: mesh.data=N, mesh.fsdp=N, mesh.tensor=N; -1 takes those left."""
    json: OutputFile = None
    """A file for the numbers."""

    def run(self) -> None:
        from btlm_jax.checkpoint.quantization import Quantization
        from btlm_jax.evaluation.checkpoint_perplexity import checkpoint_perplexity

        kinds = [] if self.quantize is None else self.quantize.split(",")
        report = checkpoint_perplexity(
            self.checkpoint,
            self._texts(),
            reading=self.documents,
            length=self.length,
            stride=self.stride,
            batch_size=self.batch_size,
            quantizations=[Quantization.parse(kind.strip()) for kind in kinds],
            dtype=self.dtype,
            mesh=mesh_from_overrides(self.set),
            show=_show,
        )
        write_json(self.json, report)


@dataclasses.dataclass(frozen=True)
class EvalLossByPosition(_TextOptions):
    """Measure the cross-entropy at every position of long texts, also beyond the trained length,
    and compare plain, fixed and dynamic scaling of ALiBi.

    Documents are cut into full windows of --length tokens; shorter ones are left out. Dynamic
    scaling divides distances by S / trained in a pass over S tokens: a position counts in the
    shortest of passes over the trained length, twice that, and so on to --length.
    """

    length: int | None = None
    """Tokens per window; default four times the trained length."""
    trained_length: int | None = None
    """Sequence length that the model was trained on, in tokens; default its n_positions."""
    scaling: tuple[Literal["none", "fixed", "dynamic"], ...] = ()
    """Kinds to compare: plain ALiBi, distances divided by length / trained, dynamic; default
    all."""
    windows: int = 100
    """Maximum number of windows, in the order of the documents."""
    windows_per_document: int | None = None
    """Maximum number of windows of a separate document, from its beginning: more documents say more
    than more windows of one. Default 4."""
    documents: Literal["separate", "joined"] = "separate"
    """Read each document alone, or all as one stream, each after its EOS, as in training without
    data.mask_documents; then without bands, because its windows are not independent."""
    batch_size: int | None = None
    """Windows per batch, over all devices; default about 8192 tokens on each."""
    dtype: Literal["bfloat16", "float32"] | None = None
    """Dtype of weights and computation; default as stored, computing in the platform's."""
    set: Overrides = ()
    """Split over devices: mesh.data=N, mesh.fsdp=N, mesh.tensor=N, mesh.context=N; -1 takes those
    left."""
    json: OutputFile = None
    """A file for the numbers of every position, and of bins."""
    plot: Picture = None
    """A PNG for the curves, with bands of 1.96 standard errors over documents."""

    def run(self) -> None:
        from btlm_jax.evaluation.checkpoint_by_position import checkpoint_loss_by_position

        _check_plot(self.plot)
        report = checkpoint_loss_by_position(
            self.checkpoint,
            self._texts(),
            length=self.length,
            trained=self.trained_length,
            kinds=self.scaling,
            max_windows=self.windows,
            max_per_document=self.windows_per_document,
            reading=self.documents,
            batch_size=self.batch_size,
            dtype=self.dtype,
            mesh=mesh_from_overrides(self.set, ("data", "fsdp", "tensor", "context")),
            plot=self.plot,
            show=_show,
        )
        write_json(self.json, report)


@dataclasses.dataclass(frozen=True)
class EvalRetrieval:
    """Ask for facts far back in prompts of given lengths, and measure the accuracy of greedy
    answers.

    The prompts follow LongEval and are made here from a seed. `lines` asks for the number in one of
    many lines, `topics` for the first topic of a conversation on several. Prompts have as many of
    them as fit into the length.
    """

    checkpoint: Checkpoint
    """An Orbax checkpoint with a tokenizer: a directory, or a gs:// URL."""
    task: Literal["lines", "topics"] = "lines"
    """The question."""
    lengths: Lengths = ()
    """Tokens of the prompts, such as 512,1024; default a quarter, half, all, twice and four times
    the trained length."""
    samples: int = 20
    """Prompts per length."""
    seed: int = 0
    """Seed of the prompts."""
    scaling: tuple[Literal["none", "fixed", "dynamic"], ...] = ("none",)
    """Scaling of ALiBi: none, distances divided by length / trained, or dynamic; several are
    compared."""
    trained_length: int | None = None
    """Sequence length that the model was trained on, in tokens; default its n_positions."""
    lead: bool = True
    """End prompts with the beginning of the answer, which models that were not trained to answer
    questions need; LongEval does not."""
    max_new_tokens: int = 32
    """Tokens of an answer."""
    batch_size: int = 4
    """Prompts per batch."""
    dtype: Literal["bfloat16", "float32"] | None = None
    """Dtype of weights and computation; default as stored, computing in the platform's."""
    set: Overrides = ()
    """Split over devices: mesh.data=N, mesh.fsdp=N, mesh.tensor=N; -1 takes those left."""
    json: OutputFile = None
    """A file for the numbers and all answers."""
    plot: Picture = None
    """A PNG of accuracy against length."""

    def run(self) -> None:
        from btlm_jax.evaluation.checkpoint_retrieval import checkpoint_retrieval

        _check_plot(self.plot)
        report = checkpoint_retrieval(
            self.checkpoint,
            self.task,
            lengths=self.lengths,
            samples=self.samples,
            seed=self.seed,
            kinds=self.scaling,
            trained=self.trained_length,
            lead=self.lead,
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
            dtype=self.dtype,
            mesh=mesh_from_overrides(self.set),
            plot=self.plot,
            show=_show,
        )
        write_json(self.json, report)


# Its field is named "", so that options keep their names, and those of a mesh their prefix.
@dataclasses.dataclass(frozen=True)
class Eval:
    """Evaluate a model: perplexity, loss by position, retrieval, lm-evaluation-harness."""

    command: Annotated[
        Annotated[EvalPerplexity, subcommand("perplexity", prefix_name=False)]
        | Annotated[EvalLossByPosition, subcommand("loss-by-position", prefix_name=False)]
        | Annotated[EvalRetrieval, subcommand("retrieval", prefix_name=False)]
        | Annotated[EvalHarness, subcommand("harness", prefix_name=False)],
        arg(name=""),
    ]

    def run(self) -> None:
        self.command.run()
