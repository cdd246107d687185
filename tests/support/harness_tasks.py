"""Tasks for lm-evaluation-harness, one of each kind, over random text in local files."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

TASKS = {
    "local_choice": """
output_type: multiple_choice
doc_to_text: "{{question}} "
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
""",
    "local_greedy": """
output_type: loglikelihood
doc_to_text: "{{question}}"
doc_to_target: "{{greedy}}"
target_delimiter: ""
num_fewshot: 0
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
""",
    "local_text": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
num_fewshot: 0
metric_list:
  - {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
  - {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}
""",
    "local_continue": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{continued}}"
generation_kwargs: {until: ["\\n", "e"], max_gen_toks: 16, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
""",
}
COMMON = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {folder}/test.jsonl, train: {folder}/train.jsonl}}
  cache_dir: {folder}/cache
training_split: train
fewshot_split: train
test_split: test
"""


def _random_text(r: Random, n: int) -> str:
    """Returns a text of n characters that ends with a letter."""
    start = "".join(r.choice("abcdefghij klmnopqrst.\nuvwxyz") for _ in range(n - 1))
    return start + r.choice("abcdfghijklmnopqrstuvwxyz")


def write_tasks(folder: Path, greedy=None) -> Path:
    """Writes task files and documents. Returns the folder.

    Args:
      folder: the folder to make.
      greedy: returns the model's greedy continuation of a question.
    """
    folder.mkdir()
    for seed, split in enumerate(("test", "train")):
        r, lines = Random(seed), []
        for i in range(6):
            question = _random_text(r, r.choice([6, 20, 45]))
            choices = [_random_text(r, n) for n in ([1, 1, 1] if i % 2 else [3, 1, 12])]
            continued = greedy(question) if greedy and split == "test" else _random_text(r, 3)
            doc = {"question": question, "choices": choices, "answer": i % 3}
            doc |= {
                "greedy": continued if i % 2 else _random_text(r, 5),
                "continued": continued.split("e")[0],
            }
            lines.append(doc | {"text": _random_text(r, r.choice([5, 60, 200]))})
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(COMMON.format(name=name, folder=folder) + text)
    return folder


def run_harness(checkpoint, folder: Path, out: Path, names: str | None = None, **options) -> dict:
    """Runs `btlm eval harness` on all tasks, or those of `names`. Returns the report."""
    from btlm_jax.cli.harness_command import EvalHarness

    names = ",".join(TASKS) if names is None else names
    EvalHarness(str(checkpoint), names, out, include_path=folder, **options).run()
    return json.loads(out.read_text())
