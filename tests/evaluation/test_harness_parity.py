"""Our adapter gives the numbers of lm-evaluation-harness's Hugging Face backend.

`golden/harness.json` records the requests and answers of that backend on two exported snapshots.
Our adapter is compared with it wherever lm-eval (extra `eval`) is installed; the slow test runs the
backend again, which needs torch, transformers and accelerate too. With all of them,
`JAX_PLATFORMS=cpu python tests/evaluation/test_harness_parity.py` records the answers again.
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
    """Writes a GPT-2: a BTLM with learned positions and gelu_new, without muP."""
    sizes = gpt2.SIZES | dict(vocab_size=97)
    ends = dict(bos_token_id=96, eos_token_id=96)
    config = BTLMConfig.from_hf(
        {"model_type": "btlm", "position_embedding_type": "learned",
         "activation_function": "gelu_new", **sizes, **gpt2.DROPOUT, **ends}
    )  # fmt: skip
    # With this seed the texts differ, and a stop text ends one; the stream never changes.
    rng = np.random.RandomState(17)
    flat = {
        w.path: rng.normal(0, 0.35, weights.stacked_shape(w, config, {})).astype(np.float32)
        for w in weights.weight_table(config)
    }
    write_tokenizer(home)
    assets = [home / "tokenizer.json"]
    btlm.save(home / "checkpoint", config, unflatten_tree(flat), assets=assets)


def write_btlm(home: Path) -> None:
    """Writes a golden model of the original code, converted."""
    source = golden.write_hf(home / "source", golden.load("a2_btlm_mup_h32"))
    write_tokenizer(source)
    convert(source, home / "checkpoint")


WRITERS = {"gpt2": write_gpt2, "btlm": write_btlm}


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model as a checkpoint, and loaded to compute in float32."""

    name: str
    checkpoint: Path
    model: BTLM
    params: Params
    tokenizer: Tokenizer

    def greedy(self, question: str) -> str:
        """Returns a continuation that should be greedy for the backend too."""
        ids = np.array([self.tokenizer.encode(question).ids])
        options = dict(max_new_tokens=4, eos_token_id=None)
        continuation = btlm.generate(self.model, self.params, ids, **options)[0, ids.size :]
        return self.tokenizer.decode(continuation.tolist()) or "a"


def make_subject(name: str, home: Path) -> Subject:
    WRITERS[name](home)
    checkpoint = home / "checkpoint"
    loaded = btlm.load(checkpoint, dtype="float32")
    return Subject(name, checkpoint, *loaded, btlm.load_tokenizer(checkpoint))


# Two sources of answers --------------------------------------------------------------------------


def adapter_answers(subject: Subject, tasks: Path, num_fewshot: int | None) -> dict[str, Any]:
    model, params = subject.model, subject.params
    lm = harness.make_language_model(
        model.config, subject.tokenizer, lambda: (model, params), batch_size=4
    )
    return answers(lm, lm._length, tasks, num_fewshot)


def backend_answers(subject: Subject, tasks: Path, num_fewshot: int | None) -> dict[str, Any]:
    import transformers
    from lm_eval.models.huggingface import HFLM

    exported = subject.checkpoint.with_name("exported")
    export(subject.checkpoint, exported, overwrite=True)
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(exported / "tokenizer.json"),
        **dict.fromkeys(("bos_token", "eos_token", "pad_token"), "<|endoftext|>"),
    )
    model = {"gpt2": as_gpt2, "btlm": as_witness}[subject.name](exported)
    # They pad GPT-2 on the left, with positions that skip the padding.
    lm = HFLM(pretrained=model, tokenizer=wrapped, batch_size=1)
    return answers(lm, lm.max_length, tasks, num_fewshot)


def answers(lm: Any, length: int, folder: Path, num_fewshot: int | None) -> dict[str, Any]:
    """Returns the answers of a language model of lm-eval, as a JSON object.

    It has the EOS, the prefix, the length, and for each task the metrics and samples. A sample has
    the request, the right answer, and the model's: log-likelihood (nats) and greedy flag,
    log-likelihood alone, or text.
    """
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    options = dict(task_manager=manager, num_fewshot=num_fewshot, bootstrap_iters=0)
    evaluation = lm_eval.simple_evaluate(model=lm, tasks=list(TASKS), **options)
    tasks = {}
    for name in TASKS:
        results = {k: v for k, v in evaluation["results"][name].items() if isinstance(v, float)}
        samples = [
            {"arguments": s["arguments"], "target": s["target"], "responses": s["resps"]}
            for s in evaluation["samples"][name]
        ]
        tasks[name] = {"results": results, "samples": samples}
    ends = {"eot_token_id": lm.eot_token_id, "prefix_token_id": lm.prefix_token_id}
    return json.loads(json.dumps({**ends, "max_length": length, "tasks": tasks}))


def as_gpt2(exported: Path):
    import torch
    import transformers

    config = json.loads((exported / "config.json").read_text())
    known = [*gpt2.SIZES, *gpt2.DROPOUT, "bos_token_id", "eos_token_id"]
    gpt2_config = transformers.GPT2Config(**{name: config[name] for name in known})
    model = transformers.GPT2LMHeadModel(gpt2_config).eval()
    named = load_file(exported / "model.safetensors")
    loaded = model.load_state_dict({k: torch.tensor(v) for k, v in named.items()}, strict=False)
    assert loaded.missing_keys == ["lm_head.weight"] and not loaded.unexpected_keys  # it is tied
    return model


def as_witness(exported: Path):
    """Wraps the float64 witness as a transformers model: the original code is only on the Hub."""
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
            outputs = reference_numpy.forward(named, config, ids, attention_mask=mask)
            return CausalLMOutput(logits=torch.tensor(outputs["logits"]))

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
    """Returns the versions, and for each model its greedy texts and the backend's answers."""
    return json.loads(RECORDED.read_text())


def compare(answered: dict[str, Any], name: str, num_fewshot: int | None) -> None:
    """Compares a model's answers with the recorded ones."""
    record = recorded()
    expected = record["models"][name]["runs"][run_name(num_fewshot)]
    made_by = ", ".join(map(" ".join, record["made_by"].items()))
    for attribute in ("eot_token_id", "prefix_token_id", "max_length"):
        assert answered[attribute] == expected[attribute], attribute
    flags = set()
    for task, theirs in expected["tasks"].items():
        ours = answered["tasks"][task]
        for got, wanted in zip(ours["samples"], theirs["samples"], strict=True):
            for attribute in ("arguments", "target"):
                assert got[attribute] == wanted[attribute], (
                    f"{task}: {attribute} are not those recorded with {made_by}: the documents or "
                    "lm-eval's templates changed; if intended, record again (see the module)"
                )
            for mine, yours in zip(got["responses"], wanted["responses"], strict=True):
                check(task, wanted["arguments"], mine[0], yours[0], flags)
        assert ours["results"] == pytest.approx(theirs["results"], rel=1e-4), task
    assert flags == {True, False}


def check(task: str, request: Any, answer: Any, expected: Any, flags: set[bool]) -> None:
    """Compares an answer with the expected one, and adds its greedy flag to `flags`."""
    if task == "local_continue":
        assert answer == expected, f"greedy text after {request}"
        return
    if task != "local_text":
        assert answer[1] == expected[1], f"whether the text is greedy: {request}"
        flags.add(answer[1])
        answer, expected = answer[0], expected[0]
    # fp32 logits of both are off by up to 5e-5, a term of the sum by twice that, and there are
    # up to 200; errors of other signs cancel.
    assert abs(answer - expected) < 2e-3, request


@pytest.fixture(scope="module", params=WRITERS)
def subject(request, tmp_path_factory) -> Subject:
    """Each of the two models."""
    return make_subject(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture
def tasks(subject, tmp_path) -> Path:
    """The recorded tasks, whatever the model answers now."""
    greedy = recorded()["models"][subject.name]["greedy"]
    # `compare` reports a question that was not recorded.
    return write_tasks(tmp_path / "tasks", lambda question: greedy.get(question, "?"))


@pytest.mark.parametrize("num_fewshot", SHOTS)
def test_answers_equal_the_recorded_ones_of_the_hugging_face_backend(subject, tasks, num_fewshot):
    compare(adapter_answers(subject, tasks, num_fewshot), subject.name, num_fewshot)


@pytest.mark.slow
@pytest.mark.parametrize("num_fewshot", SHOTS)
def test_the_backend_still_answers_as_recorded(subject, tasks, num_fewshot):
    for name in ("torch", "transformers", "accelerate"):
        pytest.importorskip(name)
    compare(backend_answers(subject, tasks, num_fewshot), subject.name, num_fewshot)


def to_record(name: str) -> dict[str, Any]:
    """Returns the record of a model."""
    greedy: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as home:
        subject = make_subject(name, Path(home))
        tasks = write_tasks(Path(home, "tasks"), lambda q: greedy.setdefault(q, subject.greedy(q)))
        runs = {run_name(n): backend_answers(subject, tasks, n) for n in SHOTS}
    return {"greedy": greedy, "runs": runs}


def record() -> None:
    """Records the answers again."""
    made_by = {name: version(name) for name in ("lm-eval", "transformers", "torch")}
    contents = {"made_by": made_by, "models": {name: to_record(name) for name in WRITERS}}
    RECORDED.write_text(json.dumps(contents, indent=1) + "\n")


if __name__ == "__main__":
    record()
