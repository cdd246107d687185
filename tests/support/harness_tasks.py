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
  data_files: {{test: {home}/test.jsonl, train: {home}/train.jsonl}}
  cache_dir: {home}/cache
training_split: train
fewshot_split: train
test_split: test
"""


def _letters(r: Random, n: int) -> str:
    """Text of n characters that ends with a letter."""
    before = "".join(r.choice("abcdefghij klmnopqrst.\nuvwxyz") for _ in range(n - 1))
    return before + r.choice("abcdfghijklmnopqrstuvwxyz")


def write_tasks(home: Path, greedy=None) -> Path:
    """Task files and documents; `greedy` continues a question as the model would."""
    home.mkdir()
    for seed, split in enumerate(("test", "train")):
        r, lines = Random(seed), []
        for i in range(6):
            question = _letters(r, r.choice([6, 20, 45]))
            choices = [_letters(r, n) for n in ([1, 1, 1] if i % 2 else [3, 1, 12])]
            said = greedy(question) if greedy and split == "test" else _letters(r, 3)
            doc = {"question": question, "choices": choices, "answer": i % 3}
            doc |= {"greedy": said if i % 2 else _letters(r, 5), "continued": said.split("e")[0]}
            lines.append(doc | {"text": _letters(r, r.choice([5, 60, 200]))})
        (home / f"{split}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    for name, text in TASKS.items():
        (home / f"{name}.yaml").write_text(COMMON.format(name=name, home=home) + text)
    return home
