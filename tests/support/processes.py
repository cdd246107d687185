"""Processes on the loopback."""

from __future__ import annotations

import socket


def free_port() -> int:
    """Returns a TCP port of the loopback that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
