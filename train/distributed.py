"""Several processes: JAX's own runtime, started from flags, environment or the cluster's word."""

from __future__ import annotations

import os

import jax
import numpy as np

# Environment of launchers that JAX can read the rest from; more than one task is what matters.
_CLUSTERS = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
_HINTS = ("JAX_COORDINATOR_ADDRESS", "MEGASCALE_COORDINATOR_ADDRESS", "TPU_WORKER_HOSTNAMES")


def initialize(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None
) -> None:
    """Joins the other processes of this run, if there are any. Call it before anything else of JAX.

    Args:
      coordinator: host:port of process 0; with `processes` and `process`, nothing is detected.
      processes: how many.
      process: which of them this is, from 0.

    Raises:
      ValueError: some of the three are given and some are not, or the number is out of range.
      RuntimeError: the others do not appear (JAX's own message).
    """
    given = {"coordinator": coordinator, "processes": processes, "process": process}
    missing = [name for name, value in given.items() if value is None]
    if missing and len(missing) < 3:
        raise ValueError(f"{', '.join(missing)}: missing; give all of {', '.join(given)} or none")
    if not missing:
        assert processes is not None and process is not None
        if not 0 <= process < processes:
            raise ValueError(f"process: found {process}, expected 0 to {processes - 1}")
        jax.distributed.initialize(coordinator, processes, process)
    elif detected():
        jax.distributed.initialize()


def detected() -> bool:
    """Whether the environment speaks of several processes (TPU pod, GKE, SLURM, MPI, JAX's own)."""
    if any(int(os.environ.get(name) or 1) > 1 for name in _CLUSTERS):
        return True
    if "," in os.environ.get("TPU_WORKER_HOSTNAMES", ""):
        return True
    return any(os.environ.get(name) for name in _HINTS if name != "TPU_WORKER_HOSTNAMES")


def barrier(name: str) -> None:
    """Returns once all processes have come here."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def anywhere(flag: bool) -> bool:
    """Whether a flag is set in any process; all of them call it."""
    if jax.process_count() == 1:
        return flag
    from jax.experimental import multihost_utils

    return bool(multihost_utils.process_allgather(np.asarray(flag)).any())
