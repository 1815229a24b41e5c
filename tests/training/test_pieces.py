"""Checkpoints of arrays that lie on meshes: pieces of them, that come back on any other mesh or on none."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tests.training.test_checkpoint import RUN, flip
from unlearnjax.training.checkpoint import MANIFEST, Damaged, leaf_names, read_checkpoint, unseal, write_checkpoint
from unlearnjax.training.keeper import open_keeper
from unlearnjax.training.loop import Clock, Snapshot
from unlearnjax.training.pieces import Gathering, held

P = PartitionSpec
SPECS = {"a": P("x", None, "y"), "b": P(("x", "y")), "whole": P(), "number": P(), "empty": P(), "half": P(None, "x")}


def values():
    draw = np.random.default_rng(0)
    return {
        "a": draw.standard_normal((4, 3, 8)).astype(np.float32), "b": draw.integers(0, 9, (8,)).astype(np.int32),
        "whole": draw.standard_normal((5,)) > 0, "number": np.asarray(3, np.int32),
        "empty": np.zeros((2, 0), np.float32),
        "half": np.asarray(jnp.asarray(draw.standard_normal((2, 4)), jnp.bfloat16)),
    }  # fmt: skip


def mesh(x, y):
    return Mesh(np.asarray(jax.devices()[: x * y]).reshape(x, y), ("x", "y"))


def on(shape, tree):
    return jax.device_put(tree, {name: NamedSharding(mesh(*shape), SPECS[name]) for name in tree})


def like(shape, tree):
    places = {n: None if shape is None else NamedSharding(mesh(*shape), SPECS[n]) for n in tree}
    return {n: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=places[n]) for n, x in tree.items()}


def snapshot(states):
    return Snapshot(3, jax.tree.map(held, states), [], [], [], Clock())


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pieces") / "step-00000003"
    write_checkpoint(folder, snapshot(on((4, 2), values())), RUN)
    return folder


@pytest.mark.parametrize("shape", [(4, 2), (2, 4), (2, 2), (1, 1), (4, 1), None])
def test_what_one_mesh_wrote_another_reads(written, shape):
    wanted = like(shape, values())
    got = read_checkpoint(written, unseal(written / MANIFEST), wanted).states
    for name, expected in values().items():
        assert np.asarray(got[name]).tobytes() == expected.tobytes() and got[name].dtype == expected.dtype
        assert isinstance(got[name], np.ndarray) if shape is None else got[name].sharding == wanted[name].sharding


def test_equal_copies_are_kept_once():
    kept = {name: leaf.parts for name, leaf in leaf_names(jax.tree.map(held, on((4, 2), values()))).items()}
    assert {name: len(parts) for name, parts in kept.items()} == {
        "a": 8, "b": 8, "whole": 1, "number": 1, "empty": 1, "half": 4,
    }  # fmt: skip
    assert all(sum(x.size for x in kept[name].values()) == x.size for name, x in values().items())


def test_a_copy_does_not_change_with_its_array():
    x = np.ones(4, np.float32)
    kept = held(x)
    x[:] = 2
    assert (kept.parts[((0, 4),)] == 1).all()


def test_a_piece_that_is_missing_or_comes_twice():
    parts = held(on((4, 2), values())["a"]).parts
    array = Gathering(jax.ShapeDtypeStruct((4, 3, 8), np.float32))
    for region, piece in list(parts.items())[1:]:
        assert array.needs(region)
        array.add(region, piece)
    assert not array.complete()
    first, piece = next(iter(parts.items()))
    array.add(first, piece)
    assert array.complete() and array.array().tobytes() == values()["a"].tobytes()
    array.add(first, piece)
    assert not array.complete()


def test_a_damaged_piece_is_found_wherever_it_lies(tmp_path):
    said = []
    keep = open_keeper(tmp_path / "checkpoints", RUN, every=0.0, say=said.append, resume=True)
    for step in (1, 2):
        keep.save(snapshot(on((4, 2), values()))._replace(step=step), wait=True)
    place = tmp_path / "checkpoints" / "step-00000002"
    for path in sorted(p for p in place.rglob("*") if p.is_file()):
        flip(path, 8 * path.stat().st_size - 9)
        with pytest.raises(Damaged):
            read_checkpoint(place, unseal(place / MANIFEST), like((2, 2), values()))
        flip(path, 8 * path.stat().st_size - 9)
    flip(place / "part-00000.json", 99)
    assert keep.restore(like((2, 2), values())).step == 1
    keep.close()
    assert len(said) == 1 and "damaged" in said[0]


def test_a_run_goes_on_elsewhere_and_says_so(tmp_path):
    said = []
    for device in ("cpu", "tpu"):
        run = {**RUN, "device": {"platform": device}}
        keep = open_keeper(tmp_path / "checkpoints", run, every=0.0, say=said.append, resume=True)
        if device == "cpu":
            keep.save(snapshot(on((4, 2), values())), wait=True)
            assert keep.restore(like(None, values())).step == 3 and said == []
        else:
            assert keep.restore(like(None, values())).step == 3
        keep.close()
    assert len(said) == 1 and "device.platform was 'cpu', is 'tpu'" in said[0] and "bit for bit" in said[0]
