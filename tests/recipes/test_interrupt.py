"""A run that is stopped leaves whole files or none, and resumed it ends as if it had not been stopped."""

import hashlib
import json
import os
import signal

import jax
import numpy as np
import pytest

from unlearnjax.cli.main import main
from unlearnjax.evaluation.journal import Records
from unlearnjax.io import peft
from unlearnjax.io.peft import load_adapter
from unlearnjax.recipes import run as module
from unlearnjax.recipes import train_step
from unlearnjax.recipes.load import load_recipe
from unlearnjax.recipes.resume import run_fingerprint
from unlearnjax.training import checkpoint
from unlearnjax.training.loop import train

pytestmark = pytest.mark.slow

RECIPE = """
defaults: {epochs: 2, rank: 2, micro_batch: 4, accumulation: 1, dropout: 0.0, objective: npo, learning_rate: 1e-2}
candidates: [{name: one}, {name: two, accumulation: 2}]
adapter: {targets: [q]}
training: {buckets: 1}
merges: [{method: linear}]
evaluation: {max_new_tokens: 4}
"""
STEPS = 4
HELD = ["checkpoints/fingerprint.json", "checkpoints/lock"]  # what an unfinished run always has


@pytest.fixture
def command(world, tmp_path):
    """The command line, without --resume, and OUT."""
    base, _, sources = world
    (tmp_path / "recipe.yml").write_text(RECIPE, "utf-8")
    out = tmp_path / "out"
    return [
        "run", "--quiet", "--model", base.source, "--forget", sources.forget, "--retain", sources.retain,
        "--recipe", str(tmp_path / "recipe.yml"), "--out", str(out),
    ], out  # fmt: skip


@pytest.fixture
def start(command):
    """Runs the command line with more arguments; returns its status and OUT."""
    argv, out = command
    return lambda *more: (main([*argv, *more]), out)


@pytest.fixture(scope="module")
def undisturbed(world, tmp_path_factory):
    """What came out of the run that nobody stopped."""
    folder = tmp_path_factory.mktemp("undisturbed")
    base, _, sources = world
    (folder / "recipe.yml").write_text(RECIPE, "utf-8")
    argv = ["run", "--quiet", "--model", base.source, "--forget", sources.forget, "--retain", sources.retain]
    assert main([*argv, "--recipe", str(folder / "recipe.yml"), "--out", str(folder / "out")]) == 0
    return made(folder / "out")


def made(out):
    """All that a run computed, by name: digests of weights and generations; curves and scores."""
    weights = sorted(p for pattern in ("*.safetensors", "*.csv") for p in out.rglob(pattern))
    digests = {str(p.relative_to(out)): hashlib.sha256(p.read_bytes()).hexdigest() for p in weights}
    report = json.loads((out / "report.json").read_text("utf-8"))
    assert not (out / "checkpoints").exists()
    return digests, {name: report[name] for name in ("candidates", "merges", "models", "exported", "warnings")}


def held(out):
    """The files there are, and the names of the checkpoints."""
    found = files(out)
    steps = sorted({f.split("/")[1] for f in found if f.startswith("checkpoints/") and f.count("/") > 1})
    return [f for f in found if not f.startswith("checkpoints/step-")], steps


def stopping(monkeypatch, step, how):
    """From now on a run is stopped after its step `step` by `how()`; returns the steps that are done."""
    steps = []

    def stopped(*args, after_step=None, **options):
        def after(done, states):
            if after_step is not None:
                after_step(done, states)
            steps.append(done)
            if done == step:
                how()

        return train(*args, after_step=after, **options)

    monkeypatch.setattr(train_step, "train", stopped)
    return steps


def kill(signum):
    os.kill(os.getpid(), signum)


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def stop(*args, **keywords):
    raise KeyboardInterrupt


def test_stopped_in_the_middle_of_training(start, monkeypatch, capsys, undisturbed):
    """By an exception, after which nothing can be saved: it starts again from the beginning."""
    steps = stopping(monkeypatch, 2, stop)
    status, out = start()
    assert status == 130 and steps == [1, 2]
    stdout, line = capsys.readouterr()
    assert stdout == "" and line.startswith("unlearnjax: interrupted; go on with: unlearnjax run --quiet --model ")
    assert line.endswith(" --resume\n") and line.count("\n") == 1
    assert held(out) == ([*HELD, "recipe.yml"], [])
    assert [c.name for c in load_recipe(str(out / "recipe.yml")).candidates] == ["one", "two"]
    assert start()[0] == 2 and "add --resume" in capsys.readouterr().err
    steps = stopping(monkeypatch, 0, stop)
    assert start("--resume")[0] == 0 and steps == [1, 2, 3, 4]
    assert "from the beginning" in capsys.readouterr().err
    assert made(out) == undisturbed


@pytest.mark.parametrize(("signum", "number"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_during_training_saves(start, monkeypatch, capsys, undisturbed, signum, number):
    """After one step, in the middle of an update of the candidate that accumulates two."""
    steps = stopping(monkeypatch, 1, lambda: kill(signum))
    status, out = start()
    assert status == number and steps == [1]
    lines = capsys.readouterr().err.splitlines()
    name = " by SIGTERM" if signum == signal.SIGTERM else ""
    assert lines[-1].startswith(
        f"unlearnjax: interrupted{name} after step 1 of {STEPS}, which is saved; go on with: unlearnjax run "
    )
    assert held(out) == ([*HELD, "recipe.yml"], ["step-00000001"])
    steps = stopping(monkeypatch, 0, stop)
    assert start("--resume")[0] == 0 and steps == [2, 3, 4]
    assert capsys.readouterr().err == ""
    assert made(out) == undisturbed
    assert start("--resume")[0] == 2 and "has finished" in capsys.readouterr().err


def test_what_differs_is_named(start, monkeypatch, capsys, command):
    stopping(monkeypatch, 1, lambda: kill(signal.SIGTERM))
    _, out = start()
    capsys.readouterr()
    before = files(out)
    (out.parent / "recipe.yml").write_text(RECIPE.replace("rank: 2", "rank: 1"), "utf-8")
    assert start("--resume")[0] == 2
    assert "recipe.candidates[0].rank was '2', is '1'" in capsys.readouterr().err
    (out.parent / "recipe.yml").write_text(RECIPE, "utf-8")
    assert start("--resume", "--dtype", "bfloat16")[0] == 2
    assert "base weights was" in capsys.readouterr().err
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"] + " --xla_cpu_enable_fast_math=false")
    assert start("--resume")[0] == 2
    assert "settings.XLA_FLAGS was" in capsys.readouterr().err
    assert files(out) == before


def test_a_damaged_checkpoint(start, monkeypatch, capsys, undisturbed):
    stopping(monkeypatch, 2, lambda: kill(signal.SIGTERM))
    start()
    stopping(monkeypatch, 3, lambda: kill(signal.SIGTERM))
    _, out = start("--resume")
    assert held(out)[1] == ["step-00000002", "step-00000003"]
    large = max((out / "checkpoints" / "step-00000003").rglob("*"), key=lambda p: p.stat().st_size)
    content = bytearray(large.read_bytes())
    content[len(content) // 2] ^= 4
    large.write_bytes(content)
    capsys.readouterr()
    steps = stopping(monkeypatch, 0, stop)
    assert start("--resume")[0] == 0 and steps == [3, 4]
    (line,) = capsys.readouterr().err.splitlines()
    assert "warning" in line and "step-00000003: damaged" in line and "the checkpoint before is used" in line
    assert made(out) == undisturbed


def test_a_full_disk_is_a_warning(start, monkeypatch, capsys, undisturbed):
    whole, calls = checkpoint.write_arrays, []

    def full(folder, leaves):
        calls.append(folder)
        if len(calls) > 1:
            raise OSError(28, "No space left on device")
        whole(folder, leaves)

    stopping(monkeypatch, 1, lambda: kill(signal.SIGTERM))
    monkeypatch.setattr(checkpoint, "write_arrays", full)
    _, out = start()
    stopping(monkeypatch, 2, lambda: kill(signal.SIGTERM))
    capsys.readouterr()
    assert start("--resume")[0] == 143
    warning, last = [x for x in capsys.readouterr().err.splitlines() if "once more" not in x]
    assert "step 2 was not written" in warning and "No space left" in warning and "step 1 stays" in warning
    assert "after step 2 of 4, which could not be saved (step 1 is what is saved)" in last
    assert held(out)[1] == ["step-00000001"]
    stopping(monkeypatch, 0, stop)
    assert start("--resume")[0] == 0
    assert "step 4 was not written" in capsys.readouterr().err
    assert made(out) == undisturbed


def test_stopped_after_training(start, world, monkeypatch, capsys, undisturbed):
    """What is there loads; that there is no report says that the run did not end. It is not trained again."""
    evaluate = module.evaluate_all
    monkeypatch.setattr(module, "evaluate_all", stop)
    status, out = start()
    assert status == 130
    folders = ["candidates/one", "candidates/two", "merges/linear-delta"]
    names = ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    adapters = [f"{folder}/{name}" for folder in folders for name in names]
    assert held(out) == (sorted([*adapters, *HELD, "recipe.yml"]), ["step-00000004"])
    for folder in folders:
        adapter = load_adapter(out / folder, world[0].config)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(adapter.lora))
    monkeypatch.setattr(module, "evaluate_all", evaluate)
    monkeypatch.setattr(train_step, "stores_for", None)
    steps = stopping(monkeypatch, 0, stop)
    assert start("--resume")[0] == 0 and steps == []
    assert made(out) == undisturbed


@pytest.mark.parametrize(("signum", "number"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_during_evaluation(start, monkeypatch, capsys, undisturbed, signum, number):
    """It ends after the batch under way; resumed, it evaluates the rest: of the stack two batches, of the merge two."""
    whole, added = Records.add, []

    def add(self, places, results):
        whole(self, places, results)
        added.append(str(self.path.relative_to(self.path.parents[2])))
        if len(added) == at:
            kill(signum)

    monkeypatch.setattr(Records, "add", add)
    at = 3
    status, out = start()
    assert status == number
    line = capsys.readouterr().err.splitlines()[-1]
    name = " by SIGTERM" if signum == signal.SIGTERM else ""
    where = "in the evaluation, after 16 of 16 rows (generations)"
    assert line.startswith(f"unlearnjax: interrupted{name} {where}; go on with: unlearnjax run ")
    assert line.endswith(" --resume")
    assert not (out / "report.json").exists() and (out / "generations" / "one" / "forget_0.csv").exists()
    at = 0
    monkeypatch.setattr(train_step, "stores_for", None)
    assert start("--resume")[0] == 0 and capsys.readouterr().err == ""
    assert added == [
        f"evaluation/{part}/{what}.jsonl"
        for part in ("base", "linear-delta")
        for what in ("generations", "answers-likelihoods")
    ]
    assert made(out) == undisturbed


def test_a_signal_after_training_stops_at_once(start, monkeypatch, capsys):
    monkeypatch.setattr(module, "evaluate_all", lambda *_, **__: kill(signal.SIGTERM))
    assert start()[0] == 143
    line = capsys.readouterr().err
    assert line.startswith("unlearnjax: interrupted by SIGTERM; go on with: ") and line.count("\n") == 1


def test_stopped_while_an_adapter_is_written(start, monkeypatch):
    whole = peft.write_file

    def half(path, entries):
        if "two" in str(path):
            path.write_bytes(b"half")
            raise KeyboardInterrupt
        whole(path, entries)

    monkeypatch.setattr(peft, "write_file", half)
    status, out = start()
    assert status == 130
    assert {f.split("/")[1] for f in files(out) if f.startswith("candidates")} == {"one"}


def test_left_overs_of_a_killed_process_are_cleared_away(start, monkeypatch, undisturbed):
    stopping(monkeypatch, 1, lambda: kill(signal.SIGTERM))
    _, out = start()
    for name in (".candidates.1.part/x", "candidates/.one.77.part/adapter_model.safetensors", "candidates/two/odd"):
        (out / name).parent.mkdir(parents=True)
        (out / name).write_bytes(b"half")
    (out / ".report.html.9.part").write_bytes(b"half")
    stopping(monkeypatch, 0, stop)
    assert start("--resume")[0] == 0
    assert made(out) == undisturbed
    assert not [f for f in files(out) if ".part" in f or "odd" in f]


def test_what_comes_after_training_may_change_on_the_way():
    of = lambda **recipe: run_fingerprint(recipe, {}, [], {})  # noqa: E731
    begun = of(candidates=["a"], merges=["m"], search={"rows": 8}, evaluation={"suite": "official"})
    assert of(candidates=["a"], merges=[], search={"rows": 9}, evaluation={"suite": "full"}) == begun
    assert of(candidates=["b"], merges=["m"], search={"rows": 8}, evaluation={"suite": "official"}) != begun


def test_how_a_step_goes_through_the_memory_may_change_on_the_way():
    of = lambda **training: run_fingerprint({"training": {"seed": 1, **training}}, {}, [], {})  # noqa: E731
    assert of() == of(remat="full", tokens_at_once=1) == of(remat=None, tokens_at_once=None)
    assert of() != of(candidates_at_once=2) and of() != of(seed=2)
