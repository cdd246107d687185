"""The subcommand that runs tasks of lm-evaluation-harness."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from btlm_jax.cli.arguments import Mesh

# Of what lm-eval returns, what does not depend on the machine.
_KEPT = (
    "results", "groups", "group_subtasks", "n-shot", "n-samples", "higher_is_better", "versions",
    "configs",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Harness:
    """Tasks of EleutherAI's lm-evaluation-harness, with the numbers of its Hugging Face backend.

    Answers are kept in FILE.partial of --json as they come; killed, the same command goes on, also
    with other tasks of the same checkpoint. Needs the extra `eval`.
    """

    checkpoint: Positional[str]
    """An Orbax checkpoint that carries a tokenizer: a directory, or a gs:// URL."""
    tasks: str
    """Names of tasks, groups or tags, or YAML files, with commas between them; * matches any."""
    json: Path
    """The file for the numbers."""
    include_path: Path | None = None
    """A folder with task files (YAML) of your own; the data sets they name may be local files."""
    num_fewshot: int | None = None
    """Examples before each question; default each task's own number."""
    limit: float | None = None
    """Take so many documents of each task, or below 1 this part of them."""
    max_length: int | None = None
    """Tokens that are read at once, and of a prompt with its continuation; what is longer is cut
    off on the left. Default the trained context."""
    batch_size: int | None = None
    """Rows at a time, over all devices; default about 8192 tokens on each, and 8 texts that are
    generated."""
    seed: int = 0
    """Of tasks that ask for sampling."""
    overwrite: bool = False
    """Replace the file, and what a run of another checkpoint left unfinished."""
    dtype: Literal["bfloat16", "float32"] | None = None
    """Of weights and computation; default as stored, computing in the platform's."""
    mesh: Mesh = dataclasses.field(default_factory=Mesh)

    def run(self) -> None:
        import logging

        import btlm_jax as btlm
        from btlm_jax.checkpoint import metadata, unstacked
        from btlm_jax.data.tokenizer import check_vocabulary
        from btlm_jax.evaluation import harness, tasks
        from btlm_jax.generation import jsonl

        # Whatever can be refused is, before the weights, which may be large.
        meta = metadata.read_metadata(self.checkpoint)
        tokenizer = btlm.load_tokenizer(self.checkpoint)
        check_vocabulary(tokenizer, meta.config.vocab_size)
        mesh = self.mesh.made()
        names = [name.strip() for name in self.tasks.split(",") if name.strip()]
        limits: dict[str, Any] = dict(num_fewshot=self.num_fewshot, limit=self.limit)
        # Not left to the tasks: what one answers must not depend on the others.
        dtype = self.dtype or unstacked.decoding_dtype(meta, None, mesh)
        model = btlm.BTLM(meta.config, compute_dtype=dtype)
        dtype = str(model.dtype_on(None if mesh is None else mesh.abstract_mesh))
        key = {"checkpoint": jsonl.fingerprint(meta), "dtype": self.dtype, "seed": self.seed}
        key |= {"max_length": self.max_length, "compute_dtype": dtype}
        logging.getLogger("lm_eval").handlers = logging.getLogger("btlm_jax").handlers
        with jsonl.journal(self.json, key, overwrite=self.overwrite) as journal:
            found = tasks.load(names, self.include_path, **limits)

            def load() -> Any:
                model, params = btlm.load(
                    self.checkpoint, dtype=self.dtype, mesh=mesh, unstacked=True
                )
                return dataclasses.replace(model, compute_dtype=dtype), params

            sizes = self.max_length, self.batch_size
            lm = harness.language_model(meta.config, tokenizer, load, *sizes, self.seed, journal)
            results = harness.evaluate(lm, found, **limits)
            report = {"checkpoint": self.checkpoint, "tasks": names, **limits}
            report["compute_dtype"] = dtype
            report |= {name: results[name] for name in _KEPT if name in results}
            jsonl.complete(self.json, harness.to_json(report))
        print(harness.table(results))
