"""XLA compilations: cached between processes, counted and timed."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

_VARIABLE = "JAX_COMPILATION_CACHE_DIR"  # JAX reads it when it is imported
COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


def enable_persistent_cache() -> None:
    """Makes JAX, once it is imported, keep compiled programs in the user's cache directory.

    A directory that the environment already names in `JAX_COMPILATION_CACHE_DIR` takes precedence.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    os.environ.setdefault(_VARIABLE, str(cache / "btlm-jax" / "compiled"))


@dataclasses.dataclass
class CompilationCount:
    """Compilations so far.

    Attributes:
      count: number of programs, including those read from the cache.
      seconds: time spent to compile them or to read them from the cache.
    """

    count: int = 0
    seconds: float = 0.0


@contextlib.contextmanager
def count_compilations() -> Iterator[CompilationCount]:
    """Counts the programs that XLA compiles, in any thread, within the `with` block."""
    import jax

    total = CompilationCount()

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event == COMPILE_EVENT:
            total.count += 1
            total.seconds += duration_secs

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield total
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
