"""exact_k keeps k entries of each delta; of those that tie at the threshold, the first ones in row-major order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from unlearnjax_kernels.dare.api import Part

from unlearnjax.errors import UserError
from unlearnjax.merging import engine, merge, methods
from unlearnjax.merging.exact import Cut

SHAPE = (16, 5)


def tied(seed=0, dtype=np.float32):
    """Five magnitudes, zero among them, and both signs."""
    return np.random.default_rng(seed).integers(-4, 5, (3, *SHAPE)).astype(dtype)


def kept(delta, k):
    order = np.argsort(-np.abs(delta).reshape(-1), kind="stable")
    out = np.zeros_like(delta)
    out.reshape(-1)[order[:k]] = delta.reshape(-1)[order[:k]]
    return out


DENSITIES = (0.01, 0.3, 0.55, 0.99, 1.0)


@pytest.mark.parametrize("density", DENSITIES)
def test_magnitude_prune_keeps_k(density):
    x = tied()
    expected = sum(kept(delta, int(density * delta.size)) for delta in x)
    np.testing.assert_array_equal(merge(x, "magnitude_prune", density=density, exact_k=True), expected)
    in_program = jax.jit(lambda x: merge(x, "magnitude_prune", density=density, exact_k=True))(x)
    np.testing.assert_array_equal(in_program, expected)
    if density == 0.3:
        assert (merge(x[:1], "magnitude_prune", density=density) != expected).any()


@pytest.mark.parametrize("semantics", ["peft", "mergekit"])
def test_ties_of_what_is_kept(semantics):
    x = tied(1)
    trimmed = np.stack([kept(delta, int(0.4 * delta.size)) for delta in x])
    expected = merge(trimmed, "ties", semantics=semantics, density=1.0)
    np.testing.assert_array_equal(merge(x, "ties", semantics=semantics, density=0.4, exact_k=True), expected)


def test_each_candidate_has_its_own_k_and_bfloat16_ties_too():
    x = tied(2, jnp.bfloat16)
    densities = (0.1, 0.5, 0.9)
    expected = sum(kept(np.float32(d), int(density * d.size)) for d, density in zip(x, densities))
    found = merge(x, "magnitude_prune", density=densities, exact_k=True)
    np.testing.assert_array_equal(np.float32(found), expected)


def test_mapped_over_densities():
    x = jnp.asarray(tied(3))
    found = jax.vmap(lambda d: merge(x, "magnitude_prune", density=d, exact_k=True))(jnp.array(DENSITIES))
    for density, merged in zip(DENSITIES, found):
        expected = sum(kept(np.asarray(d), int(np.float32(density) * np.float32(d.size))) for d in x)
        np.testing.assert_array_equal(merged, expected)


def test_shards_agree_on_the_place():
    rule = methods()["magnitude_prune"].rules[0]
    settings = {p.name: p.default for p in rule.hyperparameters} | {"density": 0.3, "exact_k": True}
    mesh = jax.make_mesh((8,), ("cut",), axis_types=(jax.sharding.AxisType.Auto,))
    x = tied(4)
    start = rule.start(x[0].size, 3, settings)

    def local(part):
        place = Part(SHAPE, (jax.lax.axis_index("cut") * (SHAPE[0] // 8), 0))
        psum = lambda found: jax.lax.psum(found, "cut")  # noqa: E731
        ones = jnp.ones(3, jnp.float32)
        return engine.run(rule, [part], ones, [start], [None], [None], settings, reduce=psum, parts=[place])[0]

    cut, own = PartitionSpec(None, "cut"), PartitionSpec("cut")
    found = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=cut, out_specs=own))(jnp.asarray(x))
    np.testing.assert_array_equal(found, sum(kept(delta, int(0.3 * delta.size)) for delta in x))


def test_pieces_find_the_same_place():
    """As the pieces of a tensor on disk are counted: the last one filled with zeros, which tie with real ones."""
    rule = methods()["magnitude_prune"].rules[0]
    x = tied(5).reshape(3, -1)
    for density in DENSITIES:
        settings = {p.name: p.default for p in rule.hyperparameters} | {"density": density, "exact_k": True}
        state = rule.start(x[0].size, 3, settings).own
        for round_ in rule.rounds:
            own = rule.start(x[0].size, 3, settings)._replace(own=state)
            state = round_.at_once([x[:, :33], x[:, 33:66], x[:, 66:]], own, settings).own
        assert isinstance(state.cut, Cut)
        whole = np.asarray(state.cut.end)
        for i, delta in enumerate(x):
            at = np.abs(delta).view(np.uint32) == state.search.low[i]
            mask = (np.abs(delta).view(np.uint32) > state.search.low[i]) | (at & (np.arange(delta.size) < whole[i]))
            np.testing.assert_array_equal(np.where(mask, delta, 0), kept(delta, int(density * delta.size)))


def test_the_papers_ties_keep_all():
    with pytest.raises(UserError, match="no hyperparameter 'exact_k'"):
        merge(tied(), "ties", density=0.3, exact_k=True)
