"""The subcommand that runs tasks of lm-evaluation-harness."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from btlm_jax.cli.arguments import Overrides, mesh_from_overrides
from btlm_jax.cli.path_arguments import Checkpoint, CommaSeparatedNames, InputDirectory, PathRule


@dataclasses.dataclass(frozen=True)
class EvalHarness:
    """Run tasks of EleutherAI's lm-evaluation-harness, with the numbers of its Hugging Face
    backend.

    Answers are written to FILE.partial of --json as they come. After a kill, the same command
    resumes, also with other tasks of the same checkpoint. Needs the extra `eval`.
    """

    checkpoint: Checkpoint
    """An Orbax checkpoint with a tokenizer: a directory, or a gs:// URL."""
    tasks: CommaSeparatedNames
    """Names of tasks, groups or tags, or YAML files, separated by commas; * matches any."""
    json: Annotated[Path, arg(metavar="FILE"), PathRule(file=True, written=True)]
    """The file for the numbers."""
    include_path: InputDirectory = None
    """A folder with your own task files (YAML); the data sets they name may be local files."""
    num_fewshot: int | None = None
    """Examples before each question; default each task's own number."""
    limit: float | None = None
    """Number of documents of each task, or below 1 the fraction of them."""
    max_length: int | None = None
    """Maximum tokens per forward pass, and of a prompt with its continuation; longer inputs are
    truncated on the left. Default the trained context."""
    batch_size: int | None = None
    """Rows per batch, over all devices; default about 8192 tokens on each, and 8 texts that are
    generated."""
    seed: int = 0
    """Seed of tasks that ask for sampling."""
    overwrite: bool = False
    """Replace the file, and the unfinished answers of a run of another checkpoint."""
    dtype: Literal["bfloat16", "float32"] | None = None
    """Dtype of weights and computation; default as stored, computing in the platform's."""
    set: Overrides = ()
    """Split over devices: mesh.data=N, mesh.fsdp=N, mesh.tensor=N; -1 takes those left."""

    def run(self) -> None:
        from btlm_jax.evaluation.checkpoint_harness import checkpoint_harness

        checkpoint_harness(
            self.checkpoint,
            [name.strip() for name in self.tasks.split(",") if name.strip()],
            self.json,
            include_path=self.include_path,
            num_fewshot=self.num_fewshot,
            limit=self.limit,
            max_length=self.max_length,
            batch_size=self.batch_size,
            seed=self.seed,
            overwrite=self.overwrite,
            dtype=self.dtype,
            mesh=mesh_from_overrides(self.set),
            show=print,
        )
