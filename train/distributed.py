"""Several processes: JAX's own runtime, and how they agree before they work together."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from collections import Counter
from collections.abc import Iterator, Mapping

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
    """Joins the other processes of this run, if there are any. Call it before anything else of JAX.

    What is not given is read from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID,
    else by JAX from the cluster, if one is `detected`. Afterwards only process 0 logs what is not a
    warning.

    Args:
      coordinator: host:port of process 0.
      processes: how many; 1 looks for no others.
      process: which of them this is, from 0.
      join_timeout: seconds within which all must have come.
      lost_timeout: seconds without a sign of life, or of waiting for the others at the end, after
        which JAX counts a process as lost and ends the others.

    Raises:
      ValueError: an argument that is missing or out of range, a cluster that JAX cannot read, or
        processes with different numbers of devices.
      TimeoutError: there is no process 0. If another is missing, JAX ends the process itself.
    """
    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    processes = _number("--processes", processes, "JAX_NUM_PROCESSES")
    process = _number("--process", process, "JAX_PROCESS_ID")
    platforms = jax.config.jax_platforms  # type: ignore  (an attribute made at run time)
    sign = detected(os.environ, platforms)
    given = {"--coordinator": coordinator, "--processes": processes, "--process": process}
    missing = [flag for flag, value in given.items() if value is None]
    _check(coordinator, processes, process, {"join": join_timeout, "lost": lost_timeout})
    if processes == 1 or (len(missing) == 3 and sign is None):
        return
    if missing and sign is None:
        raise ValueError(f"{', '.join(missing)}: missing; give all of {', '.join(given)} or none")
    deadline = time.monotonic() + join_timeout
    if coordinator is not None:
        logger.info(
            "process %s waits for the others at %s, up to %d s (--join-timeout)",
            process, coordinator, join_timeout,
        )  # fmt: skip
        if process != 0:
            _wait_for(coordinator, deadline)
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
            f"give all of {', '.join(given)}, or --processes 1 for a run of one process"
        ) from e
    devices = Counter(d.process_index for d in jax.devices())
    if len(set(devices.values())) > 1:
        raise ValueError(
            f"devices by process: found {dict(sorted(devices.items()))}, expected as many in each"
        )
    if jax.process_index() != 0:
        logging.getLogger("btlm_jax").setLevel(logging.WARNING)


def detected(environment: Mapping[str, str], platforms: str | None) -> str | None:
    """What says that there are several processes, and JAX reads the rest from; None if nothing.

    JAX is not simply asked (jax._src.clusters), because it takes a single task of SLURM for one of
    several, with one GPU each, and warns in every container of Kubernetes.

    Args:
      environment: `os.environ`.
      platforms: `jax.config.jax_platforms`, in which JAX writes "tpu" on a Cloud TPU VM.
    """
    tpu = "tpu" in (platforms or "")

    def several(name: str) -> bool:
        return int(environment.get(name) or 1) > 1

    signs = {
        # A script outside of srun knows the tasks of its job, too, but is no step of it.
        "SLURM_NTASKS": several("SLURM_NTASKS") and "SLURM_STEP_NODELIST" in environment,
        "OMPI_COMM_WORLD_SIZE": several("OMPI_COMM_WORLD_SIZE"),
        "PMI_SIZE": several("PMI_SIZE"),
        # An indexed Job; its processes are counted by asking Kubernetes (jax[k8s]).
        "JOB_COMPLETION_INDEX": "JOB_COMPLETION_INDEX" in environment and not tpu,
        # Google Kubernetes Engine tells containers of their TPU slice, and of the other slices.
        "TPU_WORKER_HOSTNAMES": tpu and "," in environment.get("TPU_WORKER_HOSTNAMES", ""),
        "TPU_PROCESS_ADDRESSES": tpu and "," in environment.get("TPU_PROCESS_ADDRESSES", ""),
        "MEGASCALE_NUM_SLICES": tpu and several("MEGASCALE_NUM_SLICES"),
    }
    for name, said in signs.items():
        if said:
            return f"{name} is {environment[name]}"
    # Virtual machines ask a server, unless told not to (by JAX itself where there are no chips).
    told = {"TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES", "TPU_SKIP_MDS_QUERY"}
    return _TPU_VM if tpu and not told & environment.keys() else None


def _number(flag: str, given: int | None, variable: str) -> int | None:
    text = os.environ.get(variable)
    if given is not None or not text:
        return given
    if not text.isdigit():
        raise ValueError(f"{variable} (or {flag}): found {text!r}, expected an int >= 0")
    return int(text)


def _check(
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
        end = "" if processes is None else f" and < --processes {processes}"
        raise ValueError(f"--process: found {process}, expected an int >= 0{end}")
    for name, seconds in timeouts.items():
        if seconds < 1:
            raise ValueError(f"--{name}-timeout: found {seconds}, expected seconds >= 1")


def _wait_for(coordinator: str, deadline: float) -> None:
    """Returns once process 0 listens; if JAX waited, it could only end the process."""
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


def barrier(name: str) -> None:
    """Returns once all processes have come here."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def any_process(flag: bool) -> bool:
    """Whether a flag is set in any process; all of them call it."""
    return any(gather_text("set" if flag else ""))


def gather_text(text: str) -> list[str]:
    """What each process says, in order of their numbers; all of them call it."""
    if jax.process_count() == 1:
        return [text]
    from jax.experimental.multihost_utils import process_allgather

    said = np.frombuffer(text.encode(), np.uint8)
    sizes = process_allgather(np.int32(len(said)))
    if not sizes.any():
        return [""] * len(sizes)
    rows = process_allgather(np.pad(said, (0, sizes.max() - len(said))))
    return [row[:n].tobytes().decode() for row, n in zip(rows, sizes, strict=True)]


@contextlib.contextmanager
def raise_together() -> Iterator[None]:
    """A block that raises in every process if it raises in one, so that none waits for that one.

    It must not wait for other processes itself.

    Raises:
      ValueError: what another process has raised, with its number.
    """
    own: Exception | None = None
    try:
        yield
    except Exception as e:
        own = e
    said = gather_text(f"{type(own).__name__}: {own}" if own else "")
    if own is not None:
        raise own
    for number, message in enumerate(said):
        if message:
            raise ValueError(f"process {number}: {message}")
