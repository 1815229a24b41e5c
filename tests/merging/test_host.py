"""What the host does for merges of arrays at hand: the check for NaN, and thresholds that programs need not find."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unlearnjax.merging import host, methods
from unlearnjax.merging.api import _finite


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_finite_is_isfinite(dtype, monkeypatch):
    monkeypatch.setattr(host, "_CHUNK", 7)
    most = float(jnp.finfo(dtype).max)
    rows = [[0.0, -0.0, most, -most, 1e-7], [1.0, np.nan, 1.0, 1.0, 1.0], [np.inf] + [0.0] * 4, [0.0] * 4 + [-np.inf]]
    x = jnp.asarray(np.tile(np.array(rows, np.float32), (1, 3)), dtype)
    leaves = [x[:, :, None], x[:, :0], x[:, 4]]
    found = host.all_finite(leaves)
    for mine, theirs, leaf in zip(found, _finite(leaves), leaves, strict=True):
        expected = np.isfinite(np.asarray(leaf, np.float32)).reshape(4, -1).all(axis=1)
        np.testing.assert_array_equal(mine, expected)
        np.testing.assert_array_equal(theirs, expected)


def test_what_is_elsewhere_or_traced_is_left_alone():
    x = jnp.ones((2, 8), jnp.float32)
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "d")))
    assert host.all_finite([spread]) is None and host.all_finite([x, spread]) is None
    rule = methods()["ties"].rules[0]
    starts = [rule.start(8, 2, {"density": 0.5})]
    assert host.settle(rule, [spread], starts, {"density": 0.5}) is starts
    settled = host.settle(rule, [x], starts, {"density": 0.5})
    assert rule.rounds[0].settled(settled[0]) and not rule.rounds[0].settled(starts[0])
    traced = []
    jax.make_jaxpr(lambda x: traced.append(host.settle(rule, [x], starts, {"density": 0.5}) is starts) or x)(x)
    assert traced == [True]
