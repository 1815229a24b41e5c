"""`merge` as a user meets it: what it computes for a few numbers, and one clear line for every bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unlearnjax.errors import UserError
from unlearnjax.merging import merge, methods

X = np.array([[1.0, -2.0, 4.0], [3.0, 0.0, -1.0]], np.float32)
TREE = {"layers": {"q": X, "k": X[:, :2]}}


def test_linear_is_the_exact_mean_unless_told_otherwise():
    np.testing.assert_array_equal(merge(X, "linear"), X.mean(axis=0))
    np.testing.assert_allclose(merge(X, "linear", weights=[3.0, 1.0]), 0.75 * X[0] + 0.25 * X[1])
    np.testing.assert_allclose(merge(X, "linear", weights=[3.0, 1.0], normalize=False), 3 * X[0] + X[1])
    np.testing.assert_array_equal(merge(X, "linear", semantics="peft"), X.sum(axis=0))
    np.testing.assert_array_equal(merge(X, "linear", semantics="peft", weights=[1.0, -1.0]), X[0] - X[1])


def test_structure_is_kept_and_inputs_may_be_lists():
    found = merge({"a": [X], "b": None}, "linear")
    np.testing.assert_array_equal(found["a"][0], X.mean(axis=0))
    assert found["b"] is None


def test_methods_say_what_they_are():
    for name, method in methods().items():
        assert name == method.name and method.summary and len(set(method.semantics)) == len(method.semantics)
        assert set(method.spaces) <= {"delta", "core", "factors"}
        for rule in method.rules:
            assert rule.source and method.rule(rule.semantics) is rule
            hash(rule)  # the compiled program is cached by its rule
            for p in rule.hyperparameters:
                assert p.summary and (p.required or p.static or p.low <= p.default <= p.high)
    assert methods()["ties"].semantics[0] == methods()["linear"].semantics[0] == "paper"
    assert all(p.required for rule in methods()["ties"].rules for p in rule.hyperparameters if p.name == "density")


BAD = {
    "unknown method": (X, "tise", {}, "unknown method 'tise'; did you mean 'ties'"),
    "unknown semantics": (
        X,
        "ties",
        {"density": 0.5, "semantics": "papr"},
        "no semantics 'papr'; did you mean 'paper'",
    ),
    "unknown hyperparameter": (X, "ties", {"densty": 0.5}, "no hyperparameter 'densty'; did you mean 'density'"),
    "another semantics' hyperparameter": (
        X,
        "ties",
        {"density": 0.5, "normalize": True},
        r"\(paper semantics\) has no hyperparameter 'normalize'; valid: density, lambda",
    ),
    "missing density": (X, "ties", {}, r"ties \(paper semantics\) needs density in \(0, 1\]"),
    "density 0": (X, "ties", {"density": 0.0}, r"density is 0 and must be in \(0, 1\]"),
    "density above 1": (X, "ties", {"density": 80}, r"density is 80 and must be in \(0, 1\]"),
    "density as an array": (X, "ties", {"density": np.ones((2, 1))}, "density must be one number"),
    "density as a word": (X, "ties", {"density": "half"}, "density must be one number"),
    "concrete JAX density": (X, "ties", {"density": jnp.float32(1.5)}, "density is 1.5"),
    "density NaN": (X, "ties", {"density": float("nan")}, "density is nan"),
    "negative lambda": (X, "linear", {"lambda_": -0.5}, r"lambda is -0.5 and must be in \[0, inf\)"),
    "infinite lambda": (X, "linear", {"lambda": float("inf")}, "lambda is inf"),
    "flag as a number": (X, "linear", {"normalize": 1}, "normalize is 1 and must be true or false"),
    "unknown choice": (
        X,
        "ties",
        {"semantics": "peft", "density": 0.5, "majority_sign_method": "totl"},
        "majority_sign_method is 'totl'; did you mean 'total'",
    ),
    "too few weights": (X, "linear", {"weights": [1.0]}, r"weights have shape \(1,\) for 2 candidates"),
    "weights per entry": (X, "linear", {"weights": np.ones((2, 3))}, r"weights have shape \(2, 3\)"),
    "weights of words": (X, "linear", {"weights": ["a", "b"]}, "weights must be 2 numbers"),
    "weights not finite": (X, "linear", {"weights": [1.0, np.inf]}, "not all finite"),
    "weights that cancel": (X, "linear", {"weights": [1.0, -1.0]}, "pass normalize=False"),
    "no weight at all": (X, "ties", {"weights": [0.0, 0.0], "density": 0.5}, "all of them are 0"),
    "different N": ({"a": X, "b": {"c": X[:1]}}, "linear", {}, "b/c has 1 candidates and a has 2"),
    "N = 0": (X[:0], "linear", {}, "there are no candidates"),
    "a scalar": ({"a": X, "b": np.float32(1.0)}, "linear", {}, r"b has shape \(\) and lacks"),
    "no leaves": ({}, "linear", {}, "empty tree"),
    "integers": ({"a": X, "steps": np.ones((2, 1), np.int32)}, "linear", {}, "steps is int32"),
    "NaN": ({"a": X, "b": np.where(X == 0, np.nan, X)}, "linear", {}, "b of candidate 1 holds NaN or Inf"),
    "Inf": ({"a": np.where(X == 4, np.inf, X)}, "ties", {"density": 0.5}, "a of candidate 0 holds NaN or Inf"),
    "base of another structure": (TREE, "linear", {"base": {"q": X[0]}}, "base has another tree structure"),
    "base of another shape": (X, "linear", {"base": X}, r"base the array has shape \(2, 3\) and the deltas \(3,\)"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_line(case):
    deltas, method, options, message = BAD[case]
    with pytest.raises(UserError, match=message) as error:
        merge(deltas, method, **options)
    assert "\n" not in str(error.value)


def test_methods_that_need_a_key_or_a_base_ask_for_it():
    linear = methods()["linear"]
    for field, message in (("needs_key", "pass key"), ("needs_base", "pass base")):
        method = linear._replace(rules=(linear.rules[0]._replace(**{field: True}),))
        with pytest.raises(UserError, match=message):
            merge(X, method)


def test_a_leaf_beyond_the_counters_is_refused_before_anything_runs():
    big = jax.ShapeDtypeStruct((1, 2**16, 2**15), jnp.float32)
    with pytest.raises(UserError, match="split it along an axis"):
        jax.eval_shape(lambda x: merge(x, "ties", density=0.5), big)


def test_each_leaf_and_layer_draws_with_its_own_key():
    linear = methods()["linear"]

    def noise(deltas, weights, state, draws, base, settings):
        return draws.kept(0, deltas.shape[1:], 0.5).astype(jnp.float32)

    method = linear._replace(rules=(linear.rules[0]._replace(combine=noise, needs_key=True),))
    draw = merge({"a": X, "b": X}, method, key=jax.random.key(0))
    assert not np.allclose(draw["a"], draw["b"])
    np.testing.assert_array_equal(merge({"b": X}, method, key=jax.random.key(0))["b"], draw["b"])
    from unlearnjax.merging.api import merge_stacked

    layers = merge_stacked(np.stack([X, X], axis=1), method, stacked=1, key=jax.random.key(0))
    assert not np.allclose(layers[0], layers[1])


def test_nan_in_traced_deltas_is_not_looked_at():
    assert np.isnan(jax.jit(lambda x: merge(x, "linear"))(np.full((2, 1), np.nan, np.float32))).all()


@pytest.mark.parametrize(
    ("method", "more"),
    [("magnitude_prune", {}), ("dare_linear", {}), ("della_linear", {"epsilon": [0.1, 0.2, 0.05]}),
     ("breadcrumbs", {"gamma": [0.1, 0.0, 0.3]})],
)  # fmt: skip
@pytest.mark.parametrize("kind", [list, jnp.asarray])
def test_each_candidate_can_have_its_own_density(method, more, kind):
    x = np.random.default_rng(1).normal(size=(3, 12, 9)).astype(np.float32)
    densities, key = [0.2, 0.9, 0.5], jax.random.key(0) if method in ("dare_linear", "della_linear") else None
    options = {name: kind(values) for name, values in more.items()}
    found = merge(x, method, density=kind(densities), key=key, weights=np.ones(3), **options)
    alone = [
        merge(
            x, method, key=key, weights=np.eye(3)[i], density=density,
            **({"normalize": False} if method in ("dare_linear", "della_linear") else {}),
            **{name: values[i] for name, values in more.items()},
        )
        for i, density in enumerate(densities)
    ]  # fmt: skip
    scale = 3 if method in ("dare_linear", "della_linear") else 1
    np.testing.assert_allclose(scale * found, sum(alone), rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match="2 values of density for 3 candidates"):
        merge(x, method, density=kind([0.5, 0.5]), key=key)
    with pytest.raises(UserError, match=r"density is 1\.5"):
        merge(x, method, density=[0.5, 0.5, 1.5], key=key)
