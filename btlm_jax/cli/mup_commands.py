"""Subcommands on muP: coord-check, transfer."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from tyro.conf import OmitArgPrefixes, Positional

from btlm_jax.cli.arguments import check_output, write_json

if TYPE_CHECKING:
    from btlm_jax.mup_study.corpus import Corpus
    from btlm_jax.mup_study.parametrization import Family


@dataclasses.dataclass(frozen=True)
class Models:
    """What is trained, in every width."""

    widths: tuple[int, ...] = (64, 128, 256, 512)
    """Of the models; the first is muP's base, at which all parametrizations are the same model."""
    heads: int = 4
    """At every width: the head dimension grows, or a wrong scale of attention would stay unseen."""
    layers: int = 2
    """Of every model."""
    model: str | None = None
    """A preset or a config.json whose other fields to take; default a BTLM in small."""
    data: Path | None = None
    """A directory of `btlm tokenize`; default the bytes of Python's language reference."""
    batch_size: int = 8
    """Sequences per step."""
    length: int = 64
    """Tokens per sequence."""
    seeds: int = 2
    """Of weights, and in `transfer` of batches; sizes and losses are means over them."""

    def made(self) -> tuple[Family, Corpus]:
        """The models' family, and what they are trained on."""
        from btlm_jax.config import BTLMConfig
        from btlm_jax.mup_study import corpus as corpus_lib
        from btlm_jax.mup_study import parametrization
        from btlm_jax.presets import PRESETS

        for name in ("heads", "layers", "batch_size", "length", "seeds"):
            if getattr(self, name) < 1:
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag}: found {getattr(self, name)}, expected at least 1")
        base = None
        if self.model is not None:
            known = self.model in PRESETS
            base = BTLMConfig.preset(self.model) if known else BTLMConfig.from_hf(self.model)
        corpus = corpus_lib.read(self.data, self.length)
        shape = parametrization.shape(corpus.vocab_size, self.layers, self.heads, base)
        family = parametrization.Family(shape, self.widths)
        print(f"training on {corpus.name}: batches of {self.batch_size} x {self.length} tokens, "
              f"seeds: {self.seeds}", flush=True)  # fmt: skip
        return family, corpus


@dataclasses.dataclass(frozen=True)
class CoordCheck:
    """Check that what a model computes changes by amounts that do not depend on its width, as muP
    promises; beside it run models with a broken rule, which must be found out.

    Exit code 1 if muP fails, or a broken rule passes.
    """

    directory: Positional[Path] = Path("coord-check")
    """For coord_check.json and coord_check.png."""
    models: OmitArgPrefixes[Models] = dataclasses.field(default_factory=Models)
    steps: int = 10
    """To train before activations are compared."""
    learning_rate: float | None = None
    """Of embeddings; near the best one, or nothing follows. Default 2^-6.25."""
    faults: bool = True
    """Also break every rule of muP on its own; without, only the standard parametrization."""

    def run(self) -> int:
        from btlm_jax.mup_study import coord_check
        from btlm_jax.utils import plots

        plots.require_matplotlib()
        numbers, picture = (self.directory / f"coord_check.{kind}" for kind in ("json", "png"))
        check_output(numbers)
        check_output(picture)
        if self.steps < 1:
            raise ValueError(f"--steps: found {self.steps}, expected at least 1")
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise ValueError(f"--learning-rate: found {self.learning_rate}, expected more than 0")
        family, corpus = self.models.made()
        found = coord_check.coord_check(
            family,
            corpus,
            parametrizations=coord_check.ALL if self.faults else ("muP", "SP"),
            learning_rate=self.learning_rate or coord_check.LEARNING_RATE,
            steps=self.steps,
            seeds=self.models.seeds,
            batch_size=self.models.batch_size,
            length=self.models.length,
        )
        print("\n".join(coord_check.table(found)))
        write_json(numbers, coord_check.to_json(found))
        coord_check.draw(picture, found)
        print(f"made in {self.directory}: coord_check.json, coord_check.png")
        return int(not all(good for good, _ in coord_check.verdicts(found)))


@dataclasses.dataclass(frozen=True)
class Transfer:
    """Sweep the learning rate over widths, under muP and in the standard parametrization: where the
    optimum goes, and what it costs to keep that of the narrowest.

    Killed or stopped, the same command goes on. Exit code 1 if muP does not transfer, or if the
    standard parametrization does, so that the sweep tells nothing.
    """

    directory: Positional[Path] = Path("transfer")
    """For the runs, transfer.json and transfer.png."""
    models: OmitArgPrefixes[Models] = dataclasses.field(default_factory=Models)
    steps: int = 150
    """Of every run: a tenth of warmup, then linearly to zero."""

    def run(self) -> int:
        from btlm_jax.mup_study import transfer

        if self.steps < 2:
            raise ValueError(f"--steps: found {self.steps}, expected at least 2")
        check_output(self.directory / "transfer.json")
        check_output(self.directory / "transfer.png")
        family, corpus = self.models.made()
        found = transfer.transfer(
            self.directory,
            family,
            corpus,
            steps=self.steps,
            seeds=self.models.seeds,
            batch_size=self.models.batch_size,
            length=self.models.length,
        )
        print("\n".join(transfer.table(found)))
        print(f"made in {self.directory}: transfer.json, transfer.png")
        return int(not all(good for good, _ in transfer.verdicts(found)))
