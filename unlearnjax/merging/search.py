"""Trying many merges: a grid over methods and their hyperparameters, scored in one program, and rules to choose by."""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from unlearnjax.errors import UserError
from unlearnjax.merging.api import checked_leaves, find_rule, merge

LAMBDAS = tuple(round(0.05 * i, 2) for i in range(21))  # NegMerge's 21 points
Score = Callable[[Any], Mapping[str, Any]]


class Point(NamedTuple):
    """One merge of a grid."""

    method: str
    semantics: str | None
    settings: tuple[tuple[str, Any], ...]
    """Its hyperparameters but lambda."""
    weights: tuple[float, ...] | None
    lambda_: float

    def __str__(self) -> str:
        named = [f"{name}={value}" for name, value in self.settings]
        weights = [] if self.weights is None else [f"weights={list(self.weights)}"]
        method = self.method if self.semantics is None else f"{self.method} ({self.semantics})"
        return " ".join([method, *named, *weights, f"lambda={self.lambda_:g}"])


class Trial(NamedTuple):
    """A point and what the score function said of its merge."""

    point: Point
    scores: dict[str, float]


def grid(
    methods: Sequence[str | tuple[str, str]],
    *,
    lambda_: Sequence[float] = LAMBDAS,
    weights: Sequence[Sequence[float] | None] = (None,),
    **settings: Sequence[Any],
) -> list[Point]:
    """Every combination. A setting is tried with the methods that have it: `density` with ties and not with consensus.

    Args:
      methods: names, or (name, semantics).
      weights: None is the method's default.
      **settings: values to try, by the name of the hyperparameter.

    Raises:
      UserError: an unknown method or semantics; a setting that none of the methods has; nothing to try.
    """
    points = []
    used: set[str] = set()
    for entry in methods:
        name, semantics = (entry, None) if isinstance(entry, str) else entry
        _, rule = find_rule(name, semantics)
        own = [p.name for p in rule.hyperparameters if p.name in settings]
        used |= set(own)
        for values in itertools.product(*(settings[key] for key in own), weights, lambda_):
            chosen, factor, vector = values[:-2], values[-1], values[-2]
            fixed = None if vector is None else tuple(float(w) for w in vector)
            points.append(Point(name, semantics, tuple(zip(own, chosen, strict=True)), fixed, float(factor)))
    unused = sorted(set(settings) - used)
    if unused:
        raise UserError(f"search: none of the methods has {', '.join(unused)}; see `unlearnjax methods NAME`")
    if not points:
        raise UserError("search: the grid is empty; give at least one method and one value of each setting")
    return points


def search(
    deltas: PyTree[Float[Array, "N ..."]],
    points: Sequence[Point],
    score: Score,
    *,
    key: Array | None = None,
    base: PyTree[Array] | None = None,
    one_program: bool = True,
) -> list[Trial]:
    """Merge and score every point.

    A merge is computed once for all its lambdas, which multiply it; one is held at a time.

    Args:
      score: (merged delta, lambda included) -> {name: scalar}. It says itself what the delta is added to or subtracted
        from. Pure and traceable with `one_program`.
      key, base: as `merge` takes them; every point draws the same random numbers.
      one_program: compile everything into a single program, mapped over numbers and lambdas. A density is then a
        float32 number, so that k may be off by one entry in ten million. False calls `score` with arrays, point by
        point, for scores that are no JAX functions.

    Returns:
      The points with their scores, in order.

    Raises:
      UserError: what `merge` raises of a point.
    """
    merges: dict[tuple, dict[tuple, list[int]]] = {}  # program -> (numbers, weights) -> places of its lambdas
    for place, point in enumerate(points):
        program, numbers = _parts(point)
        merges.setdefault(program, {}).setdefault(numbers, []).append(place)

    checked_leaves(deltas)

    def merged(deltas: Any, base: Any, program: tuple, numbers: Mapping[str, Any], weights: Any) -> Any:
        method, semantics, static, _ = program
        return merge(
            deltas, method, semantics=semantics, key=key, base=base, weights=weights, **dict(static), **numbers,
            lambda_=1.0,
        )  # fmt: skip

    found: list[dict[str, float] | None] = [None] * len(points)
    if not one_program:
        for program, variants in merges.items():
            for (numbers, weights), places in variants.items():
                delta = merged(
                    deltas, base, program, dict(numbers), None if weights is None else jnp.asarray(weights, jnp.float32)
                )
                for place in places:
                    scores = score(_scaled(delta, points[place].lambda_))
                    found[place] = {name: float(value) for name, value in scores.items()}
    else:
        for program, variants in merges.items():  # a bad point is refused before anything is compiled
            for numbers, weights in variants:
                given = None if weights is None else jnp.asarray(weights, jnp.float32)
                jax.eval_shape(
                    functools.partial(merged, program=program, numbers=dict(numbers), weights=given), deltas, base
                )

        @jax.jit
        def whole(deltas: Any, base: Any) -> list[dict[str, Array]]:
            parts = merges.items()
            return [_mapped(deltas, base, program, variants, points, merged, score) for program, variants in parts]

        results = whole(deltas, base)
        for variants, scores in zip(merges.values(), results, strict=True):
            for row, places in enumerate(variants.values()):
                for column, place in enumerate(places):
                    found[place] = {name: float(value[row, column]) for name, value in scores.items()}
    return [Trial(point, scores) for point, scores in zip(points, found, strict=True) if scores is not None]


def _parts(point: Point) -> tuple[tuple, tuple]:
    """What a program is compiled for, and the numbers it is mapped over."""
    _, rule = find_rule(point.method, point.semantics)
    static = {p.name for p in rule.hyperparameters if p.static}
    fixed = tuple((name, value) for name, value in point.settings if name in static)
    numbers = tuple((name, value) for name, value in point.settings if name not in static)
    program = (point.method, point.semantics, fixed, point.weights is None)
    return program, (numbers, point.weights)


def _mapped(
    deltas: Any,
    base: Any,
    program: tuple,
    variants: Mapping[tuple, Sequence[int]],
    points: Sequence[Point],
    merged: Callable[..., Any],
    score: Score,
) -> dict[str, Float[Array, "merges lambdas"]]:
    """One method's merges, one after another, and for each its lambdas."""
    most = max(len(places) for places in variants.values())
    # Short rows are filled up with their last lambda.
    factors = [[points[p].lambda_ for p in places] for places in variants.values()]
    padded = jnp.asarray([row + row[-1:] * (most - len(row)) for row in factors], jnp.float32)
    names = [name for name, _ in next(iter(variants))[0]]
    numbers = {name: jnp.asarray([dict(own)[name] for own, _ in variants], jnp.float32) for name in names}
    given = [weights for _, weights in variants if weights is not None]
    weights = jnp.asarray(given, jnp.float32) if given else None

    def one(item: tuple) -> Any:
        numbers, weights, factors = item
        delta = merged(deltas, base, program, numbers, weights)
        return jax.lax.map(lambda factor: dict(score(_scaled(delta, factor))), factors)

    return jax.lax.map(one, (numbers, weights, padded))


def _scaled(delta: Any, factor: Any) -> Any:
    return jax.tree.map(lambda x: (jnp.asarray(factor, jnp.float32) * x.astype(jnp.float32)).astype(x.dtype), delta)


def choose(trials: Sequence[Trial], *, forget: str, retain: str, base_retain: float, share: float = 0.95) -> Trial:
    """NegMerge's rule (2410.05583, section 4.1): the lowest forget score among the trials whose retain score is at
    least `share` of the base's, on the same split. Of equal ones the smaller lambda, then the earlier point.

    Raises:
      UserError: no trial reaches that retain score (with the best there is); no trials; a score that they lack.
    """
    _check(trials, (forget, retain))
    floor = share * base_retain
    able = [t for t in trials if t.scores[retain] >= floor and not np.isnan(t.scores[forget])]
    if not able:
        best = max(trials, key=lambda t: -np.inf if np.isnan(t.scores[retain]) else t.scores[retain])
        raise UserError(
            f"search: no merge keeps {retain} at {share:g} of the base's {base_retain:g} ({floor:g}); the best is "
            f"{best.scores[retain]:g} ({best.point}); try smaller lambdas"
        )
    return min(able, key=lambda t: (t.scores[forget], t.point.lambda_))


def pareto(
    trials: Sequence[Trial], *, minimise: Sequence[str] = ("forget",), maximise: Sequence[str] = ("retain",)
) -> list[Trial]:
    """The trials than which no other is at least as good in every named score and better in one, in their order.

    Raises:
      UserError: no trials; a score that they lack; no score named.
    """
    _check(trials, (*minimise, *maximise))
    if not (minimise or maximise):
        raise UserError("search: name at least one score to minimise or maximise")
    goals = np.array([[*(-t.scores[n] for n in minimise), *(t.scores[n] for n in maximise)] for t in trials])
    goals = np.where(np.isnan(goals), -np.inf, goals)
    return [
        trial
        for trial, own in zip(trials, goals, strict=True)
        if not ((goals >= own).all(axis=1) & (goals > own).any(axis=1)).any()
    ]


def table(trials: Sequence[Trial]) -> str:
    """The trials as a Markdown table, a column per score."""
    _check(trials, ())
    names = list(trials[0].scores)
    lines = ["| merge | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    lines += [f"| {t.point} | " + " | ".join(f"{t.scores[n]:.4g}" for n in names) + " |" for t in trials]
    return "\n".join(lines)


def _check(trials: Sequence[Trial], names: Sequence[str]) -> None:
    if not trials:
        raise UserError("search: there are no trials")
    for name in names:
        if name not in trials[0].scores:
            raise UserError(f"search: no score is called {name!r}; there are {', '.join(trials[0].scores)}")
