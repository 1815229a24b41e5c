"""Searching merges: every trial is the merge it says, in one program, and the rules choose as their papers do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import unlearnjax
from unlearnjax import UserError, choose, greedy, grid, merge, pareto, search
from unlearnjax.merging.search import LAMBDAS, Point, Trial, table

RNG = np.random.default_rng(0)
DELTAS = {
    "a": jnp.asarray(RNG.normal(size=(3, 8, 5)), jnp.float32),
    "b": jnp.asarray(RNG.normal(size=(3, 7)), jnp.float32),
}


def norms(delta):
    return {"norm": jnp.sqrt(sum(jnp.sum(x**2) for x in jax.tree.leaves(delta))), "first": delta["a"][0, 0]}


def trial(lambda_, forget, retain, method="consensus"):
    return Trial(Point(method, None, (), None, lambda_), {"forget": forget, "retain": retain})


@pytest.mark.parametrize("one_program", [True, False])
def test_every_trial_is_the_merge_it_says(one_program):
    points = grid(
        ["linear", ("ties", "peft"), "consensus"],
        lambda_=[0.0, 0.5, 1.0],
        weights=[None, (1.0, 0.5, 2.0)],
        density=[0.25, 0.75],
        majority_sign_method=["total", "frequency"],
    )
    assert len(points) == (1 + 2 * 2 + 1) * 2 * 3
    trials = search(DELTAS, points, norms, one_program=one_program)
    assert [t.point for t in trials] == points
    for point, scores in trials:
        weights = None if point.weights is None else jnp.asarray(point.weights)
        delta = merge(
            DELTAS,
            point.method,
            semantics=point.semantics,
            weights=weights,
            lambda_=point.lambda_,
            **dict(point.settings),
        )
        assert scores == pytest.approx({k: float(v) for k, v in norms(delta).items()}, abs=1e-5), point


def test_lambdas_of_different_number_and_a_key():
    points = [
        Point("linear", None, (), None, 0.5),
        Point("dare_linear", None, (("density", 0.5),), None, 1.0),
        Point("dare_linear", None, (("density", 0.25),), None, 2.0),
        Point("dare_linear", None, (("density", 0.5),), None, 3.0),
    ]
    key = jax.random.key(4)
    for point, scores in search(DELTAS, points, norms, key=key):
        delta = merge(DELTAS, point.method, key=key, lambda_=point.lambda_, **dict(point.settings))
        assert scores == pytest.approx({k: float(v) for k, v in norms(delta).items()}, abs=1e-5)


def test_one_compilation_for_all_points():
    calls = []

    def score(delta):
        calls.append(1)
        return norms(delta)

    points = grid(["linear", "ties"], density=[0.2, 0.4, 0.6, 0.8], lambda_=LAMBDAS)
    assert len(search(DELTAS, points, score)) == 5 * 21
    assert len(calls) <= 2 * 2  # traced per method, not per point


def test_negmerge_chooses_as_in_the_papers_sweep():
    """The authors' notebook: Cars on CLIP B/32, threshold .95 x 66.66 = 63.327, so lambda .90."""
    sweep = {0: (59.58, 66.70), 0.25: (50.12, 66.32), 0.5: (40.54, 65.70), 0.75: (33.05, 64.74), 0.8: (30.22, 64.16),
             0.85: (28.62, 63.72), 0.9: (25.55, 63.54), 0.95: (24.20, 63.20), 1.0: (22.60, 62.74)}  # fmt: skip
    trials = [trial(x, *scores) for x, scores in sweep.items()]
    assert choose(trials, forget="forget", retain="retain", base_retain=66.66).point.lambda_ == 0.9
    # Equality with the threshold passes, and of equal forget scores the smaller lambda is taken.
    even = [trial(0.9, 0.2, 0.95), trial(0.4, 0.2, 0.96), trial(1.0, 0.1, 0.949)]
    assert choose(even, forget="forget", retain="retain", base_retain=1.0).point.lambda_ == 0.4
    assert choose(even[:1], forget="forget", retain="retain", base_retain=1.0).point.lambda_ == 0.9


def test_no_merge_retains_enough():
    trials = [trial(0.5, 0.1, 0.3), trial(0.25, 0.2, 0.6), trial(0.1, 0.3, float("nan"))]
    with pytest.raises(
        UserError, match=r"no merge keeps retain at 0.95 of the base's 1 \(0.95\); the best is 0.6 \(cons"
    ):
        choose(trials, forget="forget", retain="retain", base_retain=1.0)
    with pytest.raises(UserError, match="no score is called 'recall'; there are forget, retain"):
        choose(trials, forget="forget", retain="recall", base_retain=1.0)


def test_the_pareto_front_and_its_table():
    pairs = [(0.9, 1.0), (0.5, 0.9), (0.5, 0.8), (0.2, 0.7), (0.2, 0.7), (float("nan"), 0.99)]
    trials = [trial(i / 5, *pair) for i, pair in enumerate(pairs)]
    front = pareto(trials)
    assert [trials.index(t) for t in front] == [0, 1, 3, 4]
    text = table(front)
    assert text.splitlines()[2] == "| consensus lambda=0 | 0.9 | 1 |" and len(text.splitlines()) == 6


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: grid(["tise"]), "unknown method 'tise'"),
        (lambda: grid(["linear"], density=[0.5]), "none of the methods has density"),
        (lambda: grid([]), "the grid is empty"),
        (lambda: search(DELTAS, [Point("ties", None, (), None, 1.0)], norms), "density"),
        (lambda: search(DELTAS, [Point("ties", None, (("density", 0.5),), (1.0,), 1.0)], norms), "weights"),
        (lambda: pareto([]), "there are no trials"),
        (lambda: pareto([trial(0, 1, 1)], minimise=(), maximise=()), "name at least one score"),
        (lambda: merge(DELTAS, "greedy"), "greedy needs a score"),
    ],
)  # fmt: skip
def test_bad_input(call, message):
    with pytest.raises(UserError, match=message):
        call()


def soup_by_hand(deltas, score):
    """Recipe 1 of the paper, line by line."""
    alone = [score({k: v[i] for k, v in deltas.items()}) for i in range(3)]
    order = sorted(range(3), key=lambda i: -alone[i])
    members, best = [order[0]], alone[order[0]]
    for i in order[1:]:
        value = score({k: np.mean([v[j] for j in [*members, i]], axis=0) for k, v in deltas.items()})
        if value >= best:
            members, best = [*members, i], value
    return members, best


@pytest.mark.parametrize("seed", range(6))
def test_the_greedy_soup_is_recipe_1(seed):
    rng = np.random.default_rng(seed)
    target = {k: rng.normal(size=v.shape[1:]).astype(np.float32) for k, v in DELTAS.items()}
    spread = {k: np.arange(1, 4).reshape(3, *[1] * (v.ndim - 1)) for k, v in DELTAS.items()}
    deltas = {k: (target[k] + rng.normal(size=v.shape) * 0.3 * spread[k]).astype(np.float32) for k, v in DELTAS.items()}
    score = lambda d: -sum(jnp.sum((d[k] - target[k]) ** 2) for k in target)  # noqa: E731
    soup = greedy(deltas, score)
    members, best = soup_by_hand(deltas, lambda d: float(score(d)))
    assert sorted(np.flatnonzero(soup.members)) == sorted(members)
    assert float(soup.score) == pytest.approx(best, rel=1e-5)
    for name, leaf in deltas.items():
        np.testing.assert_allclose(soup.delta[name], leaf[members].mean(axis=0), atol=1e-5)


def test_greedy_with_scores_that_are_equal_or_nan():
    flat = greedy(DELTAS, lambda d: jnp.float32(1))
    assert np.asarray(flat.members).all() and list(flat.order) == [0, 1, 2]
    only = greedy(DELTAS, lambda d: jnp.where(d["b"][0] == DELTAS["b"][1, 0], jnp.float32(0), jnp.nan))
    np.testing.assert_array_equal(only.members, [False, True, False])
    np.testing.assert_array_equal(only.delta["b"], DELTAS["b"][1])
    with pytest.raises(UserError, match="must be one number"):
        greedy(DELTAS, lambda d: d["b"])
    with pytest.raises(UserError, match="holds NaN or Inf"):
        greedy({"a": jnp.full((2, 3), jnp.nan, jnp.float32)}, lambda d: jnp.float32(0))
    assert unlearnjax.greedy is greedy
