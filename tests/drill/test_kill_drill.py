"""The short version of the kill drill; the long one's record is in results/."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


@pytest.mark.slow
def test_killed_and_resumed_runs_end_the_same(tmp_path):
    # With this seed it is killed, its newest checkpoint (if it had come to one) damaged, resumed and killed again.
    argv = [sys.executable, str(HERE / "kill_drill.py"), "--times", "1", "--seed", "49", "--epochs", "120"]
    argv += ["--out", str(tmp_path / "r")]
    path = f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"
    found = subprocess.run(argv, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path})
    assert found.returncode == 0, found.stdout + found.stderr
    record = json.loads((tmp_path / "r").read_text("utf-8"))
    assert record["times"] == record["identical"] == len(record["cycles"]) == 1
    assert record["files_compared"] > 10


def test_the_record_of_the_long_one():
    record = json.loads((HERE / "results" / "kill_drill.json").read_text("utf-8"))
    assert record["times"] == record["identical"] == len(record["cycles"]) >= 20
    assert all(cycle["identical"] for cycle in record["cycles"]) and sum(record["faults"].values()) >= 20
    assert {"training", "writing a checkpoint", "after training", "evaluating"} <= set(record["struck_at"])
    assert record["fell_back"] >= 3


def test_the_record_of_two_processes_and_a_full_disk():
    record = json.loads((HERE / "results" / "kill_drill_two_processes.json").read_text("utf-8"))
    assert record["times"] == record["identical"] == len(record["cycles"]) >= 20
    assert all(cycle["identical"] for cycle in record["cycles"]) and "--processes 2" in record["command"]
    assert {"SIGKILL", "SIGTERM", "full disk"} == set(record["faults"]) and sum(record["faults"].values()) >= 20
    assert {0, 1} == {number for cycle in record["cycles"] for number in cycle["processes"]}
    assert {"training", "after training", "evaluating"} <= set(record["struck_at"])
    assert record["fell_back"] >= 3 and record["most_seconds_until_all_had_ended"] < 60


def test_the_record_of_two_hosts():
    record = json.loads((HERE / "results" / "two_hosts.json").read_text("utf-8"))
    ways = record["ways"]
    assert {"environment", "link cut", "srun", "srun, SIGTERM", "mpirun (4)", "mpirun (5)", "Kubernetes"} <= set(ways)
    assert all(way["identical"] for way in ways.values()) and record["files_compared"] > 10
    assert ways["link cut"]["seconds_until_both_ended"] < 60 and ways["srun, SIGTERM"]["statuses"] == [143]
