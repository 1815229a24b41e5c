"""A run that is stopped leaves whole files or none, never half of one."""

import functools

import jax
import numpy as np
import pytest

from unlearnjax.cli.main import main
from unlearnjax.io import peft
from unlearnjax.io.peft import load_adapter
from unlearnjax.recipes import run as module
from unlearnjax.recipes.load import load_recipe
from unlearnjax.training.loop import train

RECIPE = """
defaults: {epochs: 1, rank: 2, micro_batch: 4, accumulation: 1, dropout: 0.0, objective: npo}
candidates: [{name: one}, {name: two}]
adapter: {targets: [q]}
training: {buckets: 1}
merges: [{method: linear}]
evaluation: {max_new_tokens: 4}
"""


@pytest.fixture
def start(world, tmp_path):
    """Runs the command line; returns its status and OUT."""
    base, _, sources = world
    (tmp_path / "recipe.yml").write_text(RECIPE, "utf-8")
    out = tmp_path / "out"
    argv = [
        "run", "--quiet", "--model", base.source, "--forget", sources.forget, "--retain", sources.retain,
        "--recipe", str(tmp_path / "recipe.yml"), "--out", str(out),
    ]  # fmt: skip
    return lambda: (main(argv), out)


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def stop(*args, **keywords):
    raise KeyboardInterrupt


def test_stopped_in_the_middle_of_training(start, monkeypatch, capsys):
    steps = []

    def stop_at_the_second(step, states):
        steps.append(step)
        if step == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "train", functools.partial(train, after_step=stop_at_the_second))
    status, out = start()
    assert status == 130 and steps == [1, 2]
    assert capsys.readouterr() == ("", "unlearnjax: interrupted\n")
    assert files(out) == ["recipe.yml"]
    assert [c.name for c in load_recipe(str(out / "recipe.yml")).candidates] == ["one", "two"]


def test_stopped_after_training(start, world, monkeypatch, capsys):
    """What is there loads; that there is no report says that the run did not end."""
    monkeypatch.setattr(module, "evaluate_all", stop)
    status, out = start()
    assert status == 130
    folders = ["candidates/one", "candidates/two", "merges/linear-delta"]
    names = ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert files(out) == [f"{folder}/{name}" for folder in folders for name in names] + ["recipe.yml"]
    for folder in folders:
        adapter = load_adapter(out / folder, world[0].config)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(adapter.lora))


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
    assert {f.split("/")[1] for f in files(out) if "/" in f} == {"one"}
