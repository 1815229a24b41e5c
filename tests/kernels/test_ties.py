"""Trim, elect and average: the kernel's back ends against numpy, and its ties."""

import jax.numpy as jnp
import numpy as np
import pytest
from unlearnjax_kernels.threshold.reference import kth_magnitude
from unlearnjax_kernels.ties import elect_mean, shapes

from tests.kernels.base import KernelTestBase


class ElectMeanTests(KernelTestBase):
    shapes = shapes.SMALL
    shard_shape = (3, 16, 40)
    tolerance = 2e-6
    by_sign = False

    def arguments(self, shape, dtype):
        rng = np.random.default_rng(3)
        deltas = np.asarray(jnp.asarray(rng.normal(size=shape), dtype))
        weights = np.linspace(0.5, 1.5, shape[0], dtype=np.float32)
        thresholds = kth_magnitude([deltas], max(deltas[0].size // 2, 1))
        return deltas, thresholds, weights, weights[::-1].copy(), np.abs(weights), np.int32(-1)

    def call(self, implementation, data, *rest):
        return elect_mean(data, *rest, by_sign=self.by_sign, implementation=implementation)


class TestElectMean(ElectMeanTests):
    pass


class TestElectMeanBySign(ElectMeanTests):
    by_sign = True


@pytest.mark.parametrize("implementation", ["reference", "xla", "pallas_interpret"])
def test_a_tied_vote_takes_the_given_sign(implementation):
    deltas = jnp.asarray([[1.0, 2.0, 0.0], [-1.0, 4.0, 0.0]], jnp.float32)
    ones = jnp.ones(2, jnp.float32)
    for tie, first in ((1, 1.0), (-1, -1.0), (0, -1.0)):
        found = elect_mean(deltas, None, ones, ones, ones, tie, implementation=implementation)
        np.testing.assert_array_equal(found, [first, 3.0, 0.0])


def test_an_unknown_implementation():
    ones = jnp.ones(1, jnp.float32)
    with pytest.raises(ValueError, match="unknown implementation 'cuda'"):
        elect_mean(ones[None], None, ones, ones, ones, implementation="cuda")
