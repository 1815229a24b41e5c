"""What started a job of several processes, and what jax is given to join it."""

import importlib.util
import os

import jax
import pytest

from unlearnjax.distributed.processes import EXPLICIT, HEARTBEAT, join, launcher
from unlearnjax.errors import UserError


@pytest.mark.parametrize(
    ("environment", "by"),
    [
        ({}, None),
        ({"SLURM_NTASKS": "8"}, None),  # in a batch script, not under srun
        ({"SLURM_NTASKS": "8", "SLURM_STEP_NODELIST": "a[1-2]"}, "srun"),
        ({"SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "a1"}, None),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "mpirun"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),  # a pod that is no part of an indexed job
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, "Kubernetes"),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "TPU slice"),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"UNLEARNJAX_ALONE": "1", "SLURM_NTASKS": "8", "SLURM_STEP_NODELIST": "a"}, None),
        ({EXPLICIT[0]: "a:1", "SLURM_NTASKS": "8", "SLURM_STEP_NODELIST": "a"}, "environment"),
        ({EXPLICIT[0]: "a:1", "OMPI_COMM_WORLD_SIZE": "2"}, "mpirun"),  # -x: all know the address, each its number
        ({EXPLICIT[0]: "a:1", EXPLICIT[2]: "0", "OMPI_COMM_WORLD_SIZE": "2"}, "environment"),
    ],
)
def test_what_started_a_job(environment, by, monkeypatch):
    for name in list(os.environ):
        if name.startswith(("SLURM", "OMPI", "KUBERNETES", "TPU", "JOB_", "JAX_")) and name != "JAX_PLATFORMS":
            monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert launcher() == by


@pytest.mark.parametrize(
    ("count", "index", "says"),
    [(None, "0", "JAX_NUM_PROCESSES"), ("2", "two", "whole numbers"), ("2", "2", "from 0 to 1")],
)
def test_an_environment_that_is_wrong(count, index, says, monkeypatch):
    monkeypatch.setenv(EXPLICIT[0], "127.0.0.1:1")
    for name, value in zip(EXPLICIT[1:], (count, index), strict=True):
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=says):
        join()


@pytest.mark.parametrize(
    ("called", "address", "finds"),
    [
        ("prterun-node-17.cluster-4096000@1", None, "node-17.cluster:61440"),
        ("1234.0", "first:7000", "first:7000"),
        ("prterun-node-17@1", "first:7000", "first:7000"),
    ],
)
def test_the_first_host_of_open_mpi_5(called, address, finds, monkeypatch):
    given = under_open_mpi_5(called, address, monkeypatch)
    join()
    assert given == {
        "coordinator_address": finds, "num_processes": 16, "process_id": 9, "local_device_ids": [1],
        "cluster_detection_method": "deactivate", "heartbeat_timeout_seconds": HEARTBEAT,
    }  # fmt: skip


def test_a_job_of_open_mpi_whose_name_tells_nothing(monkeypatch):
    under_open_mpi_5("1234.0", None, monkeypatch)
    with pytest.raises(UserError, match=r"'1234\.0', does not tell .*-x JAX_COORDINATOR_ADDRESS=HOST"):
        join()


def test_kubernetes_without_its_client(monkeypatch):
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "0")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install \"jax\[k8s\]\"; .* UNLEARNJAX_ALONE=1"):
        join()


def under_open_mpi_5(called, address, monkeypatch):
    """What jax would be given."""
    given = {}
    own = {"PMIX_NAMESPACE": called, "OMPI_COMM_WORLD_SIZE": "16", "OMPI_COMM_WORLD_RANK": "9"}
    own |= {"OMPI_COMM_WORLD_LOCAL_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
    for name, value in (own | {EXPLICIT[0]: address} if address else own).items():
        monkeypatch.setenv(name, value)
    for name in ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "OMPI_MCA_orte_hnp_uri"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(jax.distributed, "initialize", lambda **more: given.update(more))
    monkeypatch.setattr(jax.config, "update", lambda name, value: None)
    return given


@pytest.mark.parametrize(
    ("environment", "devices"),
    [
        ({"SLURM_STEP_TASKS_PER_NODE": "8"}, None),  # jax takes the one of the task's number
        ({"SLURM_STEP_TASKS_PER_NODE": "8", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}, None),
        ({"SLURM_STEP_TASKS_PER_NODE": "8", "CUDA_VISIBLE_DEVICES": "3"}, []),  # --gpus-per-task 1: all that it sees
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x4)", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}, []),  # a task for each host
        ({"SLURM_STEP_TASKS_PER_NODE": "16(x4)"}, None),
    ],
)
def test_the_devices_of_a_task(environment, devices, monkeypatch):
    given = {}
    for name in ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", EXPLICIT[0]):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"SLURM_NTASKS": "32", "SLURM_STEP_NODELIST": "a[1-4]", **environment}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(jax.distributed, "initialize", lambda **more: given.update(more))
    monkeypatch.setattr(jax.config, "update", lambda name, value: None)
    join()
    assert given.get("local_device_ids") == devices
