"""The command that serves a checkpoint over HTTP."""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
import socket
from typing import Annotated, Literal

from tyro.conf import arg

from btlm_jax.cli.arguments import Bytes, Overrides, mesh_from_overrides
from btlm_jax.cli.path_arguments import Checkpoint, InputFile

logger = logging.getLogger(__name__)

_LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclasses.dataclass(frozen=True)
class Serve:
    """Serve a checkpoint with OpenAI's HTTP interface.

    Routes: /v1/completions, /v1/chat/completions (with a chat template), /v1/models, /health and
    /metrics. SIGTERM ends it after the requests that are running.
    """

    checkpoint: Checkpoint
    """An Orbax checkpoint that contains a tokenizer: a directory, or a gs:// URL."""
    host: str = "127.0.0.1"
    """The address to listen at; only this machine reaches the default."""
    port: int = 8000
    """The port; 0 takes a free one."""
    name: str | None = None
    """The name of the model in requests; default the name of the checkpoint."""
    api_key: str | None = None
    """A key that requests must have; default that in the variable BTLM_API_KEY, if it is set."""
    rows: int = 8
    """Requests that run together."""
    max_length: int | None = None
    """Maximum tokens of a prompt and its continuation; default the model's context."""
    chunk: int = 512
    """Tokens of prompts that are read between two tokens of the running requests."""
    steps: int = 1
    """Tokens that are decoded before the next ones are sent; more cost the host less."""
    queue_size: int = 64
    """Requests that wait for a row; further ones get status 429."""
    max_requests: int = 256
    """Requests at a time, with those that wait; further ones get status 429."""
    max_body: Bytes = 1 << 20
    """Largest body of a request."""
    prefix_cache: Bytes = 1 << 30
    """Memory for the beginnings of prompts, which are read once if prompts share them."""
    chat_template: InputFile = None
    """A Jinja template for chats, instead of the tokenizer's."""
    cache_dtype: Literal["int8"] | None = None
    """Type of the KV cache: int8 takes half the memory of bfloat16; default the compute dtype."""
    dtype: Literal["bfloat16", "float32"] | None = None
    """Type of weights and computation; default as stored, with the platform's compute dtype."""
    drain_seconds: int = 60
    """After SIGTERM, requests that are running may take this long."""
    warm_up: Annotated[bool, arg(help="Compile the usual programs before listening.")] = True
    set: Overrides = ()
    """Split over devices: mesh.data=N, mesh.fsdp=N, mesh.tensor=N; -1 takes those left."""

    def run(self) -> None:
        try:
            import uvicorn

            from btlm_jax.serving.app import Server, ServerLimits
        except ImportError as e:
            raise ValueError(
                f"{e.name} is not installed, which `btlm serve` needs: "
                "pip install 'btlm-jax[serve]'"
            ) from None
        import btlm_jax as btlm
        from btlm_jax.checkpoint import metadata
        from btlm_jax.data.tokenizer import check_vocabulary, tokenizer_directory
        from btlm_jax.generation.call_arguments import with_special_tokens_only
        from btlm_jax.serving.chat_template import read_chat_template
        from btlm_jax.serving.server_metrics import ServerMetrics
        from btlm_jax.serving.service import EngineService
        from btlm_jax.serving.warm_up import warm_up

        # All that is small is checked before the weights are loaded.
        key = os.environ.get("BTLM_API_KEY") if self.api_key is None else self.api_key
        if key == "":
            raise ValueError(
                "--api-key (or BTLM_API_KEY): found an empty key, expected text: leave it out for "
                "none"
            )
        for option, value in (("max-requests", self.max_requests), ("max-body", self.max_body)):
            if value < 1:
                raise ValueError(f"--{option}: found {value}, expected >= 1")
        if self.drain_seconds < 0:
            raise ValueError(f"--drain-seconds: found {self.drain_seconds}, expected >= 0")
        listener = self._bind()
        meta = metadata.read_metadata(self.checkpoint)
        tokenizer = btlm.load_tokenizer(self.checkpoint)
        check_vocabulary(tokenizer, meta.config.vocab_size)
        template = read_chat_template(tokenizer_directory(meta.path), self.chat_template)
        model, params = btlm.load(
            self.checkpoint, dtype=self.dtype, mesh=mesh_from_overrides(self.set), unstacked=True
        )
        model = with_special_tokens_only(model)
        if self.dtype:
            model = dataclasses.replace(model, compute_dtype=self.dtype)
        engine = btlm.Engine(
            model,
            params,
            rows=self.rows,
            max_length=self.max_length,
            chunk=self.chunk,
            steps=self.steps,
            queue_size=self.queue_size,
            cache_dtype=self.cache_dtype,
            prefix_cache_bytes=self.prefix_cache,
        )
        metrics = ServerMetrics()
        name = self.name or os.path.basename(os.path.normpath(os.fspath(self.checkpoint)))
        if self.warm_up:
            warm_up(engine)
        server = Server(
            EngineService(engine, metrics),
            tokenizer,
            model_name=name,
            api_key=key,
            chat_template=template,
            limits=ServerLimits(body_bytes=self.max_body, requests=self.max_requests),
        )
        if self.host not in _LOOPBACK and key is None:
            logger.warning("everyone who reaches %s can use the server: set --api-key", self.host)
        config = uvicorn.Config(
            server.app(), log_config=None, timeout_graceful_shutdown=self.drain_seconds
        )
        listener.listen(config.backlog)
        address, port = listener.getsockname()[:2]
        address = f"[{address}]" if ":" in address else address
        print(f"serving {name} at http://{address}:{port}/v1", flush=True)
        # uvicorn sends itself the signal again when all is done, which would end the process.
        signal.signal(signal.SIGTERM, lambda *_: None)
        uvicorn.Server(config).run([listener])

    def _bind(self) -> socket.socket:
        """Returns a socket of the address, which does not listen before the server is ready."""
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        listener = socket.socket(family)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((self.host, self.port))
        except (OSError, OverflowError) as e:
            listener.close()
            raise ValueError(
                f"--host and --port: cannot listen at {self.host}:{self.port} ({e}): choose others"
            ) from None
        return listener
