"""Packed deltas: the same numbers as dense ones, kept positions alone touched, and broken files refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from unlearnjax import UserError, merge
from unlearnjax.merging.packed import apply_packed, load_packed, pack, save_packed, unpack


@pytest.fixture
def delta():
    rng = np.random.default_rng(0)
    deltas = {
        "layer": {"kernel": jnp.asarray(rng.normal(size=(4, 13, 9)), jnp.float32)},
        "bias": jnp.asarray(rng.normal(size=(4, 21)), jnp.bfloat16),
    }
    return merge(deltas, "consensus")


@pytest.fixture
def params(delta):
    rng = np.random.default_rng(1)
    made = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), delta)
    return {**made, "bias": made["bias"].at[0].set(-0.0), "other": jnp.ones(3, jnp.float32)}


def test_a_file_gives_back_the_delta(delta, tmp_path):
    packed = pack(delta)
    assert sorted(packed) == ["bias", "layer/kernel"]
    assert packed["layer/kernel"].values.size == np.count_nonzero(delta["layer"]["kernel"]) < 13 * 9 / 2
    save_packed(packed, tmp_path / "delta.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["delta.safetensors"]
    loaded = load_packed(tmp_path / "delta.safetensors")
    np.testing.assert_array_equal(unpack(loaded["layer/kernel"]), delta["layer"]["kernel"])
    np.testing.assert_array_equal(unpack(loaded["bias"]), delta["bias"])
    assert loaded["bias"].values.dtype == jnp.bfloat16


@pytest.mark.parametrize("scale", [1.0, -0.9, 0.0])
def test_applying_is_adding(delta, params, scale):
    found = apply_packed(params, pack(delta), scale)
    for name, own in (("bias", delta["bias"]), ("kernel", delta["layer"]["kernel"])):
        before = params["bias"] if name == "bias" else params["layer"]["kernel"]
        after = np.asarray(found["bias"] if name == "bias" else found["layer"]["kernel"])
        dense = (before.astype(jnp.float32) + scale * own.astype(jnp.float32)).astype(before.dtype)
        np.testing.assert_array_equal(after, dense)
        # Bit for bit: -0 too.
        still = (np.asarray(own) == 0).reshape(-1) if scale else np.ones(own.size, bool)
        old, new = (np.asarray(x).reshape(-1, 1).view(np.uint8)[still] for x in (before, after))
        np.testing.assert_array_equal(new, old)
    assert found["other"] is params["other"]


def test_a_sweep_in_one_program(delta, params):
    packed = pack(delta)
    scales = jnp.linspace(0, 1, 5, dtype=jnp.float32)
    swept = jax.jit(jax.vmap(lambda s: apply_packed(params, packed, -s)["layer"]["kernel"]))(scales)
    for scale, one in zip(scales, swept):
        np.testing.assert_allclose(one, apply_packed(params, packed, -float(scale))["layer"]["kernel"], atol=1e-6)


def test_what_does_not_fit(delta, params):
    packed = pack(delta)
    with pytest.raises(UserError, match="the parameters have no bias"):
        apply_packed({"layer": params["layer"]}, packed)
    with pytest.raises(UserError, match=r"bias is \(3,\) in the parameters and \(21,\) in the delta"):
        apply_packed({**params, "bias": params["other"]}, packed)
    with pytest.raises(UserError, match="bias holds NaN"):
        pack({"bias": jnp.asarray([1.0, jnp.nan], jnp.float32)})
    with pytest.raises(UserError, match="n is int32"):
        pack({"n": jnp.arange(3)})


def test_broken_files(delta, tmp_path):
    path = tmp_path / "delta.safetensors"
    save_packed(pack({"w": delta["layer"]["kernel"]}), path)
    whole, parts = path.read_bytes(), load_file(path)
    meta = {"format": "unlearnjax.packed", "shapes": '{"w": [13, 9]}'}
    (tmp_path / "cut").write_bytes(whole[:-4])
    for name, tensors, metadata in (
        ("foreign", parts, {"format": "pt"}),
        ("lacking", {"w.kept": parts["w.kept"]}, meta),
        ("fewer", {**parts, "w.values": parts["w.values"][1:]}, meta),
        ("shape", parts, {**meta, "shapes": '{"w": [13, 90]}'}),
        ("shapes", parts, {**meta, "shapes": "[1]"}),
    ):
        save_file(tensors, tmp_path / name, metadata)
    for name, message in {
        "cut": "truncated", "foreign": "is no packed delta", "lacking": "do not fit: w.values",
        "fewer": "values for", "shape": "w.kept is uint8", "shapes": "shapes cannot be read", "none": "cannot be read",
    }.items():  # fmt: skip
        with pytest.raises(UserError, match=message):
            load_packed(tmp_path / name)
    with pytest.raises(UserError, match="cannot be written"):
        save_packed(pack({"w": delta["bias"]}), tmp_path / "nowhere" / "file")
