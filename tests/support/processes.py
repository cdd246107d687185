"""Environments, ports and waiting for the processes that tests start."""

from __future__ import annotations

import os
import socket

from support.golden import QUICK_TO_COMPILE


def free_port() -> int:
    """Returns a TCP port of the loopback that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def quick_environment(devices: int = 1, **variables: str) -> dict[str, str]:
    """Returns the environment of a process on `devices` CPU devices that compiles quickly.

    The compilation cache of the test session (`JAX_COMPILATION_CACHE_DIR`) is inherited.
    """
    flags = f"{QUICK_TO_COMPILE} --xla_force_host_platform_device_count={devices}"
    return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags} | variables
