"""Candidates that come one at a time give what they give together, and bad ones are named."""

import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unlearnjax.errors import UserError
from unlearnjax.merging import merge, merge_stream, methods

DRAW = np.random.default_rng(2)
STACK = {"a": DRAW.normal(size=(4, 6, 5)).astype(np.float32), "b": {"c": DRAW.normal(size=(4, 9)).astype(np.float32)}}
STREAMED = [(m.name, r.semantics) for m in methods().values() for r in m.rules if r.accumulator]


def candidates(stack=STACK):
    return (jax.tree.map(lambda x, i=i: x[i], stack) for i in range(len(jax.tree.leaves(stack)[0])))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("name", "semantics"), STREAMED)
def test_equals_the_merge_of_all(name, semantics, weighted):
    rule = methods()[name].rule(semantics)
    if weighted and not rule.properties.weighted:
        pytest.skip("has no weights")
    options = {"semantics": semantics, "weights": [1.0, 0.5, 0.0, -0.25] if weighted else None, "lambda_": 0.5}
    found = merge_stream(candidates(), name, **options)
    expected = merge(STACK, name, **options)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7), found, expected)


def test_all_of_the_streamed_methods():
    assert {name for name, _ in STREAMED} == {"linear", "uniform", "consensus", "conflict_only", "magmax"}


@pytest.mark.parametrize("average", ["all", "agreeing"])
def test_consensus_by_a_share(average):
    options = {"rho": 0.6, "average": average}
    found, expected = merge_stream(candidates(), "consensus", **options), merge(STACK, "consensus", **options)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7), found, expected)


def test_no_candidate_is_kept():
    class Big(np.ndarray):
        pass

    alive = []

    def one_at_a_time():
        for i in range(5):
            x = np.full(1000, float(i), np.float32).view(Big)
            alive.append(weakref.ref(x))
            yield x
            del x
            gc.collect()
            assert sum(ref() is not None for ref in alive) <= 1

    np.testing.assert_allclose(merge_stream(one_at_a_time(), "linear"), np.full(1000, 2.0))


def test_dtypes_are_the_first_candidates_and_the_sum_is_float32():
    ones = [jnp.full(3, 1 + i * 2**-7, jnp.bfloat16) for i in range(3)]
    found = merge_stream(iter(ones), "linear")
    assert found.dtype == jnp.bfloat16 and found[0] == jnp.bfloat16(1 + 2**-7)


@pytest.mark.parametrize(
    ("deltas", "method", "options", "words"),
    [
        ([], "linear", {}, "there are no candidates"),
        ([{}], "linear", {}, "an empty tree"),
        ([np.ones(2, np.int32)], "linear", {}, "int32, and only floating"),
        ([np.ones(2), np.ones(2)], "ties", {"density": 0.5}, "ties needs all candidates at once; streamed are"),
        ([np.ones(2), np.ones(2)], "linear", {"normalize": False}, "needs weights"),
        ([np.ones(2), np.ones(2)], "linear", {"weights": [1.0]}, "not as many as the candidates"),
        ([np.ones(2)], "linear", {"weights": [1.0, 2.0]}, "not as many as the candidates"),
        ([np.ones(2)], "linear", {"weights": [np.nan]}, "weight nan is not finite"),
        ([np.ones(2), np.ones(2)], "linear", {"weights": [1.0, -1.0]}, "sum to 0"),
        ([{"a": np.ones(2)}, {"b": np.ones(2)}], "linear", {}, "candidate 1 has other arrays than candidate 0: a, b"),
        ([np.ones(2), np.ones(3)], "linear", {}, r"of candidate 1 is float64\(3,\) and of candidate 0 float64\(2,\)"),
        ([{"a": np.ones(2)}, {"a": np.array([1.0, np.inf])}], "linear", {}, "a of candidate 1 holds NaN or Inf"),
    ],
)
def test_errors(deltas, method, options, words):
    with pytest.raises(UserError, match=words):
        merge_stream(iter(deltas), method, **options)
