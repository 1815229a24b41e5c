"""The exact k-th largest magnitude against np.partition, also on the numbers that break float comparisons."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from unlearnjax_kernels.threshold import api, host, passes, reference, shapes, xla

from tests.kernels.base import KernelTestBase


def leaves_of(name: str, dtype=np.float32) -> list[np.ndarray]:
    rng = np.random.default_rng(7)
    return [np.asarray(jnp.asarray(rng.normal(size=shape), dtype)) for shape in shapes.SMALL[name]]


def entries(leaves: list[np.ndarray]) -> int:
    return sum(leaf[0].size for leaf in leaves)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", shapes.SMALL)
def test_equals_partition(name, dtype):
    leaves = leaves_of(name, dtype)
    size = entries(leaves)
    for k in sorted({0, 1, size // 5, size // 2, size - 1, size, size + 3}):
        found = np.asarray(api.kth_magnitude(leaves, k))
        np.testing.assert_array_equal(found, reference.kth_magnitude(leaves, k))
        if dtype == jnp.float32:  # tie-free
            flat = np.concatenate([reference.magnitude_bits(x).reshape(len(x), -1) for x in leaves], axis=1)
            np.testing.assert_array_equal((flat >= found[:, None]).sum(axis=1), min(k, size))


def test_the_reference_is_a_sort():
    x = np.array([[0.5, -3.0, 2.0, -0.25]], np.float32)
    assert [api.to_float(reference.kth_magnitude([x], k)).item() for k in (1, 2, 3)] == [3.0, 2.0, 0.5]
    np.testing.assert_array_equal(api.kth_magnitude(x, 2, implementation="reference"), api.kth_magnitude(x, 2))


@pytest.mark.parametrize("k", [1, 2, 3, 5, 6, 8])
def test_zeros_equal_magnitudes_and_denormals(k):
    x = np.array([[0.0, -0.0, 1e-45, -3e-42, 3e-42, 1.0, -1.0, 1.0], [0.0] * 8], np.float32)
    np.testing.assert_array_equal(api.kth_magnitude(x, k), reference.kth_magnitude([x], k))


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.float16])
def test_the_host_finds_what_a_sort_finds(dtype):
    leaves = [np.asarray(x) for x in leaves_of("tree", jnp.float32)]
    leaves = [(np.round(x, 1) if dtype == np.float16 else x).astype(dtype) for x in leaves]  # and with equal entries
    flat = np.concatenate([np.abs(x.astype(np.float32)).reshape(len(x), -1) for x in leaves], axis=1)
    falling = -np.sort(-flat, axis=1)
    size = flat.shape[1]
    for k in (1, 2, size // 3, size - 1):
        found = host.found(leaves, np.array([[k, 0]] * len(flat)))
        assert host.settled(found) and bool(api.done(found, api.to_limbs(k)[None]).all())
        np.testing.assert_array_equal(np.asarray(found.low).view(np.float32), falling[:, k - 1])
    nothing, everything = (np.asarray(host.found(leaves, np.array([[k, 0]] * len(flat))).low) for k in (0, size + 1))
    assert (nothing == xla.NOTHING).all() and (everything == 0).all()
    mixed = host.found(leaves, np.array([[1 + i, 0] for i in range(len(flat))]))  # each candidate with its own k
    np.testing.assert_array_equal(np.asarray(mixed.low).view(np.float32), np.diagonal(falling))


def in_passes(leaves, k, sample):
    """`passes.found` with a sample of one in `sample`, and how often everything was read."""
    read = []

    def arrays(one_in):
        read.append(one_in)
        for leaf in leaves:
            flat = leaf.reshape(len(leaf), -1)
            yield flat[:, : max(flat.shape[1] // sample, 1)] if len(read) == 1 else flat

    keep = np.array([[k & 0xFFFF, k >> 16]] * len(leaves[0]))
    found = passes.found(arrays, keep, entries(leaves))
    assert len(read) == 2 and read[1] == 1
    return found


@pytest.mark.parametrize("numbers", ["normal", "many equal", "bfloat16 differences", "one value", "half zero"])
def test_one_pass_finds_what_a_sort_finds(numbers, monkeypatch):
    monkeypatch.setattr(passes, "_HELD", 500)  # so that equal ones are counted on the way
    monkeypatch.setattr(passes, "_SAMPLE", 10_000)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 60_000)).astype(np.float32)
    if numbers == "many equal":
        x = np.round(x)
    elif numbers == "bfloat16 differences":
        base = rng.normal(size=60_000).astype(np.float32)
        wide = lambda x: np.float32(x.astype(jnp.bfloat16))  # noqa: E731
        x = wide(base + 0.01 * x) - wide(base)
    elif numbers == "one value":
        x = np.where(x > 0, np.float32(0.7), np.float32(-0.7))
    elif numbers == "half zero":
        x = np.where(x > 0, x, np.float32(0))
    leaves = [x[:, :20_000], x[:, 20_000:20_001], x[:, 20_001:].reshape(2, -1, 1)]
    falling = -np.sort(-np.abs(x), axis=1)
    for k in (1, 2, 12_000, 30_000, 59_999, 60_000):
        found = in_passes(leaves, k, sample=8)
        assert found is not None and host.settled(found)
        kept = np.abs(x) >= np.asarray(found.low).view(np.float32)[:, None]
        np.testing.assert_array_equal(kept, np.abs(x) >= falling[:, k - 1 : k])
    assert (np.asarray(in_passes(leaves, 0, sample=8).low) == xla.NOTHING).all()


def test_large_arrays_are_searched_in_chunks(monkeypatch):
    x = np.random.default_rng(0).normal(size=(2, 3, 10_000)).astype(np.float32)
    monkeypatch.setattr(passes, "_CHUNK", 777)
    monkeypatch.setattr(passes, "_SAMPLE", 5000)
    keep = np.array([[9000, 0], [20, 0]])
    found = passes.found(passes.through([x[:, :1], x[:, 1:]]), keep, 30_000)
    np.testing.assert_array_equal(np.asarray(found.low), np.asarray(host.found([x], keep).low))


def test_few_entries_are_read_once():
    x = np.random.default_rng(0).normal(size=(2, 1000)).astype(np.float32)
    read = []
    found = passes.found(lambda one_in: read.append(one_in) or [x[:, :400], x[:, 400:]], np.array([[300, 0]] * 2), 1000)
    assert read == [1]
    np.testing.assert_array_equal(np.asarray(found.low), np.asarray(host.found([x], np.array([[300, 0]] * 2)).low))


def test_a_sample_that_leads_astray_is_noticed(monkeypatch):
    monkeypatch.setattr(passes, "_SAMPLE", 10_000)
    x = np.sort(np.random.default_rng(0).normal(size=(1, 50_000)).astype(np.float32))  # its beginning is not like it
    assert in_passes([x], 10_000, sample=16) is None


def test_ties_with_the_kth_are_all_kept():
    x = np.array([[2.0, -1.0, 1.0, 1.0, 0.5]], np.float32)
    kept = api.magnitude_bits(x) >= api.kth_magnitude(x, 2)[:, None]
    np.testing.assert_array_equal(kept, [[True, True, True, True, False]])


def test_k_zero_keeps_nothing_and_a_large_k_everything():
    x = np.array([[np.finfo(np.float32).max, 0.0, -1.0]], np.float32)
    assert not (api.magnitude_bits(x) >= api.kth_magnitude(x, 0)[:, None]).any()
    assert (api.magnitude_bits(x) >= api.kth_magnitude(x, 99)[:, None]).all()


def test_traced_and_mapped_k():
    (x,) = leaves_of("odd matrix")
    ks = jnp.arange(1, 92, 10, dtype=jnp.int32)
    found = jax.jit(jax.vmap(lambda k: api.kth_magnitude(x, k)))(ks)
    np.testing.assert_array_equal(found, [reference.kth_magnitude([x], int(k)) for k in ks])


def test_a_tree_is_its_concatenation():
    leaves = leaves_of("tree")
    joined = np.concatenate([leaf.reshape(2, -1) for leaf in leaves], axis=1)
    np.testing.assert_array_equal(api.kth_magnitude(leaves, 17), api.kth_magnitude(joined, 17))


def test_counts_beyond_32_bits():
    many = 7 * 2**31 + 12345
    limbs = sum(api.to_limbs(2**31 - 1) for _ in range(7)) + api.to_limbs(12345 + 7)
    assert bool(api.at_least(limbs, api.to_limbs(many)))
    assert not bool(api.at_least(limbs, api.to_limbs(many + 1)))
    for value in (-(2**40), -70000, -1, 0, 1, 65536, 2**40):
        assert int(api.sign(api.to_limbs(value))) == np.sign(value)
    drift = api.to_limbs(jnp.int32(-(2**31) + 1)) + api.to_limbs(jnp.int32(2**31 - 1))
    assert int(api.sign(drift)) == 0


def test_bad_calls():
    with pytest.raises(ValueError, match="at least one array"):
        api.kth_magnitude([], 1)
    with pytest.raises(ValueError, match="unknown implementation 'sort'"):
        api.kth_magnitude(np.ones((1, 2), np.float32), 1, implementation="sort")
    with pytest.raises(ValueError, match="split it"):
        jax.eval_shape(lambda x: api.kth_magnitude(x, 1), jax.ShapeDtypeStruct((2, 2**16, 2**15), jnp.float32))


class TestHits(KernelTestBase):
    shapes = {name: leaves[0] for name, leaves in shapes.SMALL.items()} | {"several blocks": (8, 60, 1024)}
    shard_shape = (3, 16, 40)
    reduces = True

    def arguments(self, shape, dtype):
        x = np.asarray(jnp.asarray(np.random.default_rng(1).normal(size=shape), dtype))
        pivots = np.tile(np.array([[0.0, 0.5, 1.0, 2.5]], np.float32).view(np.uint32), (shape[0], 1))
        return x, pivots

    def call(self, implementation, data, *rest):
        return api.hits(data, *rest, implementation=implementation)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_blocks_for_a_cpu_count_the_same(dtype):
    """With several devices they are not used, so the other tests do not see them."""
    x = jnp.asarray(np.random.default_rng(2).normal(size=(3, 41, 1001)), dtype)
    pivots = jnp.tile(jnp.asarray([[0.0, 0.5, 1.0, 2.5]], jnp.float32).view(jnp.uint32), (3, 1))
    expected = reference.hits(np.asarray(x), np.asarray(pivots))
    np.testing.assert_array_equal(xla._blocked(x, pivots), expected)
    np.testing.assert_array_equal(xla._blocked([x[i] for i in range(3)], pivots), expected)


@pytest.mark.parametrize("entries", [1 << 16, 1 << 22])
def test_the_cpus_sample_of_a_small_bracket_is_nearly_all_of_it(entries):
    """With several devices it is not used either. The larger size is folded."""
    x = np.random.default_rng(4).normal(size=(2, entries)).astype(np.float32)
    bits = reference.magnitude_bits(x)
    low, high = (np.array([v, v], np.float32).view(np.uint32) for v in (1.0, 1.0005))
    inside = (bits >= low[:, None]) & (bits < high[:, None])
    count = lambda mask: api.to_limbs(jnp.asarray(mask.sum(axis=1), jnp.int32))  # noqa: E731
    state = api.search(2, entries)._replace(
        low=jnp.asarray(low),
        high=jnp.asarray(high),
        at_low=count(bits >= low[:, None]),
        at_high=count(bits >= high[:, None]),
    )
    found = xla._gathered(jnp.asarray(x), state)
    assert (np.asarray(found.seen) <= inside.sum(axis=1)).all() and (found.seen >= 0.9 * inside.sum(axis=1)).all()
    shift = int(xla._shift(state)[0])
    for i in range(2):
        exact = np.bincount((bits[i][inside[i]] - low[i]) >> shift, minlength=4096)
        assert (np.asarray(found.histogram[i]) <= exact).all()


def test_the_kernel_finds_the_same_threshold():
    (x,) = leaves_of("odd matrix")
    found = api.kth_magnitude(x, 17, implementation="pallas_interpret")
    np.testing.assert_array_equal(found, reference.kth_magnitude([x], 17))


@pytest.mark.parametrize("k", [1, 20000, 40000])
@pytest.mark.parametrize("kind", ["normal", "heavy tails", "bfloat16", "two magnitudes", "increasing", "far apart"])
def test_few_passes_whatever_the_numbers(kind, k):
    """Four or five for numbers without ties, never more than a few dozen."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(2, 50000)).astype(np.float32)
    if kind == "heavy tails":
        x = (x**9).astype(np.float32)
    elif kind == "bfloat16":
        x = np.asarray(jnp.asarray(x, jnp.bfloat16).astype(jnp.float32))
    elif kind == "two magnitudes":
        x = np.where(x > 0.3, np.float32(1.0), np.float32(-0.75))
    elif kind == "increasing":
        x = np.sort(np.abs(x), axis=1)
    elif kind == "far apart":
        x = np.exp2(rng.integers(-140, 120, x.shape)).astype(np.float32)
    keep = jnp.broadcast_to(api.to_limbs(k), (2, 2))
    state = api.search(2, 50000)
    passes = 0
    while not bool(jnp.all(api.done(state, keep))):
        state = api.aim(state, api.sample(jnp.asarray(x), state), keep)
        state = api.narrow(state, api.count(jnp.asarray(x), state), keep)
        passes += 1
    assert passes <= (7 if kind in ("normal", "heavy tails", "increasing") else 30)
    kept = reference.magnitude_bits(x) >= reference.kth_magnitude([x], k)[:, None]
    np.testing.assert_array_equal(reference.magnitude_bits(x) >= np.asarray(state.low)[:, None], kept)
