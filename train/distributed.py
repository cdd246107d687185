"""Several processes: joining JAX's distributed runtime, and agreeing before working together."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from collections import Counter
from collections.abc import Generator, Mapping

import jax
import numpy as np

logger = logging.getLogger(__name__)

_TPU_VM = "this is a Cloud TPU VM"


def initialize(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    *,
    join_timeout: int = 300,
    lost_timeout: int = 100,
) -> None:
    """Joins the other processes of this run, if there are any, before any other use of JAX.

    Arguments that are None are read from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
    JAX_PROCESS_ID, or else by JAX from the cluster that `detect_cluster` recognizes. Afterwards
    only process 0 logs anything below a warning.

    Args:
      coordinator: host:port of process 0.
      processes: number of processes; 1 looks for no others.
      process: number of this process, from 0.
      join_timeout: seconds within which all processes must join.
      lost_timeout: seconds without a heartbeat, or of waiting for the others at the end, after
        which JAX counts a process as lost and ends the others.

    Raises:
      ValueError: an argument is missing or out of range, JAX cannot read the cluster, or processes
        have different numbers of devices.
      TimeoutError: process 0 cannot be reached. If another process is missing, JAX ends this one.
    """
    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    processes = _number_from_environment("--processes", processes, "JAX_NUM_PROCESSES")
    process = _number_from_environment("--process", process, "JAX_PROCESS_ID")
    platforms = jax.config.jax_platforms  # type: ignore  (an attribute created at run time)
    sign = detect_cluster(os.environ, platforms)
    flags = {"--coordinator": coordinator, "--processes": processes, "--process": process}
    missing = [flag for flag, value in flags.items() if value is None]
    _check_arguments(coordinator, processes, process, {"join": join_timeout, "lost": lost_timeout})
    if processes == 1 or (len(missing) == 3 and sign is None):
        return
    if missing and sign is None:
        raise ValueError(f"{', '.join(missing)}: missing; give all of {', '.join(flags)} or none")
    deadline = time.monotonic() + join_timeout
    if coordinator is not None:
        logger.info(
            "process %s waits for the others at %s, up to %d s (--join-timeout)",
            process, coordinator, join_timeout,
        )  # fmt: skip
        if process != 0:
            _wait_for_coordinator(coordinator, deadline)
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process,
            cluster_detection_method=None if missing else "deactivate",
            initialization_timeout=max(round(deadline - time.monotonic()), 1),
            heartbeat_timeout_seconds=lost_timeout,
            shutdown_timeout_seconds=lost_timeout,
        )
    except (ValueError, RuntimeError, OSError) as e:
        if len(missing) == 3 and sign == _TPU_VM:
            logger.info("no other hosts of this TPU are known (%s)", e)
            return
        if not missing:
            raise
        raise ValueError(
            f"{', '.join(missing)}: not given, {sign}, but JAX cannot read the rest from it ({e}); "
            f"give all of {', '.join(flags)}, or --processes 1 for a run of one process"
        ) from e
    devices = Counter(d.process_index for d in jax.devices())
    if len(set(devices.values())) > 1:
        raise ValueError(
            f"devices by process: found {dict(sorted(devices.items()))}, expected the same number "
            "in each"
        )
    if jax.process_index() != 0:
        logging.getLogger("btlm_jax").setLevel(logging.WARNING)


def detect_cluster(environment: Mapping[str, str], platforms: str | None) -> str | None:
    """Returns the sign of a cluster with several processes that JAX can read; None if none shows.

    JAX's own detection (jax._src.clusters) is not used alone, because it takes a single SLURM task
    for one of several, with one GPU each, and warns in every Kubernetes container.

    Args:
      environment: `os.environ`.
      platforms: `jax.config.jax_platforms`, which contains "tpu" on a Cloud TPU VM.
    """
    tpu = "tpu" in (platforms or "")

    def several(name: str) -> bool:
        return int(environment.get(name) or 1) > 1

    signs = {
        # A script outside of srun sees the tasks of its job as well, but is not a step of it.
        "SLURM_NTASKS": several("SLURM_NTASKS") and "SLURM_STEP_NODELIST" in environment,
        "OMPI_COMM_WORLD_SIZE": several("OMPI_COMM_WORLD_SIZE"),
        "PMI_SIZE": several("PMI_SIZE"),
        # An indexed Job; JAX asks Kubernetes for the number of processes (jax[k8s]).
        "JOB_COMPLETION_INDEX": "JOB_COMPLETION_INDEX" in environment and not tpu,
        # Google Kubernetes Engine names the hosts of the TPU slice, and the other slices.
        "TPU_WORKER_HOSTNAMES": tpu and "," in environment.get("TPU_WORKER_HOSTNAMES", ""),
        "TPU_PROCESS_ADDRESSES": tpu and "," in environment.get("TPU_PROCESS_ADDRESSES", ""),
        "MEGASCALE_NUM_SLICES": tpu and several("MEGASCALE_NUM_SLICES"),
    }
    for name, present in signs.items():
        if present:
            return f"{name} is {environment[name]}"
    # JAX asks the metadata server of a TPU VM, unless one of these variables answers or forbids it
    # (JAX itself sets one where there are no chips).
    answered = {"TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES", "TPU_SKIP_MDS_QUERY"}
    return _TPU_VM if tpu and not answered & environment.keys() else None


def barrier(name: str) -> None:
    """Returns once all processes have reached it."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def any_process(flag: bool) -> bool:
    """Returns whether the flag is true in any process; all processes call it."""
    return any(gather_text("true" if flag else ""))


def gather_text(text: str) -> list[str]:
    """Returns the text of every process, in order of their numbers; all processes call it."""
    if jax.process_count() == 1:
        return [text]
    from jax.experimental.multihost_utils import process_allgather

    encoded = np.frombuffer(text.encode(), np.uint8)
    sizes = process_allgather(np.int32(len(encoded)))
    if not sizes.any():
        return [""] * len(sizes)
    rows = process_allgather(np.pad(encoded, (0, sizes.max() - len(encoded))))
    return [row[:n].tobytes().decode() for row, n in zip(rows, sizes, strict=True)]


@contextlib.contextmanager
def raise_together() -> Generator[None]:
    """Re-raises an exception of any process on all of them, to avoid a deadlock.

    The block must not itself wait for other processes.

    Raises:
      ValueError: another process raised an exception; the message has its number and text.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as e:
        error = e
    messages = gather_text(f"{type(error).__name__}: {error}" if error else "")
    if error is not None:
        raise error
    for number, message in enumerate(messages):
        if message:
            raise ValueError(f"process {number}: {message}")


def _number_from_environment(flag: str, value: int | None, variable: str) -> int | None:
    text = os.environ.get(variable)
    if value is not None or not text:
        return value
    if not text.isdigit():
        raise ValueError(f"{variable} (or {flag}): found {text!r}, expected an int >= 0")
    return int(text)


def _check_arguments(
    coordinator: str | None,
    processes: int | None,
    process: int | None,
    timeouts: Mapping[str, int],
) -> None:
    if coordinator is not None:
        host, _, port = coordinator.rpartition(":")
        if not (host and port.isdigit()):
            raise ValueError(f"--coordinator: found {coordinator!r}, expected host:port")
    if processes is not None and processes < 1:
        raise ValueError(f"--processes: found {processes}, expected an int >= 1")
    if process is not None and not 0 <= process < (processes or process + 1):
        limit = "" if processes is None else f" and < --processes {processes}"
        raise ValueError(f"--process: found {process}, expected an int >= 0{limit}")
    for name, seconds in timeouts.items():
        if seconds < 1:
            raise ValueError(f"--{name}-timeout: found {seconds}, expected seconds >= 1")


def _wait_for_coordinator(coordinator: str, deadline: float) -> None:
    """Returns once process 0 listens; JAX itself could only wait and then end the process."""
    host, _, port = coordinator.rpartition(":")
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as e:
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"--coordinator {coordinator}: cannot be reached ({e}); is process 0 running "
                    "there, and the port open? (--join-timeout waits longer)"
                ) from e
            time.sleep(0.5)
