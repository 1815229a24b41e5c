"""Digests of arrays: of what is in them and where, and of nothing else."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from unlearnjax.distributed.digest import _sums, digest_of
from unlearnjax.distributed.mesh import make_mesh

X = np.random.default_rng(0).standard_normal((4, 16, 8)).astype(np.float32)


def digest(x, name="x"):
    return digest_of([(name, x)])


@pytest.mark.parametrize("spec", [P(), P("candidate"), P(None, ("data", "fsdp"), "candidate"), P(None, None, "fsdp")])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.int32, np.bool_])
def test_where_an_array_lies_does_not_matter(spec, dtype):
    mesh = make_mesh({"candidate": 2, "data": 2, "fsdp": 2})
    x = jnp.asarray(X.astype(dtype))
    assert digest(jax.device_put(x, NamedSharding(mesh, spec))) == digest(x)


def test_none_is_gathered():
    """Each device sums its own part."""
    mesh = make_mesh({"data": 2, "fsdp": 4})
    x = jax.device_put(jnp.asarray(X), NamedSharding(mesh, P("data", "fsdp")))
    program = _sums.lower(x).compile()
    gathered = [line for line in program.as_text().splitlines() if " all-gather(" in line]
    assert gathered and all("f32[" not in line for line in gathered)
    assert program.memory_analysis().temp_size_in_bytes < X.nbytes / 4


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.at[1, 2, 3].add(1e-7), lambda x: x.at[0, 0, 0].multiply(-1), lambda x: x[:, ::-1],
        lambda x: x.swapaxes(0, 2), lambda x: x[..., ::-1], lambda x: x.reshape(4, 8, 16), lambda x: x[:, :15],
        lambda x: x.astype(jnp.bfloat16), lambda x: x.at[:, 0].set(x[:, 1]).at[:, 1].set(x[:, 0]),
    ],
)  # fmt: skip
def test_what_is_in_it_does(change):
    x = jnp.asarray(X)
    assert digest(change(x)) != digest(x) and digest(x, "y") != digest(x)


def test_zeros_have_a_sign_and_nans_their_bits():
    assert digest(jnp.zeros(3)) != digest(-jnp.zeros(3))
    assert digest(jnp.full(3, jnp.nan)) == digest(jnp.full(3, jnp.nan))
    assert digest(jnp.zeros((0, 3))) != digest(jnp.zeros((3, 0)))
    assert digest(jnp.float32(1)) != digest(jnp.float32(2))


def test_single_bits_spread_over_both_sums():
    """Of 3,000 arrays that differ in one bit no two share a sum; by chance they would in 2 of 1000 such tests."""
    found = []
    for at in range(3000):
        bits = X.reshape(-1).view(np.uint32).copy()
        bits[at % bits.size] ^= np.uint32(1 << at // bits.size * 5)
        found.append(np.asarray(_sums(jnp.asarray(bits.view(np.float32).reshape(X.shape)))))
    first, second = np.stack(found).T
    assert len(set(first)) == len(set(second)) == 3000


def test_host_arrays():
    assert digest(X) == digest(X.copy(order="F")) and digest(X) != digest(X[::-1])
    assert digest(3) == digest(np.int64(3)) != digest(4)
