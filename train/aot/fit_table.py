"""The table in docs/ahead-of-time.md of settings that fit each topology, made by compiling."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from etils import epath

from btlm_jax.train.aot.compile_report import format_fit_table
from btlm_jax.train.aot.fit import fit_phase
from btlm_jax.train.aot.topologies import parse_topology
from btlm_jax.train.recipe import Recipe
from btlm_jax.utils import atomic
from btlm_jax.utils.local_paths import local_path
from btlm_jax.utils.progress import Progress

# Google's names: v5p-8 and v4-8 are four chips.
TOPOLOGIES = ("v5e-16", "v5e-256", "v5p-8", "v5p-128", "v6e-16", "v4-8", "v4-32")
BEGIN, END = "<!-- btlm compile --table -->", "<!-- end of the table -->"


def write_fit_table(path: Path, recipe: Recipe, *, attempts: int, jobs: int,
                    names: Sequence[str] = TOPOLOGIES) -> list[str]:  # fmt: skip
    """Replaces the text between the markers of a file by a new table.

    The table has a row for every topology and phase. Below it, a list names those that nothing
    fits.

    Args:
      path: the file.
      recipe: the recipe.
      attempts: compiles per row at most.
      jobs: compiles at a time.
      names: the topologies.

    Returns:
      The lines of the table.

    Raises:
      ValueError: the file has no markers.
    """
    path = local_path(path, "path")
    text = path.read_text(encoding="utf-8")
    between = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    if not between.search(text):
        raise ValueError(
            f"{path}: found no {BEGIN} ... {END}: add these markers where the table belongs"
        )
    reports, labels, missing = [], [], []
    with Progress(len(names) * len(recipe.phases), "row", "table", every=0.0) as progress:
        for name in names:
            topology = parse_topology(name)
            for index, phase in enumerate(recipe.phases):
                try:
                    fits = fit_phase(recipe, index, topology, keep=1, attempts=attempts, jobs=jobs)
                except ValueError as e:
                    missing.append(f"{name} at {phase.length}: {e}")
                else:
                    reports.append(fits[0])
                    labels.append(f"{name} ({topology.name})")
                progress.update(1, f"{name}, {phase.length}")
    table = format_fit_table(reports, labels)
    table += ["", *(f"- {line}" for line in missing)] if missing else []
    body = "\n".join((BEGIN, "", *table, "", END))
    atomic.write_text(epath.Path(path), between.sub(lambda _: body, text))
    return table
