"""How the tests compile: 8 virtual CPU devices, quickly, with one cache for the whole session."""

from __future__ import annotations

import os
import shutil
import tempfile

# LLVM optimizes nothing, which halves the time of a compilation; tests run little of what they
# compile. What XLA does before LLVM, fusion and buffer assignment, stays.
_QUICK_FLAGS = ("--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true")
QUICK_TO_COMPILE = " ".join(_QUICK_FLAGS)
# On a busy machine the threads of 8 devices may wait long for each other; XLA's own limit is 40 s.
_FLAGS = (
    "--xla_force_host_platform_device_count=8",
    "--xla_cpu_collective_call_terminate_timeout_seconds=600",
    *_QUICK_FLAGS,
)
_CACHE = {
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}
_DIRECTORY = "JAX_COMPILATION_CACHE_DIR"


def set_environment() -> str | None:
    """Sets the variables that JAX reads when it is imported; workers and subprocesses inherit them.

    Flags and a cache that the environment names already stay: `.ci/run` has one stage that
    compiles as users do, without a cache (`JAX_COMPILATION_CACHE_DIR=`).

    Returns:
      The directory of the compile cache if this process created it.
    """
    # libtpu, where it is installed to compile for TPUs, would look for one and complain.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    flags = os.environ.get("XLA_FLAGS", "").split()
    names = {flag.split("=")[0] for flag in flags}
    flags += [flag for flag in _FLAGS if flag.split("=")[0] not in names]
    os.environ["XLA_FLAGS"] = " ".join(flags)
    if _DIRECTORY in os.environ:
        return None
    directory = tempfile.mkdtemp(prefix="btlm-test-programs-")
    os.environ.update(_CACHE, **{_DIRECTORY: directory})
    return directory


def remove_cache(directory: str | None) -> None:
    """Removes the compile cache that `set_environment` created."""
    if directory is not None:
        shutil.rmtree(directory, ignore_errors=True)


def one_device() -> dict[str, str]:
    """Returns the environment of a subprocess with one CPU device that compiles quickly."""
    return os.environ | {"XLA_FLAGS": QUICK_TO_COMPILE}


def default_devices() -> dict[str, str]:
    """Returns the environment of a subprocess that sees as many CPU devices as at a user's."""
    flags = os.environ["XLA_FLAGS"].split()
    kept = [flag for flag in flags if "host_platform_device_count" not in flag]
    return os.environ | {"XLA_FLAGS": " ".join(kept)}
