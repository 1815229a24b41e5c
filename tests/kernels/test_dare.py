"""The counter-based bits: equal to numpy's, the same for every way a tensor is cut, and random."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from unlearnjax_kernels.dare import api, reference, shapes

from tests.kernels.base import KernelTestBase

SEED = np.array([0x12345678, 0x9ABCDEF0], np.uint32)


@pytest.mark.parametrize("name", shapes.SMALL)
@pytest.mark.parametrize("candidate", [0, 7])
def test_equals_numpy(name, candidate):
    shape = shapes.SMALL[name]
    places = np.arange(np.prod(shape), dtype=np.uint32).reshape(shape)
    np.testing.assert_array_equal(api.places(shape), places)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(
            api.bits(jnp.asarray(SEED), candidate, jnp.asarray(places)), reference.bits(SEED, candidate, places)
        )
        for density in (0.0, 1e-6, 0.3, 0.999999, 1.0):
            found = api.kept(jnp.asarray(SEED), candidate, jnp.asarray(places), jnp.float32(density))
            np.testing.assert_array_equal(found, reference.kept(SEED, candidate, places, density))


def test_the_extremes_keep_nothing_and_everything():
    places = api.places((1 << 16,))
    assert not api.kept(jnp.asarray(SEED), 0, places, jnp.float32(0)).any()
    assert api.kept(jnp.asarray(SEED), 0, places, jnp.float32(1)).all()


def test_a_part_knows_its_place_in_the_whole():
    whole = np.asarray(api.places((6, 4, 5)))
    for start, stop in (((0, 0, 0), (2, 4, 5)), ((3, 1, 2), (6, 3, 5)), ((5, 3, 4), (6, 4, 5))):
        cut = tuple(slice(a, b) for a, b in zip(start, stop))
        shape = tuple(b - a for a, b in zip(start, stop))
        np.testing.assert_array_equal(api.places(shape, api.Part((6, 4, 5), start)), whole[cut])


def test_shards_drop_what_the_whole_drops():
    mesh = jax.make_mesh((2, 4), ("rows", "columns"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    density = jnp.float32(0.4)

    def local():
        start = (jax.lax.axis_index("rows") * 4, jax.lax.axis_index("columns") * 3)
        return api.kept(jnp.asarray(SEED), 1, api.places((4, 3), api.Part((8, 12), start)), density)

    spec = PartitionSpec("rows", "columns")
    found = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(), out_specs=spec))()
    np.testing.assert_array_equal(found, api.kept(jnp.asarray(SEED), 1, api.places((8, 12)), density))


def test_bits_are_uniform_and_independent():
    """Frequencies within five standard errors: of each bit, of neighbours' equal bits, and between candidates."""
    count = 1 << 18
    error = 5 / (2 * count**0.5)
    places = api.places((count,))
    draw = lambda seed, candidate: np.asarray(api.bits(jnp.asarray(seed), candidate, places))  # noqa: E731
    one = draw(SEED, 0)
    others = [one[1:], draw(SEED, 1), draw(SEED ^ np.array([1, 0], np.uint32), 0), draw(SEED[::-1].copy(), 0)]
    for bit in range(32):
        own = (one >> bit) & 1
        assert abs(own.mean() - 0.5) < error
        for other in others:
            same = own[: len(other)] == ((other >> bit) & 1)
            assert abs(same.mean() - 0.5) < error
    for density in (0.01, 0.5, 0.9):
        share = np.asarray(api.kept(jnp.asarray(SEED), 3, places, jnp.float32(density))).mean()
        assert abs(share - density) < 5 * (density * (1 - density) / count) ** 0.5


class TestDrop(KernelTestBase):
    shapes = shapes.SMALL
    shard_shape = (16, 40)
    shard_axis = 0  # a part must be contiguous

    def arguments(self, shape, dtype):
        x = np.asarray(jnp.asarray(np.random.default_rng(0).normal(size=shape), dtype))
        return x, SEED, np.uint32(3), np.float32(0.3), np.uint32(2**32 - 100)

    def call(self, implementation, data, *rest):
        with np.errstate(over="ignore"):
            return api.drop(data, *rest, implementation=implementation)

    def at_shard(self, rest, axis, size):
        seed, candidate, density, start = rest
        return seed, candidate, density, start + (jax.lax.axis_index(axis) * size).astype(jnp.uint32)

    def rank_of_result(self):
        return len(self.shard_shape)
