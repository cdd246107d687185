"""CompilationCount by XLA: kept between processes, counted and timed."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

# Read by JAX when it is imported.
_VARIABLE = "JAX_COMPILATION_CACHE_DIR"
_EVENT = "/jax/core/compile/backend_compile_duration"


def enable_persistent_cache() -> None:
    """Has JAX, once it is imported, keep compiled programs in the user's cache directory.

    Another directory that the environment names in `JAX_COMPILATION_CACHE_DIR` stays.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    os.environ.setdefault(_VARIABLE, str(cache / "btlm-jax" / "compiled"))


@dataclasses.dataclass
class CompilationCount:
    """So far: how many programs, and how many seconds; from the cache, those it took to read."""

    count: int = 0
    seconds: float = 0.0


@contextlib.contextmanager
def count_compilations() -> Iterator[CompilationCount]:
    """Counts what XLA compiles, in any thread, while the context lasts."""
    import jax

    found = CompilationCount()

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event == _EVENT:
            found.count += 1
            found.seconds += duration_secs

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
