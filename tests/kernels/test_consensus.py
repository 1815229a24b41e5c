"""Sign consensus: the kernel's back ends against numpy, all at once and one candidate at a time."""

from typing import ClassVar

import jax.numpy as jnp
import numpy as np
import pytest
from unlearnjax_kernels.consensus import api, shapes

from tests.kernels.base import KernelTestBase


class ConsensusTests(KernelTestBase):
    shapes = shapes.SMALL
    shard_shape = (3, 16, 40)
    tolerance = 1e-6
    options: ClassVar[dict[str, bool]] = {}

    def arguments(self, shape, dtype):
        rng = np.random.default_rng(5)
        deltas = np.asarray(jnp.asarray(rng.normal(size=shape) * rng.integers(0, 2, shape), dtype))
        weights = np.linspace(-0.5, 1.5, shape[0], dtype=np.float32)
        return deltas, weights, np.int32(-(-2 * shape[0] // 3))

    def call(self, implementation, data, *rest):
        return api.consensus(data, *rest, implementation=implementation, **self.options)


class TestMeanOfAll(ConsensusTests):
    pass


class TestMeanOfTheAgreeing(ConsensusTests):
    options: ClassVar = {"agreeing": True}


class TestConflict(ConsensusTests):
    options: ClassVar = {"conflict": True}


class TestOneAtATime(ConsensusTests):
    """The streaming update, candidate by candidate."""

    def call(self, implementation, data, weights, needed):
        if implementation == "reference":
            return api.consensus(data, weights, needed, implementation=implementation)
        votes = api.start(data.shape[1:], agreeing=False)
        for i in range(data.shape[0]):
            votes = api.add(votes, data[i], weights[i], implementation=implementation)
        return api.finish(votes, needed, agreeing=False, conflict=False)


def test_bad_calls():
    x, w = jnp.ones((2, 3), jnp.float32), jnp.ones(2, jnp.float32)
    with pytest.raises(ValueError, match="unknown implementation 'cuda'"):
        api.consensus(x, w, 2, implementation="cuda")
    with pytest.raises(ValueError, match="no winning sign"):
        api.consensus(x, w, 2, agreeing=True, conflict=True)
    with pytest.raises(ValueError, match="for a mean of all pallas"):
        api.add(api.start((3,), True), x[0], w[0], agreeing=True, implementation="pallas")
