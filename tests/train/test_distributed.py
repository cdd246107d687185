"""Joining processes: by flags, environment and cluster; and the errors."""

from __future__ import annotations

import os
import socket

import jax
import pytest

from btlm_jax import cli
from btlm_jax.train import distributed

VARIABLES = ("JAX_", "SLURM_", "OMPI_", "PMI_", "TPU_", "MEGASCALE_", "JOB_", "KUBERNETES_")

SLURM = {
    "SLURM_JOB_ID": "12345",
    "SLURM_STEP_NODELIST": "node[001-002]",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
}
GKE = {"TPU_WORKER_HOSTNAMES": "host-0.job,host-1.job", "TPU_WORKER_ID": "1"}


@pytest.fixture
def joined(monkeypatch):
    """Removes the variables of every cluster; records the calls of JAX's initialize."""
    for name in list(os.environ):
        if name.startswith(VARIABLES):
            monkeypatch.delenv(name)
    calls: list[dict] = []

    def initialize(coordinator, processes, process, **options):
        calls.append({"given": (coordinator, processes, process), **options})

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    return calls


@pytest.mark.parametrize(
    "environment, platforms, sign",
    [
        ({}, None, None),
        (SLURM, None, "SLURM_NTASKS is 8"),
        (SLURM | {"SLURM_NTASKS": "1"}, None, None),  # perhaps with eight GPUs
        ({"SLURM_NTASKS": "8", "SLURM_JOB_ID": "12345"}, None, None),  # a script without srun
        ({"OMPI_COMM_WORLD_SIZE": "2"}, None, "OMPI_COMM_WORLD_SIZE is 2"),
        ({"PMI_SIZE": "2"}, None, "PMI_SIZE is 2"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None, None),  # any container, even a notebook's
        ({"JOB_COMPLETION_INDEX": "0"}, None, "JOB_COMPLETION_INDEX is 0"),
        (GKE, "tpu,cpu", "TPU_WORKER_HOSTNAMES is host-0.job,host-1.job"),
        (GKE, "cpu", None),  # the TPU is not used
        ({"TPU_PROCESS_ADDRESSES": "a:1,b:1"}, "tpu", "TPU_PROCESS_ADDRESSES is a:1,b:1"),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, "tpu,cpu", None),  # one host, as in Colab
        ({"TPU_WORKER_HOSTNAMES": "a", "JOB_COMPLETION_INDEX": "0"}, "tpu,cpu", None),
        (
            {"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"},
            "tpu,cpu",
            "MEGASCALE_NUM_SLICES is 2",
        ),
        ({}, "tpu,cpu", "this is a Cloud TPU VM"),
        ({"TPU_SKIP_MDS_QUERY": "1"}, "tpu", None),
    ],
)
def test_clusters_are_recognized_by_their_variables(environment, platforms, sign):
    assert distributed.detect_cluster(environment, platforms) == sign


def test_jax_reads_the_cluster_from_the_same_variables(joined, monkeypatch):
    """The signs are those that JAX itself reads (private names of JAX, which may move)."""
    from jax._src import clusters
    from jax._src.clusters import cloud_tpu_cluster

    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    assert clusters.SlurmCluster.is_env_present()
    assert clusters.SlurmCluster.get_process_count() == 8
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    for name, value in (GKE | {"MEGASCALE_NUM_SLICES": "3", "MEGASCALE_SLICE_ID": "2"}).items():
        monkeypatch.setenv(name, value)
    assert clusters.GkeTpuCluster.is_env_present()
    assert clusters.GkeTpuCluster.get_process_count() == 6
    assert clusters.GkeTpuCluster.get_process_id() == 5
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    assert not clusters.GceTpuCluster.is_env_present()


def test_a_single_process_joins_nobody(joined, monkeypatch):
    distributed.initialize()
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    distributed.initialize(processes=1)
    assert joined == []


def test_arguments_come_from_flags_environment_or_cluster(joined, monkeypatch):
    distributed.initialize("host:1", 2, 0, join_timeout=60, lost_timeout=30)
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "host:2")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "4")
    monkeypatch.setenv("JAX_PROCESS_ID", "0")
    distributed.initialize()
    distributed.initialize(processes=3)  # a flag has precedence
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name)
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    distributed.initialize()
    assert [call["given"] for call in joined] == [
        ("host:1", 2, 0), ("host:2", 4, 0), ("host:2", 3, 0), (None, None, None)
    ]  # fmt: skip
    methods = [call["cluster_detection_method"] for call in joined]
    assert methods == ["deactivate", "deactivate", "deactivate", None]
    assert joined[0]["initialization_timeout"] == 60
    assert joined[0]["heartbeat_timeout_seconds"] == joined[0]["shutdown_timeout_seconds"] == 30
    assert joined[3]["initialization_timeout"] == 300


def test_processes_wait_until_process_0_listens(joined):
    """Only then does JAX connect."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        distributed.initialize(address, 2, 1)
    assert [call["given"] for call in joined] == [(address, 2, 1)]
    with pytest.raises(TimeoutError, match=f"--coordinator {address}: .*--join-timeout"):
        distributed.initialize(address, 2, 1, join_timeout=1)


def test_a_cluster_that_jax_cannot_read_is_an_error(joined, monkeypatch):
    def initialize(*_, **__):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"OMPI_COMM_WORLD_SIZE is 2, but .*--processes 1"):
        distributed.initialize()
    monkeypatch.delenv("OMPI_COMM_WORLD_SIZE")
    monkeypatch.setattr(distributed, "detect_cluster", lambda *_: distributed._TPU_VM)
    distributed.initialize()  # a single TPU VM, or one that has no such server


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--coordinator 127.0.0.1:1 --process 0", "--processes: missing; give all of --coord"),
        ("--processes 2", "--coordinator, --process: missing"),
        ("--coordinator 127.0.0.1:1 --processes 2 --process 2", "--process: found 2, expected"),
        ("--coordinator 127.0.0.1:1 --processes 2 --process -1", "--process: found -1"),
        ("--coordinator 127.0.0.1:1 --processes 0 --process 0", "--processes: found 0"),
        ("--coordinator somewhere --processes 2 --process 0", "--coordinator: found 'somewhere'"),
        ("--processes 1 --join-timeout 0", "--join-timeout: found 0"),
        (
            "--coordinator 127.0.0.1:1 --processes 2 --process 1 --join-timeout 1",
            "1:1: can",
        ),
    ],
)
def test_invalid_flags_are_refused(joined, tmp_path, capsys, flags, message):
    assert cli.main(["train", "tiny", str(tmp_path / "run"), *flags.split()]) == 2
    assert message in capsys.readouterr().err
    assert joined == [] and not (tmp_path / "run").exists()


def test_an_invalid_environment_is_refused(joined, monkeypatch):
    monkeypatch.setenv("JAX_PROCESS_ID", "one")
    with pytest.raises(ValueError, match=r"JAX_PROCESS_ID \(or --process\): found 'one'"):
        distributed.initialize("host:1", 2)
