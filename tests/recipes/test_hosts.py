"""One job of two processes gives what one process gives, leaves one result behind, and stops and resumes as one."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import yaml

from tests.distributed.test_processes import port
from tests.recipes.test_mesh import RECIPE, numbers
from unlearnjax.cli.main import LOST, main
from unlearnjax.io.safetensors import open_folder

pytestmark = pytest.mark.slow
MESH = ("--mesh", "candidate=2,fsdp=4")


class Job:
    """The processes of one job on this machine; `last`: what the last one's command line has beside."""

    def __init__(self, arguments, folder, count=2, devices=4, last=()):
        self.folder, address = folder, f"127.0.0.1:{port()}"
        folder.mkdir(exist_ok=True)
        self.processes = []
        for index in range(count):
            own = {
                "JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path),
                "PYTHONFAULTHANDLER": "1",
            }  # fmt: skip
            if count > 1:
                own |= {
                    "JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count), "JAX_PROCESS_ID": str(index),
                }  # fmt: skip
            more = last if index == count - 1 else ()
            command = [sys.executable, "-m", "unlearnjax.cli.main", *arguments, *more]
            with self._log(index).open("w") as log:
                process = subprocess.Popen(command, env={**os.environ, **own}, stdout=log, stderr=subprocess.STDOUT)
            self.processes.append(process)

    def _log(self, index):
        return self.folder / f"process{index}.log"

    def logs(self):
        return [self._log(i).read_text() for i in range(len(self.processes))]

    def ended(self, seconds=500):
        """The exit statuses. Processes that have not ended by then say where they are, and fail the test."""
        by = time.monotonic() + seconds
        try:
            return [p.wait(timeout=max(0.0, by - time.monotonic())) for p in self.processes]
        except subprocess.TimeoutExpired:
            for p in self.processes:
                p.send_signal(signal.SIGABRT)
            time.sleep(5)  # their stacks go to the logs
            raise AssertionError(f"not ended after {seconds} s: {self.logs()}") from None
        finally:
            for p in self.processes:
                p.kill()
                p.wait()

    def wait_for(self, path, seconds=300):
        """Until a file or folder is there."""
        for _ in range(10 * seconds):
            if path.exists():
                return
            assert any(p.poll() is None for p in self.processes), self.logs()
            time.sleep(0.1)
        raise AssertionError(f"{path} did not come")


@pytest.fixture(scope="module")
def command(world, tmp_path_factory):
    base, _, sources = world
    recipe = tmp_path_factory.mktemp("recipe") / "recipe.yml"
    recipe.write_text(yaml.safe_dump(RECIPE))
    return [
        "run", "--model", base.source, "--forget", sources.forget, "--retain", sources.retain, "--members",
        sources.members, "--nonmembers", sources.nonmembers, "--probe", sources.probe, "--recipe", str(recipe),
        "--checkpoint-every", "0",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def alone(command, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone") / "out"
    assert main([*command, "--out", str(out), "--quiet"]) == 0
    return out


def check(out, alone):
    """Losses, scores, files and the written model are those of one device."""
    found, expected = (json.loads((folder / "report.json").read_text()) for folder in (out, alone))
    for part in ("candidates", "models", "merges"):
        np.testing.assert_allclose(numbers(found[part]), numbers(expected[part]), rtol=1e-3, atol=1e-5, err_msg=part)
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in alone.iterdir())
    ours, theirs = (open_folder(folder / "model") for folder in (out, alone))
    for name in ours.files:
        apart = np.linalg.norm(ours.read(name) - theirs.read(name)) / np.linalg.norm(theirs.read(name))
        assert apart <= 1e-4, name


def test_two_processes_are_one_job(command, alone, tmp_path):
    out = tmp_path / "out"
    job = Job([*command, *MESH, "--out", str(out)], tmp_path / "logs")
    assert job.ended() == [0, 0], job.logs()
    first, second = job.logs()
    assert "report:" in first and "report:" not in second
    check(out, alone)


def test_sigterm_saves_and_one_process_of_other_devices_goes_on(command, alone, tmp_path):
    out = tmp_path / "out"
    job = Job([*command, *MESH, "--out", str(out)], tmp_path / "logs")
    job.wait_for(out / "checkpoints" / "step-00000002")  # of several processes the first there is
    job.processes[1].send_signal(signal.SIGTERM)  # to one of them
    assert job.ended() == [143, 143], job.logs()
    assert "which is saved" in job.logs()[0]
    (newest,) = sorted((out / "checkpoints").glob("step-*"))[-1:]
    assert sorted(p.name for p in newest.iterdir()) == [
        "manifest.json", "part-00000.json", "part-00000.safetensors", "part-00001.json", "part-00001.safetensors",
    ]  # fmt: skip
    again = Job(
        [*command, "--mesh", "candidate=1,fsdp=2,tensor=2", "--resume", "--out", str(out)], tmp_path / "again", count=1
    )
    assert again.ended() == [0], again.logs()
    assert "device.device_count was '8', is '4'" in again.logs()[0]
    check(out, alone)


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_ends_the_others_and_the_job_goes_on(command, alone, tmp_path, killed):
    out = tmp_path / "out"
    job = Job([*command, *MESH, "--out", str(out)], tmp_path / "logs")
    job.wait_for(out / "checkpoints" / "step-00000002")
    job.processes[killed].kill()
    began = time.monotonic()
    statuses = job.ended(seconds=120)
    assert time.monotonic() - began < 90
    assert statuses[killed] == -signal.SIGKILL and statuses[1 - killed] in (LOST, -signal.SIGABRT), job.logs()
    again = Job([*command, *MESH, "--resume", "--out", str(out)], tmp_path / "again")
    assert again.ended() == [0, 0], again.logs()
    check(out, alone)


def test_an_error_of_all_is_told_by_all(command, tmp_path):
    none = ["--mmlu-data", str(tmp_path / "none")]
    job = Job([*command, *MESH, "--out", str(tmp_path / "out"), *none], tmp_path / "logs")
    assert job.ended(seconds=120) == [2, 2]
    assert all("none" in log for log in job.logs())


def test_an_error_of_one_ends_the_other(command, tmp_path):
    """Such as a host that does not see a file: the other one would wait for it for ever."""
    none = ["--forget", str(tmp_path / "none.jsonl")]
    job = Job([*command, *MESH, "--out", str(tmp_path / "out")], tmp_path / "logs", last=none)
    first, second = job.ended(seconds=120)
    assert second == 2 and first in (LOST, -signal.SIGABRT), job.logs()
    assert not (tmp_path / "out" / "report.json").exists()


@pytest.mark.parametrize("what", ["recipe", "--mesh", "rows"])
def test_hosts_that_see_different_things_are_told(command, tmp_path, what):
    """Also of what comes after training: of two merges each host would write its part of the model."""
    other = {**RECIPE, "search": {"scales": [0, 0.5], "rows": 4}}
    (tmp_path / "other.yml").write_text(yaml.safe_dump(other))
    last = {
        "recipe": ["--recipe", str(tmp_path / "other.yml")], "--mesh": ["--mesh", "fsdp=8"],
        "rows": ["--probe", command[command.index("--retain") + 1]],
    }[what]  # fmt: skip
    job = Job([*command, *MESH, "--out", str(tmp_path / "out")], tmp_path / "logs", last=last)
    assert job.ended(seconds=120) == [2, 2], job.logs()
    assert all(f"process 1 of this job does not have what the first one has: {what}" in log for log in job.logs())
    assert not (tmp_path / "out").exists()


def test_a_full_evaluation_goes_on_in_two_processes(world, tmp_path):
    """Its journal has a folder with the name of a model; the other process works on a copy of it."""
    base, _, sources = world
    out = tmp_path / "out"
    command = [
        "evaluate", "--model", base.source, "--original", base.source, "--forget", sources.forget, "--retain",
        sources.retain, "--max-new-tokens", "8", "--evaluate", "full",
    ]  # fmt: skip
    job = Job([*command, "--mesh", "data=4,fsdp=2", "--out", str(out)], tmp_path / "logs")
    job.wait_for(out / "journal" / "model" / "full")
    job.processes[1].send_signal(signal.SIGTERM)
    assert job.ended() == [143, 143], job.logs()
    again = Job([*command, "--mesh", "data=4,fsdp=2", "--resume", "--out", str(out)], tmp_path / "again")
    assert again.ended() == [0, 0], again.logs()
    assert (out / "full.json").exists() and "nothing of the" not in again.logs()[0]


@pytest.mark.parametrize("what", ["evaluate", "trace"])
def test_evaluation_and_tracing_in_two_processes(world, tmp_path, what):
    base, _, sources = world
    given = {
        "evaluate": ["--original", base.source, "--forget", sources.forget, "--retain", sources.retain,
                     "--max-new-tokens", "8", "--evaluate", "full"],
        "trace": ["--facts", sources.forget],
    }  # fmt: skip
    command = [what, "--model", base.source, *given[what]]
    job = Job([*command, "--mesh", "data=4,fsdp=2", "--out", str(tmp_path / "out")], tmp_path / "logs")
    assert job.ended() == [0, 0], job.logs()
    assert main([*command, "--out", str(tmp_path / "alone"), "--quiet"]) == 0
    for name in {"evaluate": ("scores.json", "full.json"), "trace": ("trace.json",)}[what]:
        found, expected = (json.loads((tmp_path / x / name).read_text()) for x in ("out", "alone"))
        for record in (found, expected):
            for part in ("hardware", "settings"):
                record.pop(part, None)
        np.testing.assert_allclose(numbers(found), numbers(expected), rtol=1e-3, atol=2e-4, err_msg=name)
