"""A running server of a tiny model, and OpenAI's client for it."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from btlm_jax import Engine
from btlm_jax.serving.chat_template import ChatTemplate

openai = pytest.importorskip("openai")
uvicorn = pytest.importorskip("uvicorn")

KEY = "secret"
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


class RunningServer:
    """A server in a thread of this process."""

    def __init__(self, model, params, tokenizer, limits=16, **sizes):
        from btlm_jax.serving.app import Server, ServerLimits
        from btlm_jax.serving.server_metrics import ServerMetrics
        from btlm_jax.serving.service import EngineService

        arguments = dict(rows=3, max_length=128, chunk=16, queue_size=8) | sizes
        self.engine = Engine(model, params, **arguments)
        self.service = EngineService(self.engine, ServerMetrics())
        server = Server(
            self.service,
            tokenizer,
            model_name="tiny",
            api_key=KEY,
            chat_template=ChatTemplate(TEMPLATE, {}),
            limits=ServerLimits(body_bytes=20_000, body_seconds=2.0, requests=limits),
        )
        self.socket = socket.socket()
        self.socket.bind(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        config = uvicorn.Config(server.app(), log_config=None, timeout_graceful_shutdown=30)
        self.uvicorn = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.uvicorn.run, args=([self.socket],), daemon=True)

    def __enter__(self) -> RunningServer:
        self.thread.start()
        while not self.uvicorn.started:
            time.sleep(0.01)
        return self

    def __exit__(self, *_) -> None:
        self.uvicorn.should_exit = True
        self.thread.join()
        self.service.metrics.close()
        self.socket.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, **options):
        arguments = dict(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0) | options
        return openai.OpenAI(**arguments)

    def async_client(self):
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0)


@pytest.fixture(scope="session")
def server(of_bytes) -> Iterator[RunningServer]:
    with RunningServer(*of_bytes) as running:
        yield running


@pytest.fixture(scope="session")
def client(server):
    return server.client()
