"""lm-evaluation-harness' own client against the server gives what the in-process adapter gives."""

from __future__ import annotations

import numpy as np
import pytest
from serving.conftest import KEY

pytest.importorskip("lm_eval")
pytest.importorskip("tenacity")


def test_log_likelihoods_are_those_of_the_adapter(server, of_bytes, monkeypatch):
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    from btlm_jax.evaluation.harness import RequestAnswerer

    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    client = LocalCompletionsAPI(
        model="tiny", base_url=f"{server.url}/v1/completions", tokenizer_backend="none",
        batch_size=3, max_length=100,
    )  # fmt: skip
    client.tokenizer, client.tokenized_requests = of_bytes[2], True  # ids are sent
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, 256, n).tolist() for n in (3, 9, 17, 40)]
    pairs = [(ids[: 2 + i], ids[2 + i :]) for i, ids in enumerate(texts)]
    found = client._loglikelihood_tokens([(("", ""), *pair) for pair in pairs])
    model, params, tokenizer = of_bytes
    adapter = RequestAnswerer(model.config, tokenizer, lambda: (model, params), max_length=100)
    expected = adapter._loglikelihood_tokens([(("", ""), *pair) for pair in pairs])
    assert [is_greedy for _, is_greedy in found] == [is_greedy for _, is_greedy in expected]
    np.testing.assert_allclose([x for x, _ in found], [x for x, _ in expected], rtol=1e-5)


def test_generated_answers_end_before_the_stop_text(server, monkeypatch):
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    client = LocalCompletionsAPI(
        model="tiny", base_url=f"{server.url}/v1/completions", tokenizer_backend="none",
        max_length=100,
    )  # fmt: skip
    free = server.client().completions.create(
        model="tiny", prompt="hello", max_tokens=12, temperature=0
    )
    text = free.choices[0].text
    stop = next(c for c in text[2:] if c.isprintable() and c not in text[:2])
    request = Instance(
        "generate_until", {}, ("hello", {"until": [stop], "max_gen_toks": 12}), 0, task_name="t"
    )
    assert client.generate_until([request], disable_tqdm=True) == [text[: text.index(stop)]]
