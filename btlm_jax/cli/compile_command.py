"""The subcommand that compiles for machines that are not here."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, UseAppendAction

from btlm_jax.cli.arguments import check_output, write_json


@dataclasses.dataclass(frozen=True)
class Compile:
    """Compile a recipe's training step for TPUs or an H200 that are not here; say what it needs.

    Prints memory per device against what there is, the collectives of the compiled program, and the
    least time a step can take (roofline). Needs libtpu (`pip install 'btlm-jax[tpu]'`) and no TPU,
    or, for h200, `pip install 'jax[cuda13]'` and no GPU. Every phase is compiled.
    """

    recipe: Positional[str] = "btlm-3b-8k"
    """The name of a recipe that comes with btlm, or a TOML file; its data need not be there."""
    topology: str = "v5e:4x4"
    """Chips along each dimension: v4:2x2x2, v5e:4x4, v5p:2x2x2, v6e:4x4, tpu7x:2x2x1, h200:8; or
    v5e-16, v5p-8 (in cores, as Google names them)."""
    slices: int = 1
    """How many of them, joined by the data center's network."""
    set: Annotated[tuple[str, ...], UseAppendAction] = ()
    """A value of the recipe to override, as section.key=value. May be repeated."""
    phase: int | None = None
    """Of the recipe, from 0; default all."""
    decode: bool = False
    """Compile a step of decoding instead."""
    batch_size: int | None = None
    """With --decode: sequences, over all devices; default 16. (Of training: --set
    phases.0.batch_size.)"""
    capacity: int | None = None
    """With --decode: slots of the KV cache; default 8192."""
    quantize: str | None = None
    """With --decode: weights in int8, int4 (in groups of 64) or int4:128; default bf16."""
    cache_dtype: Literal["int8"] | None = None
    """With --decode: of the KV cache; default bf16."""
    fit: bool = False
    """Search microbatch, remat and mesh for what fits with the best bound, and compile that."""
    keep: int = 3
    """With --fit: how many that fit are enough."""
    attempts: int = 12
    """With --fit and --table: how many are compiled at most."""
    jobs: int = max(1, (os.cpu_count() or 2) // 2)
    """With --fit and --table: how many are compiled at a time."""
    save: Path | None = None
    """A new file for the executable, which `btlm_jax.train.aot.executables.load` loads."""
    json: Path | None = None
    """A file for the reports."""
    table: Path | None = None
    """Search every topology of the README's table, and write the table between its markers in this
    file."""

    def run(self) -> None:
        from btlm_jax.train import recipe_file
        from btlm_jax.train.aot import topologies

        self._refuse_what_would_be_ignored()
        check_output(self.json)
        check_output(self.table)
        topologies.prepare()
        recipe = recipe_file.load_recipe(self.recipe, self.set)
        if self.table is not None:
            from btlm_jax.train.aot import fit_table

            table = fit_table.write(self.table, recipe, attempts=self.attempts, jobs=self.jobs)
            print("\n".join(table))
            return
        reports = self._reports(recipe, topologies.parse(self.topology, self.slices))
        write_json(self.json, reports)

    def _refuse_what_would_be_ignored(self) -> None:
        if self.decode and (self.fit or self.phase is not None):
            found = "--fit" if self.fit else "--phase"
            raise ValueError(f"--decode: found {found}, which is of training: give one of them")
        for name in ("quantize", "cache_dtype"):
            if getattr(self, name) is not None and not self.decode:
                raise ValueError(f"--{name.replace('_', '-')} is of --decode: give that too")
        for name in ("batch_size", "capacity"):
            if getattr(self, name) is not None and not self.decode:
                raise ValueError(
                    f"--{name.replace('_', '-')} is of --decode; training's sizes are the "
                    "recipe's: --set phases.0.batch_size=N, --set phases.0.length=N"
                )

    def _reports(self, recipe: Any, topology: Any) -> list[dict[str, Any]]:
        from btlm_jax.checkpoint.quantization import Quantization
        from btlm_jax.train.aot import compile, compile_report, executables
        from btlm_jax.train.aot.fit import fit

        phases = range(len(recipe.phases)) if self.phase is None else [self.phase]
        if self.save is not None:
            executables.require_free(self.save)
            if self.fit or (len(phases) > 1 and not self.decode):
                raise ValueError(
                    "--save: found several programs to save, expected one: name its --phase, "
                    "without --fit"
                )
        reports = []

        def show(report: dict[str, Any]) -> None:
            reports.append(report)
            print("\n".join(compile_report.lines(report)), flush=True)

        if self.decode:
            show(compile.compile_decoding(
                recipe, topology,
                batch_size=16 if self.batch_size is None else self.batch_size,
                capacity=8192 if self.capacity is None else self.capacity,
                quantize=None if self.quantize is None else Quantization.parse(self.quantize),
                cache_dtype=self.cache_dtype,
                save=self.save,
            ))  # fmt: skip
            return reports
        for index in phases:
            if not self.fit:
                show(compile.compile_phase(recipe, index, topology, self.save))
                continue
            best = fit(
                recipe, index, topology, keep=self.keep, attempts=self.attempts, jobs=self.jobs
            )
            reports += best
            print("\n".join(compile_report.table(best, [topology.name] * len(best))))
            print("\n".join(compile_report.lines(best[0])))
            print("best: " + " ".join(f"--set {s}" for s in best[0]["settings"]), flush=True)
        return reports
