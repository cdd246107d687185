"""Commands on muP: coord-check, transfer."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import OmitArgPrefixes, arg

from btlm_jax.cli.arguments import write_json
from btlm_jax.cli.path_arguments import Directory, InputDirectory, OptionalName, check_output

if TYPE_CHECKING:
    from btlm_jax.mup_study.corpus import Corpus
    from btlm_jax.mup_study.parametrization import WidthFamily

# 2 is a bad argument or input, as in every command.
EXIT_CODES = {"passes": 0, "fails": 1, "undecided": 3}


@dataclasses.dataclass(frozen=True)
class Models:
    """The models that are trained in every width, and their data."""

    widths: tuple[int, ...] = (64, 128, 256, 512)
    """Widths of the models; at the first, the base width of muP, all parametrizations agree."""
    heads: int = 4
    """Heads at every width. The head dimension grows, so that a wrong scale of attention shows."""
    layers: int = 2
    """Layers of every model."""
    model: Annotated[OptionalName, arg(metavar="PRESET|FILE")] = None
    """A preset or a config.json for all other fields; by default a small BTLM."""
    data: InputDirectory = None
    """A directory of `btlm tokenize`; by default the bytes of Python's language reference."""
    batch_size: int = 8
    """Sequences per step."""
    length: int = 64
    """Tokens per sequence."""
    seeds: int = 2
    """Number of seeds of weights (and of batches in `transfer`); results are means over them."""

    def build(self) -> tuple[WidthFamily, Corpus]:
        """Returns the models and the corpus that they are trained on."""
        from btlm_jax.config import BTLMConfig
        from btlm_jax.mup_study import parametrization
        from btlm_jax.mup_study.corpus import read_corpus
        from btlm_jax.presets import PRESETS

        for name in ("heads", "layers", "batch_size", "length", "seeds"):
            if getattr(self, name) < 1:
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag}: found {getattr(self, name)}, expected at least 1")
        base = None
        if self.model is not None:
            known = self.model in PRESETS
            base = BTLMConfig.preset(self.model) if known else BTLMConfig.from_hf(self.model)
        corpus = read_corpus(self.data, self.length)
        shape = parametrization.family_shape(corpus.vocab_size, self.layers, self.heads, base)
        family = parametrization.WidthFamily(shape, self.widths)
        print(f"training on {corpus.name}: batches of {self.batch_size} x {self.length} tokens, "
              f"seeds: {self.seeds}", flush=True)  # fmt: skip
        return family, corpus


@dataclasses.dataclass(frozen=True)
class CoordCheckModels(Models):
    """As `Models`; every seed trains on one small batch, where muP shows most clearly."""

    batch_size: int = 1
    """Sequences in the batch of a seed."""
    length: int = 16
    """Tokens per sequence; few tokens are best."""
    seeds: int = 16
    """Number of seeds, each with its own weights and batch. More of them find smaller faults."""


@dataclasses.dataclass(frozen=True)
class CoordCheck:
    """Check that activations keep their scale in every width.

    muP predicts how activations, and their changes by training, scale with the width. Models with
    one deliberately broken rule each must fail the check. Exit code 0 if muP passes and every
    broken rule fails, 1 if muP fails, 3 if the noise is too large to tell or a broken rule is not
    detected.
    """

    directory: Directory = Path("coord-check")
    """Directory for coord_check.json and coord_check.png."""
    models: OmitArgPrefixes[CoordCheckModels] = dataclasses.field(default_factory=CoordCheckModels)
    steps: int = 4
    """Training steps before activations are compared."""
    learning_rate: Annotated[float | None, arg(metavar="FLOAT")] = None
    """Learning rate of embeddings, which must be near the best one. Default 2^-6.25."""
    faults: bool = True
    """Also break every rule of muP, one at a time; otherwise compare with SP only."""

    def run(self) -> int:
        from btlm_jax.mup_study import coord_check, coord_check_report
        from btlm_jax.utils import plots

        plots.require_matplotlib()
        numbers, picture = (self.directory / f"coord_check.{kind}" for kind in ("json", "png"))
        check_output(numbers)
        check_output(picture)
        if self.steps < 1:
            raise ValueError(f"--steps: found {self.steps}, expected at least 1")
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise ValueError(f"--learning-rate: found {self.learning_rate}, expected more than 0")
        family, corpus = self.models.build()
        check = coord_check.coord_check(
            family,
            corpus,
            parametrizations=coord_check.ALL if self.faults else ("muP", "SP"),
            learning_rate=self.learning_rate or coord_check.LEARNING_RATE,
            steps=self.steps,
            seeds=self.models.seeds,
            batch_size=self.models.batch_size,
            length=self.models.length,
        )
        print("\n".join(coord_check_report.coord_check_table(check)))
        write_json(numbers, coord_check_report.coord_check_numbers(check))
        coord_check_report.draw_coord_check(picture, check)
        print(f"written to {self.directory}: coord_check.json, coord_check.png")
        return EXIT_CODES[check.outcome()]


@dataclasses.dataclass(frozen=True)
class Transfer:
    """Sweep the learning rate over widths, with muP and without.

    Reports how the optimum moves with the width, and the cost of keeping that of the narrowest
    model. A sweep that was interrupted resumes when the same command is run again. Exit code 0 if
    the learning rate transfers under muP, 1 if it does not, 3 if the noise is too large to tell or
    the standard parametrization, the control, does not differ.
    """

    directory: Directory = Path("transfer")
    """Directory for the runs, transfer.json and transfer.png."""
    models: OmitArgPrefixes[Models] = dataclasses.field(default_factory=Models)
    steps: int = 150
    """Training steps of every run: a tenth of warmup, then linear decay to zero."""

    def run(self) -> int:
        from btlm_jax.mup_study import transfer, transfer_report

        if self.steps < 2:
            raise ValueError(f"--steps: found {self.steps}, expected at least 2")
        check_output(self.directory / "transfer.json")
        check_output(self.directory / "transfer.png")
        family, corpus = self.models.build()
        sweep = transfer.transfer(
            self.directory,
            family,
            corpus,
            steps=self.steps,
            seeds=self.models.seeds,
            batch_size=self.models.batch_size,
            length=self.models.length,
        )
        print("\n".join(transfer_report.transfer_table(sweep)))
        print(f"written to {self.directory}: transfer.json, transfer.png")
        return EXIT_CODES[sweep.outcome()]
