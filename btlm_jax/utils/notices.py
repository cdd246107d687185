"""Warnings that are given once per process, however often their cause occurs."""

from __future__ import annotations

import functools
import logging

logger = logging.getLogger(__name__)


@functools.cache
def warn_once(message: str) -> None:
    """Logs a warning, unless it has been logged already."""
    logger.warning("%s", message)
