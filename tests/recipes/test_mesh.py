"""A whole run on a mesh gives what it gives on one device: losses, adapters, merges, scores, and the written model."""

import csv
import json

import jax
import numpy as np
import pytest

from unlearnjax.cli.main import main
from unlearnjax.distributed.mesh import describe_sizes, make_mesh, mesh_of, parse_mesh
from unlearnjax.io.huggingface import load_params
from unlearnjax.io.safetensors import open_folder
from unlearnjax.recipes.parse import recipe_from
from unlearnjax.recipes.run import run
from unlearnjax.recipes.trace import run_trace

LORA = {"epochs": 2, "learning_rate": 3e-4, "rank": 4, "accumulation": 1, "micro_batch": 4, "dropout": 0.0}
RECIPE = {
    "name": "meshed",
    "candidates": [
        {"name": "npo", **LORA, "objective": {"npo": 0.5, "gdr": 0.3, "klr": 0.2}},
        {"name": "ga", **LORA, "objective": {"ga": 1.0}},
        {"name": "layer", **LORA, "objective": {"ga": 1.0}, "adapter": "full", "layers": "last-1"},
    ],
    "training": {"buckets": 1},
    "merges": [
        {"name": "ties", "method": "ties", "density": 0.5, "of": ["npo", "ga"]},
        {"name": "mean", "method": "linear"},
        {"name": "mean of LoRAs", "method": "linear", "space": "delta", "of": ["npo", "ga"]},
        {"name": "subtracted", "method": "consensus", "of": ["npo", "ga"], "negate": True, "scale": "search"},
    ],
    "search": {"scales": [0, 1], "rows": 4},
    "evaluation": {"max_new_tokens": 8, "export": "mean"},
}  # fmt: skip


def done(world, out, mesh):
    base, _, sources = world
    mesh = None if mesh is None else parse_mesh(mesh)
    said: list[str] = []
    report = run(base.source, sources, out, recipe_from(RECIPE, "x"), progress=False, mesh=mesh, say=said.append)
    return report, said


@pytest.fixture(scope="module")
def alone(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone") / "out"
    report, said = done(world, out, None)
    assert said == []
    return out, report


def numbers(value):
    """All numbers in plain data, in order; of nothing that is a time."""
    if isinstance(value, dict):
        return [x for key, v in sorted(value.items()) if "second" not in key for x in numbers(v)]
    if isinstance(value, list):
        return [x for v in value for x in numbers(v)]
    return [float(value)] if isinstance(value, (int, float)) else []


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["candidate=2,data=2,fsdp=2", "candidate=1,fsdp=2,tensor=4"])
def test_a_run_on_a_mesh_is_the_run_on_one_device(world, alone, tmp_path, mesh):
    expected_out, expected = alone
    found, said = done(world, tmp_path / "out", mesh)
    assert len(said) == int(mesh.startswith("candidate=2"))  # of the one candidate that trains apart
    assert found["hardware"]["mesh"] == describe_sizes(parse_mesh(mesh))
    for part in ("candidates", "models", "merges"):
        # How far rounding goes depends on the processor: a merge's length was 2.7e-4 apart on one of two.
        np.testing.assert_allclose(numbers(found[part]), numbers(expected[part]), rtol=1e-3, atol=1e-5, err_msg=part)
    ours, theirs = (open_folder(out / "model") for out in (tmp_path / "out", expected_out))
    assert ours.files.keys() == theirs.files.keys()
    for name in ours.files:
        # By norm: AdamW makes a full step of a gradient that is nothing but rounding.
        apart = np.linalg.norm(ours.read(name) - theirs.read(name)) / np.linalg.norm(theirs.read(name))
        assert apart <= 1e-4, name
    for split in ("forget_0.csv", "retain_0.csv"):
        one, other = (out / "generations" / "mean" / split for out in (tmp_path / "out", expected_out))
        said, expected_said = (
            [row[:-1] for row in csv.reader(path.read_text().splitlines(True))] for path in (one, other)
        )
        assert said == expected_said  # but for the last column, the loss


def test_weights_are_read_onto_a_mesh_as_they_are(world):
    base = world[0]
    mesh = make_mesh(parse_mesh("fsdp=2,tensor=2,data=2"))
    found = load_params(base.source, base.config, "float32", mesh)
    assert mesh_of(found) == mesh
    up = found["layers"]["mlp"]["up"]["weight"]
    assert up.addressable_shards[0].data.size * 4 == up.size
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), found, base.params)


@pytest.mark.slow
def test_a_trace_on_a_mesh_is_the_trace_on_one_device(world, tmp_path):
    base, _, sources = world
    one, other = (
        run_trace(base.source, sources.forget, tmp_path / name, progress=False, mesh=mesh)
        for name, mesh in (("one", None), ("other", {"data": 4, "tensor": 2}))
    )
    assert one["counts"]["traced"] > 0
    np.testing.assert_allclose(numbers(other["effects"]), numbers(one["effects"]), rtol=1e-4, atol=1e-5)
    assert other["recommended"]["layers"] == one["recommended"]["layers"]


def test_the_command_takes_a_mesh(world, tmp_path, capsys):
    base, _, sources = world
    command = [
        "evaluate", "--model", base.source, "--forget", sources.forget, "--retain", sources.retain, "--quiet",
        "--max-new-tokens", "8", "--out", str(tmp_path / "out"),
    ]  # fmt: skip
    assert main([*command, "--mesh", "fsdp=3"]) == 2
    assert "is for 3 devices, and there are 8" in capsys.readouterr().err
    assert main([*command, "--mesh", "data=4,fsdp=2"]) == 0
    assert json.loads(capsys.readouterr().out)["task_aggregate"] is not None
