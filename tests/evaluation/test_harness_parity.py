"""The numbers of lm-evaluation-harness's Hugging Face backend, from our adapter.

`golden/harness.json` holds what that backend was asked and answered on two exported snapshots. Our
adapter is held against it wherever lm-eval (extra `eval`) is installed; the slow test asks the
backend again, which takes torch, transformers and accelerate too. With all of them,
`JAX_PLATFORMS=cpu python tests/evaluation/test_harness_parity.py` records the answers anew.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from tokenizers import AddedToken, Tokenizer, decoders, models

import btlm_jax as btlm
from btlm_jax import BTLM, BTLMConfig
from btlm_jax.convert import convert, export
from btlm_jax.evaluation import harness
from btlm_jax.model import weights
from btlm_jax.model.params import Params, unflatten_tree
from support import golden, gpt2, reference_numpy
from support.harness_tasks import TASKS, write_tasks

lm_eval = pytest.importorskip("lm_eval")

RECORDED = golden.GOLDEN / "harness.json"
SHOTS = (None, 2)

# Two models --------------------------------------------------------------------------------------


def write_tokenizer(home: Path) -> None:
    """Writes a tokenizer of 96 characters; EOS is 96, as in the golden cases."""
    tokens = [chr(c) for c in range(32, 127)] + ["\n"]
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, []))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
    assert tokenizer.token_to_id("<|endoftext|>") == 96
    tokenizer.save(str(home / "tokenizer.json"))


def write_gpt2(home: Path) -> None:
    """A GPT-2, which is a BTLM with learned positions, gelu_new and without muP."""
    sizes = gpt2.SIZES | dict(vocab_size=97)
    ends = dict(bos_token_id=96, eos_token_id=96)
    config = BTLMConfig.from_hf(
        {"model_type": "btlm", "position_embedding_type": "learned",
         "activation_function": "gelu_new", **sizes, **gpt2.DROPOUT, **ends}
    )  # fmt: skip
    # Of this seed texts differ, and one is ended by a text; the stream never changes.
    rng = np.random.RandomState(17)
    flat = {
        w.path: rng.normal(0, 0.35, weights.stacked_shape(w, config, {})).astype(np.float32)
        for w in weights.weight_table(config)
    }
    write_tokenizer(home)
    assets = [home / "tokenizer.json"]
    btlm.save(home / "checkpoint", config, unflatten_tree(flat), assets=assets)


def write_btlm(home: Path) -> None:
    """A golden model of the original code, converted."""
    source = golden.write_hf(home / "source", golden.load("a2_btlm_mup_h32"))
    write_tokenizer(source)
    convert(source, home / "checkpoint")


WRITERS = {"gpt2": write_gpt2, "btlm": write_btlm}


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model of ours as a checkpoint, and loaded to compute in float32."""

    name: str
    checkpoint: Path
    model: BTLM
    params: Params
    tokenizer: Tokenizer

    def greedy(self, question: str) -> str:
        """A continuation that ought to be greedy for the backend too."""
        ids = np.array([self.tokenizer.encode(question).ids])
        how = dict(max_new_tokens=4, eos_token_id=None)
        found = btlm.generate(self.model, self.params, ids, **how)[0, ids.size :]
        return self.tokenizer.decode(found.tolist()) or "a"


def subject(name: str, home: Path) -> Subject:
    WRITERS[name](home)
    checkpoint = home / "checkpoint"
    loaded = btlm.load(checkpoint, dtype="float32")
    return Subject(name, checkpoint, *loaded, btlm.load_tokenizer(checkpoint))


# Two sources of answers --------------------------------------------------------------------------


def of_the_adapter(of: Subject, tasks: Path, num_fewshot: int | None) -> dict[str, Any]:
    model, params = of.model, of.params
    lm = harness.make_language_model(
        model.config, of.tokenizer, lambda: (model, params), batch_size=4
    )
    return answers(lm, lm._length, tasks, num_fewshot)


def of_the_backend(of: Subject, tasks: Path, num_fewshot: int | None) -> dict[str, Any]:
    import transformers
    from lm_eval.models.huggingface import HFLM

    exported = of.checkpoint.with_name("exported")
    export(of.checkpoint, exported, overwrite=True)
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(exported / "tokenizer.json"),
        **dict.fromkeys(("bos_token", "eos_token", "pad_token"), "<|endoftext|>"),
    )
    model = {"gpt2": as_gpt2, "btlm": as_witness}[of.name](exported)
    # Of GPT-2 they pad on the left, and give positions that leave the padding out.
    lm = HFLM(pretrained=model, tokenizer=wrapped, batch_size=1)
    return answers(lm, lm.max_length, tasks, num_fewshot)


def answers(lm: Any, length: int, folder: Path, num_fewshot: int | None) -> dict[str, Any]:
    """What a language model of lm-eval makes of the tasks, as JSON has it.

    Returns:
      Its end, its prefix, its length, and of each task the metrics and samples: what was asked, the
      right answer, and the model's: log-likelihood (nats) and greedy flag, or the one, or text.
    """
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    how = dict(task_manager=manager, num_fewshot=num_fewshot, bootstrap_iters=0)
    found = lm_eval.simple_evaluate(model=lm, tasks=list(TASKS), **how)
    tasks = {}
    for name in TASKS:
        results = {k: v for k, v in found["results"][name].items() if isinstance(v, float)}
        samples = [
            {"arguments": s["arguments"], "target": s["target"], "responses": s["resps"]}
            for s in found["samples"][name]
        ]
        tasks[name] = {"results": results, "samples": samples}
    ends = {"eot_token_id": lm.eot_token_id, "prefix_token_id": lm.prefix_token_id}
    return json.loads(json.dumps({**ends, "max_length": length, "tasks": tasks}))


def as_gpt2(exported: Path):
    import torch
    import transformers

    config = json.loads((exported / "config.json").read_text())
    known = [*gpt2.SIZES, *gpt2.DROPOUT, "bos_token_id", "eos_token_id"]
    own = transformers.GPT2Config(**{name: config[name] for name in known})
    model = transformers.GPT2LMHeadModel(own).eval()
    named = load_file(exported / "model.safetensors")
    loaded = model.load_state_dict({k: torch.tensor(v) for k, v in named.items()}, strict=False)
    assert loaded.missing_keys == ["lm_head.weight"] and not loaded.unexpected_keys  # it is tied
    return model


def as_witness(exported: Path):
    """The float64 witness in transformers' clothes: the original's code is on the Hub only."""
    import torch
    import transformers
    from transformers.modeling_outputs import CausalLMOutput

    config = json.loads((exported / "config.json").read_text())
    named = {
        name: x.astype(np.float64) for name, x in load_file(exported / "model.safetensors").items()
    }

    class Witness(transformers.PreTrainedModel, transformers.GenerationMixin):
        config_class = transformers.PretrainedConfig

        def __init__(self, config):
            super().__init__(config)
            self.place = torch.nn.Parameter(torch.zeros(1))
            self.post_init()

        def forward(self, input_ids, attention_mask=None, **_):
            mask = None if attention_mask is None else attention_mask.numpy()
            ids = input_ids.numpy()
            found = reference_numpy.forward(named, config, ids, attention_mask=mask)
            return CausalLMOutput(logits=torch.tensor(found["logits"]))

        def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **_):
            return dict(input_ids=input_ids, attention_mask=attention_mask)

    ends = dict(bos_token_id=96, eos_token_id=96)
    sizes = {k: config[k] for k in ("vocab_size", "n_positions")}
    sizes["num_hidden_layers"] = config["n_layer"]  # for a cache, which is never used
    return Witness(transformers.PretrainedConfig(**sizes, **ends)).eval()


# One comparison ----------------------------------------------------------------------------------


def run_name(num_fewshot: int | None) -> str:
    return f"{num_fewshot or 0}-shot"


def recorded() -> dict[str, Any]:
    """What answered; of each model its greedy texts by question, and the backend's answers."""
    return json.loads(RECORDED.read_text())


def compare(found: dict[str, Any], name: str, num_fewshot: int | None) -> None:
    """Holds a model's answers against the recorded ones."""
    record = recorded()
    expected = record["models"][name]["runs"][run_name(num_fewshot)]
    made_by = ", ".join(map(" ".join, record["made_by"].items()))
    for what in ("eot_token_id", "prefix_token_id", "max_length"):
        assert found[what] == expected[what], what
    flags = set()
    for task, theirs in expected["tasks"].items():
        own = found["tasks"][task]
        for got, wanted in zip(own["samples"], theirs["samples"], strict=True):
            for what in ("arguments", "target"):
                assert got[what] == wanted[what], (
                    f"{task}: {what} are not those recorded with {made_by}: the documents or what "
                    "lm-eval makes of them changed; if rightly so, record anew (see the module)"
                )
            for mine, yours in zip(got["responses"], wanted["responses"], strict=True):
                check(task, wanted["arguments"], mine[0], yours[0], flags)
        assert own["results"] == pytest.approx(theirs["results"], rel=1e-4), task
    assert flags == {True, False}


def check(task: str, asked: Any, got: Any, expected: Any, flags: set[bool]) -> None:
    """Holds one answer against another; `flags` takes whether it is greedy."""
    if task == "local_continue":
        assert got == expected, f"greedy text after {asked}"
        return
    if task != "local_text":
        assert got[1] == expected[1], f"whether the text is greedy: {asked}"
        flags.add(got[1])
        got, expected = got[0], expected[0]
    # fp32 logits of both are off by up to 5e-5, a term of the sum by twice that, and there are
    # up to 200; errors of other signs cancel.
    assert abs(got - expected) < 2e-3, asked


@pytest.fixture(scope="module", params=WRITERS)
def of(request, tmp_path_factory) -> Subject:
    """Each of the two models."""
    return subject(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture
def tasks(of, tmp_path) -> Path:
    """The tasks that were recorded, whatever the model says by now."""
    said = recorded()["models"][of.name]["greedy"]
    # A question that was not recorded differs from what was: `compare` says so.
    return write_tasks(tmp_path / "tasks", lambda question: said.get(question, "?"))


@pytest.mark.parametrize("num_fewshot", SHOTS)
def test_the_recorded_numbers_of_the_hugging_face_backend(of, tasks, num_fewshot):
    compare(of_the_adapter(of, tasks, num_fewshot), of.name, num_fewshot)


@pytest.mark.slow
@pytest.mark.parametrize("num_fewshot", SHOTS)
def test_the_backend_still_answers_as_recorded(of, tasks, num_fewshot):
    for name in ("torch", "transformers", "accelerate"):
        pytest.importorskip(name)
    compare(of_the_backend(of, tasks, num_fewshot), of.name, num_fewshot)


def to_record(name: str) -> dict[str, Any]:
    """Of a model, what `recorded` holds."""
    greedy: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as home:
        of = subject(name, Path(home))
        tasks = write_tasks(Path(home, "tasks"), lambda q: greedy.setdefault(q, of.greedy(q)))
        runs = {run_name(n): of_the_backend(of, tasks, n) for n in SHOTS}
    return {"greedy": greedy, "runs": runs}


def record() -> None:
    """Writes the recorded answers anew."""
    made_by = {name: version(name) for name in ("lm-eval", "transformers", "torch")}
    made = {"made_by": made_by, "models": {name: to_record(name) for name in WRITERS}}
    RECORDED.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    record()
