"""The command that compiles for accelerators that are not attached."""

from __future__ import annotations

import dataclasses
import logging
import os
import re
from typing import Annotated, Any, Literal

from tyro.conf import arg

from btlm_jax.checkpoint.schemes import SCHEME_HELP
from btlm_jax.cli.arguments import (
    Number,
    Overrides,
    Scheme,
    is_given,
    option_of,
    refuse_ignored_options,
    write_json,
)
from btlm_jax.cli.path_arguments import InputFile, OutputFile, RecipeName
from btlm_jax.utils.format import join_first

logger = logging.getLogger(__name__)

# Options that only refine others.
_NEEDS = {
    "quantize": ("decode",),
    "cache_dtype": ("decode",),
    "keep": ("fit",),
    "attempts": ("fit", "table"),
    "jobs": ("fit", "table"),
}
# Values of a recipe that the search chooses, and those that the compiled programs depend on.
_SEARCHED = re.compile(r"mesh\..*|phases\.\d+\.microbatch|run\.(remat|tokens_per_device)")
_READ_BY_DECODING = re.compile(r"model\.(?!init_truncation)|mesh\.|run\.(compute_dtype|attention)$")
_READ_BY_TRAINING = re.compile(
    r"model\.(?!init_truncation)|mesh\.|phases\.|optimizer\.|data\.mask_documents$"
    r"|run\.(compute_dtype|attention|remat|offload_optimizer|tokens_per_device)$"
)


@dataclasses.dataclass(frozen=True)
class Compile:
    """Compile a recipe for accelerators that are not attached.

    Prints the memory per device against its capacity, the collectives of the compiled program, and
    a lower bound of the step time (roofline). Every phase of the recipe is compiled. TPUs need
    libtpu (`pip install 'btlm-jax[tpu]'`) and no TPU; h200 needs `pip install 'jax[cuda13]'` and no
    GPU.
    """

    recipe: RecipeName = "btlm-3b-8k"
    """The name of a recipe of the package, or a TOML file; its data need not exist."""
    topology: Annotated[str, arg(metavar="TOPOLOGY")] = "v5e:4x4"
    """Chips along each dimension: v4:2x2x2, v5e:4x4, v5p:2x2x2, v6e:4x4, tpu7x:2x2x1, h200:8; or
    v5e-16, v5p-8 (v4 and v5p in cores, as Google names them)."""
    slices: Annotated[int, arg(metavar="N")] = 1
    """Number of such slices, joined by the data center network."""
    set: Overrides = ()
    """Override a value of the recipe. May be repeated."""
    phase: Number = None
    """Compile this phase of the recipe, from 0; by default all."""
    decode: bool = False
    """Compile a decoding step instead."""
    batch_size: Number = None
    """With --decode: sequences over all devices; default 16. (For training: --set
    phases.0.batch_size=N.)"""
    capacity: Number = None
    """With --decode: slots of the KV cache; default 8192."""
    quantize: Annotated[
        Scheme, arg(help=f"With --decode: quantize the weights, {SCHEME_HELP}; default bf16.")
    ] = None
    cache_dtype: Literal["int8"] | None = None
    """With --decode: dtype of the KV cache; default bf16."""
    fit: bool = False
    """Search microbatch, remat and mesh for the lowest bound that fits, and compile that."""
    keep: Annotated[int, arg(metavar="N")] = 3
    """With --fit: stop after this many that fit."""
    attempts: Annotated[int, arg(metavar="N")] = 12
    """With --fit and --table: compile at most this many."""
    jobs: Annotated[int, arg(metavar="N")] = max(1, (os.cpu_count() or 2) // 2)
    """With --fit and --table: compile this many at a time."""
    save: OutputFile = None
    """A new file for the executable, which `btlm_jax.train.aot.executables` loads."""
    json: OutputFile = None
    """A file for the reports."""
    table: InputFile = None
    """Search every topology of the table in docs/ahead-of-time.md, and write the table between its
    markers in this file."""

    def run(self) -> None:
        from btlm_jax.train import recipe_file
        from btlm_jax.train.aot import fit_table, topologies

        self._refuse_ignored_options()
        topologies.prepare_compiler()
        recipe = recipe_file.load_recipe(self.recipe, self.set)
        self._name_ignored_overrides()
        if self.table is not None:
            lines = fit_table.write_fit_table(
                self.table, recipe, attempts=self.attempts, jobs=self.jobs
            )
            print("\n".join(lines))
            return
        topology = topologies.parse_topology(self.topology, self.slices)
        if self.decode:
            write_json(self.json, [self._compile_decoding(recipe, topology)])
        else:
            write_json(self.json, self._compile_phases(recipe, topology))

    def _refuse_ignored_options(self) -> None:
        if self.table is not None:
            kept = ("recipe", "set", "attempts", "jobs", "table")
            for name in (f.name for f in dataclasses.fields(self)):
                if name not in kept and is_given(self, name):
                    raise ValueError(
                        f"--table: found {option_of(name)} too, which it ignores: remove one"
                    )
        if self.decode and (self.fit or self.phase is not None):
            option = "--fit" if self.fit else "--phase"
            raise ValueError(f"--decode: found {option} too, which is for training: remove one")
        for name in ("batch_size", "capacity"):
            if is_given(self, name) and not self.decode:
                raise ValueError(
                    f"{option_of(name)} needs --decode; for training set the sizes of the "
                    "recipe: --set phases.0.batch_size=N, --set phases.0.length=N"
                )
        refuse_ignored_options(self, _NEEDS)
        if self.fit or self.table is not None:
            for key in filter(_SEARCHED.fullmatch, self._overridden()):
                option = "--fit" if self.fit else "--table"
                raise ValueError(f"--set {key}: found {option} too, which searches it: remove one")

    def _name_ignored_overrides(self) -> None:
        """Logs the overrides that have no influence on the program."""
        read = _READ_BY_DECODING if self.decode else _READ_BY_TRAINING
        if ignored := [key for key in self._overridden() if not read.match(key)]:
            step = "a decoding step" if self.decode else "the training step"
            logger.warning(
                "--set %s does nothing here: it does not change the program of %s",
                join_first(ignored, 4), step,
            )  # fmt: skip

    def _overridden(self) -> list[str]:
        return [override.partition("=")[0].strip() for override in self.set]

    def _compile_decoding(self, recipe: Any, topology: Any) -> dict[str, Any]:
        from btlm_jax.checkpoint.quantization import Quantization
        from btlm_jax.train.aot import compile, compile_report, executables

        if self.save is not None:
            executables.require_new_file(self.save)
        report = compile.compile_decoding(
            recipe,
            topology,
            batch_size=16 if self.batch_size is None else self.batch_size,
            capacity=8192 if self.capacity is None else self.capacity,
            quantize=None if self.quantize is None else Quantization.parse(self.quantize),
            cache_dtype=self.cache_dtype,
            save=self.save,
        )
        print("\n".join(compile_report.format_compile_report(report)))
        return report

    def _compile_phases(self, recipe: Any, topology: Any) -> list[dict[str, Any]]:
        from btlm_jax.train.aot import compile, compile_report, executables
        from btlm_jax.train.aot.fit import fit_phase

        phases = range(len(recipe.phases)) if self.phase is None else [self.phase]
        if self.save is not None:
            executables.require_new_file(self.save)
            if self.fit or len(phases) > 1:
                raise ValueError(
                    "--save: found several programs to save, expected one: select it with "
                    "--phase and remove --fit"
                )
        reports = []
        for index in phases:
            if not self.fit:
                reports.append(compile.compile_phase(recipe, index, topology, self.save))
                lines = compile_report.format_compile_report(reports[-1])
            else:
                fits = fit_phase(
                    recipe, index, topology, keep=self.keep, attempts=self.attempts, jobs=self.jobs
                )
                reports += fits
                lines = compile_report.format_fit_table(fits, [topology.name] * len(fits))
                lines += compile_report.format_compile_report(fits[0])
                lines.append("best: " + " ".join(f"--set {s}" for s in fits[0]["settings"]))
            print("\n".join(lines), flush=True)
        return reports
