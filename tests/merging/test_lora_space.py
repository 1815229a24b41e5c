"""Merging LoRA adapters in both spaces, exact concatenation, and truncation to a rank against numpy's SVD."""

import jax
import numpy as np
import pytest

from unlearnjax.distributed.mesh import make_mesh
from unlearnjax.distributed.rules import sharding, whole
from unlearnjax.errors import UserError
from unlearnjax.merging import (
    concatenate_lora,
    lora_delta,
    merge,
    merge_lora,
    methods,
    spherical,
    to_lora,
    truncation_errors,
)
from unlearnjax.merging.api import merge_stacked

N, L, R = 2, 3, 4
DIMENSIONS = {"q": (6, 8), "down": (8, 12)}
SCALE = np.array([2.0, 0.5], np.float32)
RNG = np.random.default_rng(11)


def adapters(n: int = N) -> dict:
    def pair(out: int, inner: int) -> dict:
        draw = lambda *shape: RNG.normal(size=shape).astype(np.float32)  # noqa: E731
        return {"a": draw(n, L, R, inner), "b": draw(n, L, out, R)}

    q, down = (pair(*DIMENSIONS[name]) for name in ("q", "down"))
    return {"layers": {"attention": {"q": q}, "mlp": {"down": down}}}


def full(pair: dict, scale: np.ndarray) -> np.ndarray:
    return scale.reshape(-1, 1, 1, 1) * np.einsum("nlor,nlri->nloi", pair["b"].astype(np.float64), pair["a"])


def leaf(tree: dict, name: str) -> np.ndarray:
    return tree["layers"]["attention" if name == "q" else "mlp"][name]


def close(found, expected, rtol=1e-5, atol=1e-5):
    jax.tree.map(lambda f, e: np.testing.assert_allclose(f, e, rtol=rtol, atol=atol), found, expected)


def test_the_delta_of_an_adapter():
    lora = adapters()
    stacked = lora_delta(lora, SCALE)
    one = lora_delta(jax.tree.map(lambda x: x[1], lora), 0.5)
    for name in DIMENSIONS:
        np.testing.assert_allclose(leaf(stacked, name)["weight"], full(leaf(lora, name), SCALE), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(leaf(one, name)["weight"], leaf(stacked, name)["weight"][1], rtol=1e-6)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("linear", {}),
        ("linear", {"weights": [0.3, 0.9], "normalize": False, "lambda_": 0.5}),
        ("ties", {"density": 0.4}),
        ("ties", {"density": 0.4, "semantics": "mergekit"}),
        ("ties", {"density": 0.4, "semantics": "peft", "majority_sign_method": "frequency"}),
    ],
)
def test_space_delta_merges_each_layers_matrix(method, options):
    lora = adapters()
    found = merge_lora(lora, SCALE, method, "delta", **options)
    apart = {
        f"{name}{layer}": full(leaf(lora, name), SCALE)[:, layer].astype(np.float32)
        for name in DIMENSIONS
        for layer in range(L)
    }
    expected = merge(apart, method, **options)
    for name in DIMENSIONS:
        assert leaf(found, name)["weight"].shape == (L, *DIMENSIONS[name])
        layers = np.stack([expected[f"{name}{layer}"] for layer in range(L)])
        np.testing.assert_allclose(leaf(found, name)["weight"], layers, rtol=1e-4, atol=1e-5)


def test_space_factors_scales_the_delta_by_lambda_and_keeps_the_rank():
    lora = adapters()
    one = merge_lora(lora, SCALE, "ties", "factors", density=0.8)
    half = merge_lora(lora, SCALE, "ties", "factors", density=0.8, lambda_=0.5)
    assert jax.tree.map(lambda x: x.shape, one) == jax.tree.map(lambda x: x.shape[1:], lora)
    close(lora_delta(half, 1.0), jax.tree.map(lambda x: 0.5 * x, lora_delta(one, 1.0)))


def test_space_factors_with_one_candidate_is_that_candidate():
    lora = adapters(1)
    for method, options in (("linear", {}), ("ties", {"density": 1.0})):
        found = merge_lora(lora, SCALE[:1], method, "factors", **options)
        close(lora_delta(found, 1.0), jax.tree.map(lambda x: x[0], lora_delta(lora, SCALE[:1])))
    negated = merge_lora(lora, SCALE[:1], "linear", "factors", weights=[-1.0])
    close(lora_delta(negated, 1.0), jax.tree.map(lambda x: -x[0], lora_delta(lora, SCALE[:1])))


def test_linear_in_the_factors_has_cross_terms():
    lora = adapters()
    cross = lora_delta(merge_lora(lora, SCALE, "linear", "factors"), 1.0)
    exact = merge_lora(lora, SCALE, "linear", "delta", semantics="peft")
    assert not np.allclose(leaf(cross, "q")["weight"], leaf(exact, "q")["weight"], atol=0.1)


@pytest.mark.parametrize("weights", [None, [0.5, 0.5], [1.0, -0.7]])
def test_concatenation_is_the_exact_sum(weights):
    lora = adapters()
    joined = concatenate_lora(lora, SCALE, weights)
    assert leaf(joined, "q")["a"].shape == (L, N * R, 8)
    used = np.full(N, 1 / N) if weights is None else np.array(weights)
    for name in DIMENSIONS:
        expected = np.einsum("n,nloi->loi", used, full(leaf(lora, name), SCALE))
        np.testing.assert_allclose(leaf(lora_delta(joined, 1.0), name)["weight"], expected, rtol=1e-5, atol=1e-5)
    if weights is None:
        close(lora_delta(joined, 1.0), merge_lora(lora, SCALE, "linear", "delta"))


@pytest.mark.parametrize("rank", [1, 3, 8, 20])
def test_truncation_is_optimal(rank):
    lora = adapters()
    delta = merge_lora(lora, SCALE, "ties", "delta", density=0.3)
    found = to_lora(delta, rank)
    per_linear = truncation_errors(delta, found.lora, found.scale)
    missed = size = 0.0
    for name in DIMENSIONS:
        matrices = np.asarray(leaf(delta, name)["weight"], np.float64)
        u, s, vt = np.linalg.svd(matrices, full_matrices=False)
        best = (u[..., :rank] * s[:, None, :rank]) @ vt[:, :rank]
        pair = leaf(found.lora, name)
        assert pair["a"].shape == (L, rank, DIMENSIONS[name][1]) and pair["b"].shape == (L, DIMENSIONS[name][0], rank)
        np.testing.assert_allclose(pair["b"] @ pair["a"], best, atol=2e-5)
        tail = (s[:, rank:] ** 2).sum()
        path = "layers/attention/q" if name == "q" else "layers/mlp/down"
        np.testing.assert_allclose(per_linear[path], np.sqrt(tail / (s**2).sum()), atol=2e-6)
        missed, size = missed + tail, size + (s**2).sum()
    np.testing.assert_allclose(found.truncation_error, np.sqrt(missed / size), atol=2e-6)
    assert found.scale == 1.0


def test_a_zero_delta_is_met_exactly():
    zero = {"q": {"weight": np.zeros((L, 6, 8), np.float32)}}
    assert to_lora(zero, 2).truncation_error == 0.0


BAD = {
    "unknown space": (
        lambda x: merge_lora(x, SCALE, "ties", "factor", density=0.5),
        "unknown space 'factor'; did you mean",
    ),
    "semantics without factors": (
        lambda x: merge_lora(x, SCALE, "ties", "factors", density=0.5, semantics="paper"),
        r"ties \(paper semantics\) does not work in space 'factors'; pass semantics 'peft'",
    ),
    "normalize in factors": (
        lambda x: merge_lora(x, SCALE, "linear", "factors", normalize=True),
        "no hyperparameter 'normalize'",
    ),
    "unknown method": (lambda x: merge_lora(x, SCALE, "linaer", "factors"), "did you mean 'linear'"),
    "negative lambda in factors": (lambda x: merge_lora(x, SCALE, "linear", "factors", lambda_=-1.0), "lambda is -1"),
    "scale of another length": (lambda x: merge_lora(x, SCALE[:1], "linear", "delta"), r"scale has shape \(1,\) for 2"),
    "weights of another length": (
        lambda x: merge_lora(x, SCALE, "linear", "factors", weights=[1.0]),
        r"weights has shape \(1,\) for 2 candidates",
    ),
    "one candidate where a stack is due": (
        lambda x: merge_lora(jax.tree.map(lambda y: y[0], x), SCALE, "linear", "delta"),
        "layers/attention/q: shapes .* must have 4 axes",
    ),
    "not a LoRA tree": (lambda x: lora_delta({"q": np.ones(3)}, 1.0), "q is not a dict of linears with a and b"),
    "ranks that do not fit": (
        lambda x: lora_delta({"q": {"a": np.ones((1, 2, 3)), "b": np.ones((1, 3, 4))}}, 1.0),
        "q: shapes .* do not fit",
    ),
    "scale that does not fit": (lambda x: lora_delta(x, 1.0), r"scale of shape \(\) does not fit"),
    "candidates that disagree": (
        lambda x: merge_lora({"q": leaf(x, "q"), "k": leaf(adapters(3), "q")}, SCALE, "linear", "delta"),
        "different numbers of candidates",
    ),
    "NaN": (
        lambda x: merge_lora(jax.tree.map(lambda y: np.where(y > 1, np.nan, y), x), SCALE, "linear", "factors"),
        "layers/attention/q of candidate 0 holds NaN or Inf",
    ),
    "rank 0": (lambda x: to_lora({"q": {"weight": np.ones((1, 2, 2), np.float32)}}, 0), "rank is 0"),
    "another adapter": (
        lambda x: truncation_errors({"k": {"weight": np.ones((1, 2, 2), np.float32)}}, x),
        "the adapter has no k",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_line(case):
    call, message = BAD[case]
    with pytest.raises(UserError, match=message) as error:
        call(adapters())
    assert "\n" not in str(error.value)


EVERY = [
    (m, r) for m in methods().values() for r in m.rules
    if "delta" in r.spaces and not r.wants_base({p.name: p.default for p in r.hyperparameters})
]  # fmt: skip


@pytest.mark.parametrize("devices", [1, pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("method", "rule"), [pytest.param(m, r, id=f"{m.name}-{r.semantics}") for m, r in EVERY])
def test_deltas_formed_layer_by_layer_merge_as_those_formed_at_once(method, rule, devices):
    """Bit for bit on one device, and where the rows lie on eight."""
    n = min(max(rule.least, 2), rule.most or 2)
    draw = lambda *shape: np.random.default_rng(shape[-1]).normal(size=shape).astype(np.float32)  # noqa: E731
    lora = {"q": {"a": draw(n, L, R, 8), "b": draw(n, L, 16, R)}, "up": {"a": draw(n, L, R, 8), "b": draw(n, L, 24, R)}}
    settings = {p.name: 0.5 for p in rule.hyperparameters if p.required} | {"semantics": rule.semantics}
    options = {"key": jax.random.key(1), **settings}
    scale = np.linspace(0.5, 2.0, n).astype(np.float32)
    formed = {name: pair["weight"] for name, pair in lora_delta(lora, scale).items()}
    expected = merge_stacked(formed, method, stacked=1, **options)
    tree = lora if devices == 1 else jax.device_put(lora, whole(make_mesh({"fsdp": devices})))
    found = merge_lora(tree, scale, method, "delta", **options)
    # Sums of a matrix' entries may add in another order.
    tolerance = 0 if devices == 1 and method not in spherical.METHODS else 2e-5
    for name in lora:
        np.testing.assert_allclose(found[name]["weight"], expected[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("method", "settings"), [
    ("consensus", {}), ("ties", {"density": 0.2}), ("ties", {"density": 0.2, "semantics": "mergekit"}),
])  # fmt: skip
def test_a_merge_keeps_one_layers_deltas_in_memory(method, settings):
    layers, n, width, mesh = 16, 4, 512, make_mesh({"candidate": 2, "fsdp": 4})
    pair = {
        "a": jax.ShapeDtypeStruct((n, layers, R, width), np.float32, sharding=whole(mesh)),
        "b": jax.ShapeDtypeStruct((n, layers, width, R), np.float32, sharding=sharding(
            mesh, (None, None, "merged", None), (n, layers, width, R))),
    }  # fmt: skip
    program = jax.jit(lambda tree: merge_lora(tree, np.ones(n, np.float32), method, "delta", **settings))
    memory = program.lower({"up": pair}).compile().memory_analysis()
    one = n * width * width * 4 / 8  # of a layer, on a device
    histograms = layers * n * 4096 * 4  # of the samples that thresholds are looked for with
    assert memory.temp_size_in_bytes < 6 * one + 2 * histograms < layers * one


def test_deltas_that_overflow_are_found_though_their_factors_are_finite():
    lora = adapters()
    leaf(lora, "q")["a"][1, 2] = 1e30
    leaf(lora, "q")["b"][1, 2] = 1e30
    with pytest.raises(UserError, match="attention/q of candidate 1 holds NaN or Inf"):
        merge_lora(lora, SCALE, "linear", "delta")
    leaf(lora, "q")["a"][1, 2] = 1e-30  # large factors whose product is small
    assert np.isfinite(leaf(merge_lora(lora, SCALE, "linear", "delta"), "q")["weight"]).all()
