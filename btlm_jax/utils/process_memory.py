"""Memory of this process, as the operating system counts it."""

from __future__ import annotations

import contextlib
import re
import resource
import sys
from pathlib import Path


def peak_rss() -> int:
    """Returns the largest resident set that this process has had, in bytes."""
    # Linux; ru_maxrss there would also count the memory of the parent before exec.
    with contextlib.suppress(OSError):
        status = Path("/proc/self/status").read_text()
        if peak_kib := re.search(r"VmHWM:\s+(\d+) kB", status):
            return int(peak_kib[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
