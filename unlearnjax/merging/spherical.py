"""Interpolation on spheres: SLERP, NuSLERP, Multi-SLERP, the Karcher mean, and Model Stock.

All of them are linear combinations of the candidates whose coefficients depend on lengths and angles alone. So one
pass forms the Gram matrix of each tensor, the coefficients are found in N x N numbers, and one more pass combines:

    merged = sum_i c_i(G) x_i,    G_ij = <x_i, x_j>

origin = "zero" interpolates the models x_i = base + delta_i, which needs the base; origin = "base" the deltas. What
is returned is a delta either way.

- slerp (mergekit): from the first model to the second at t; linear where |cos| > .9995.
- nuslerp (mergekit): t = w_2 / (w_1 + w_2), one half where that sum is below 1e-6; linear where |sin| < 1e-8. With
  nuslerp_flatten=False each row is a vector of its own, or each column with nuslerp_row_wise=True, as mergekit names
  them.
- multislerp (mergekit): from the sphere's tangent space at the weighted mean of the directions; length: the weighted
  mean of the lengths.
- karcher (mergekit): the Karcher mean of the directions by at most max_iter steps, until one is shorter than tol;
  length: the weighted mean of the lengths. mergekit has no weights here; the default is its mean.
- model_stock (2403.19522): t times the deltas' mean, t = N cos / (1 + (N - 1) cos); for more than two candidates cos is
  the mean over all pairs, as in mergekit. filter_wise: each row by itself.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from unlearnjax.merging.linear import only_equal
from unlearnjax.merging.protocol import (
    LAMBDA,
    Draws,
    Hyperparameter,
    MergeMethod,
    Properties,
    Round,
    Rule,
    Settings,
    candidates,
    total,
)

Gram = Float32[Array, "... N N"]
Coefficients = Callable[[Gram, Float32[Array, "N"], Settings], Float32[Array, "... N"]]

T = Hyperparameter("t", "where between the first model (0) and the second (1)", low=0.0, high=1.0)
FLATTEN = Hyperparameter("nuslerp_flatten", "a whole tensor is one vector", default=True)
ROW_WISE = Hyperparameter("nuslerp_row_wise", "unflattened: the first axis is the vectors' own", default=False)
NORMALIZE_WEIGHTS = Hyperparameter("normalize_weights", "divide the weights by their sum", default=True)
EPS = Hyperparameter("eps", "lengths below it count as none", default=1e-8, low=0.0)
MAX_ITER = Hyperparameter("max_iter", "most steps", default=10.0, low=0.0, high=10000.0)
TOL = Hyperparameter("tol", "lengths and angles below it count as none", default=1e-5, low=0.0)
FILTER_WISE = Hyperparameter("filter_wise", "each row has an angle of its own", default=False)


def origin(default: str) -> Hyperparameter:
    return Hyperparameter(
        "origin", "interpolate the models, or their deltas from the base", default=default, choices=("zero", "base")
    )


def _points(deltas: Float[Array, "N ..."], base: Array | None, settings: Settings) -> list[Float32[Array, "..."]]:
    found = candidates(deltas)
    if settings.get("origin", "base") == "base":
        return found
    assert base is not None  # `wants_base`
    return [base.astype(jnp.float32) + delta for delta in found]


def _inner(x: Float32[Array, "..."], y: Float32[Array, "..."], axes: tuple[int, ...] | None) -> Float32[Array, "..."]:
    """The sum of products; over everything in two steps, so that its rounding grows with the axes and not the size."""
    if axes is not None:
        return jnp.sum(x * y, axis=axes)
    return jnp.sum(jnp.sum(x * y, axis=-1)) if x.ndim else x * y


def _gram(points: list[Float32[Array, "..."]], axes: tuple[int, ...] | None = None) -> Gram:
    """Inner products over `axes`, or over everything; what is left of the axes comes first."""
    n = len(points)
    pairs = {(i, j): _inner(points[i], points[j], axes) for i in range(n) for j in range(i, n)}
    rows = [jnp.stack([pairs[min(i, j), max(i, j)] for j in range(n)], axis=-1) for i in range(n)]
    return jnp.stack(rows, axis=-2)


def _statistics(
    deltas: Float[Array, "N ..."],
    weights: Float32[Array, "N"],
    state: Gram,
    draws: Draws,
    base: Array | None,
    settings: Settings,
) -> Gram:
    return _gram(_points(deltas, base, settings))


def _keep(state: Gram, found: Gram, settings: Settings) -> Gram:
    return found


def _mixed(
    factors: list[Float32[Array, "..."]],
    deltas: Float[Array, "N ..."],
    base: Array | None,
    settings: Settings,
) -> Float32[Array, "..."]:
    """lambda (sum_i c_i x_i - base), from the deltas: the difference of two models would lose their last digits."""
    value = total([c * delta for c, delta in zip(factors, candidates(deltas), strict=True)])
    if settings.get("origin", "base") == "zero":
        assert base is not None
        value = value + (total(factors) - 1) * base.astype(jnp.float32)
    return settings["lambda"] * value


def _combine(coefficients: Coefficients) -> Callable[..., Float32[Array, "..."]]:
    def combine(
        deltas: Float[Array, "N ..."],
        weights: Float32[Array, "N"],
        state: Gram,
        draws: Draws,
        base: Array | None,
        settings: Settings,
    ) -> Float32[Array, "..."]:
        return _mixed(list(coefficients(state, weights, settings)), deltas, base, settings)

    return combine


def _rows(coefficients: Coefficients, flag: str, whole: bool) -> Callable[..., Float32[Array, "..."]]:
    """As `_combine`, but where the setting `flag` is not `whole` each row (or column) is a vector of its own."""

    def combine(
        deltas: Float[Array, "N ..."],
        weights: Float32[Array, "N"],
        state: Gram,
        draws: Draws,
        base: Array | None,
        settings: Settings,
    ) -> Float32[Array, "..."]:
        if settings[flag] == whole or deltas.ndim < 3:  # a vector is one row
            return _combine(coefficients)(deltas, weights, state, draws, base, settings)
        axis = 0 if settings.get("nuslerp_row_wise", False) else -1
        points = [jnp.moveaxis(x, axis, -1) for x in _points(deltas, base, settings)]
        found = coefficients(_gram(points, (-1,)), weights, settings)
        factors = [jnp.moveaxis(found[..., i, None], -1, axis) for i in range(len(points))]
        return _mixed(factors, deltas, base, settings)

    return combine


def _lengths(gram: Gram) -> Float32[Array, "... N"]:
    return jnp.sqrt(jnp.diagonal(gram, axis1=-2, axis2=-1))


def _arc(
    gram: Gram, size: Float32[Array, "... 2"], t: Float32[Array, ""]
) -> tuple[Array, Float32[Array, "... 2"], Array]:
    """cos, the coefficients of the arc at t, and sin."""
    cos = gram[..., 0, 1] / (size[..., 0] * size[..., 1])
    angle = jnp.arccos(jnp.clip(cos, -1, 1))
    sin = jnp.sin(angle)
    safe = jnp.where(sin == 0, jnp.float32(1), sin)
    return cos, jnp.stack([jnp.sin((1 - t) * angle), jnp.sin(t * angle)], axis=-1) / safe[..., None], sin


def _linear(t: Float32[Array, ""]) -> Float32[Array, "2"]:
    return jnp.stack([1 - t, t])


def _slerp(gram: Gram, weights: Float32[Array, "N"], settings: Settings) -> Float32[Array, "... 2"]:
    t = jnp.asarray(settings["t"], jnp.float32)
    size = _lengths(gram)
    cos, arc, _ = _arc(gram, jnp.where(size > 1e-8, size, jnp.float32(1)), t)
    return jnp.where((jnp.abs(cos) > 0.9995)[..., None], _linear(t), arc)


def _nuslerp(gram: Gram, weights: Float32[Array, "N"], settings: Settings) -> Float32[Array, "... 2"]:
    whole = weights[0] + weights[1]
    small = jnp.abs(whole) < 1e-6
    t = jnp.where(small, jnp.float32(0.5), weights[1] / jnp.where(small, jnp.float32(1), whole))
    _, arc, sin = _arc(gram, jnp.maximum(_lengths(gram), jnp.float32(1e-7)), t)
    return jnp.where((jnp.abs(sin) < 1e-8)[..., None], _linear(t), arc)


def _multislerp(gram: Gram, weights: Float32[Array, "N"], settings: Settings) -> Float32[Array, "N"]:
    eps = jnp.asarray(settings["eps"], jnp.float32)
    if settings["normalize_weights"]:
        whole = jnp.sum(weights)
        weights = weights / jnp.where(whole == 0, jnp.float32(1), whole)
    size = _lengths(gram)
    unit = 1 / (size + eps)
    cosines = gram * unit[:, None] * unit[None]
    along = cosines @ weights  # <u_i, sum_j w_j u_j>
    length = jnp.sqrt(jnp.maximum(weights @ along, 0))
    safe = jnp.where(length < eps, jnp.float32(1), length)
    mean = weights / safe
    # The tangent at the mean, sum_i w_i (u_i - <u_i, m> m), in terms of the u_i.
    tangent = weights - (weights @ (along / safe)) * mean
    reach = jnp.sqrt(jnp.maximum(tangent @ cosines @ tangent, 0)) + eps
    arc = (mean * jnp.cos(reach) + tangent * (jnp.sin(reach) / reach)) * (size @ weights) * unit
    return jnp.where(length < eps, weights, arc)


def _karcher(gram: Gram, weights: Float32[Array, "N"], settings: Settings) -> Float32[Array, "N"]:
    tol = jnp.asarray(settings["tol"], jnp.float32)
    size = _lengths(gram)
    valid = size > tol
    unit = jnp.where(valid, 1 / jnp.where(valid, size, jnp.float32(1)), jnp.float32(0))
    cosines = gram * unit[:, None] * unit[None]
    whole = jnp.sum(jnp.where(valid, weights, jnp.float32(0)))
    alphas = jnp.where(valid, weights, jnp.float32(0)) / jnp.where(whole == 0, jnp.float32(1), whole)

    def length(x: Float32[Array, "N"]) -> Float32[Array, ""]:
        return jnp.sqrt(jnp.maximum(x @ cosines @ x, 0))

    start = length(alphas)
    first = (jnp.arange(len(valid)) == jnp.argmax(valid)).astype(jnp.float32)
    u = jnp.where(start < tol, first, alphas / jnp.where(start < tol, jnp.float32(1), start))

    def step(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        u, number, _ = carry
        cos = jnp.clip(cosines @ u, -1, 1)
        angle = jnp.arccos(cos)
        far = angle >= tol
        pull = jnp.where(far, alphas * angle / jnp.where(far, jnp.sin(angle), jnp.float32(1)), jnp.float32(0))
        tangent = pull - jnp.sum(pull * cos) * u
        reach = length(tangent)
        moves = reach >= tol
        moved = jnp.cos(reach) * u + jnp.sin(reach) * tangent / jnp.where(moves, reach, jnp.float32(1))
        moved = moved / jnp.maximum(length(moved), tol)
        return jnp.where(moves, moved, u), number + 1, moves

    def going(carry: tuple[Array, Array, Array]) -> Array:
        return carry[2] & (carry[1] < jnp.asarray(settings["max_iter"], jnp.float32))

    u, _, _ = jax.lax.while_loop(going, step, (u, jnp.float32(0), jnp.asarray(True)))
    return jnp.where(jnp.any(valid), u * (size @ weights) * unit, jnp.float32(0))


def _stock(gram: Gram, weights: Float32[Array, "N"], settings: Settings) -> Float32[Array, "... N"]:
    n = gram.shape[-1]
    size = _lengths(gram)
    products = size[..., :, None] * size[..., None, :]
    cosines = jnp.clip(gram / jnp.maximum(products, jnp.float32(1e-6)), -1, 1)
    cos = jnp.mean(cosines[..., *np.triu_indices(n, 1)], axis=-1)
    t = n * cos / (1 + (n - 1) * cos)
    return jnp.broadcast_to((t / n)[..., None], (*t.shape, n))


def _refuse_zero(weights: np.ndarray, settings: Settings) -> str | None:
    return "they sum to 0" if weights.sum() == 0 else None


def _start(size: int, count: int, settings: Settings) -> Gram:
    return jnp.zeros((count, count), jnp.float32)


def _models(settings: Settings) -> bool:
    return settings["origin"] == "zero"


_GRAM = (Round(_statistics, _keep),)
_NONE = Properties(identity=None, scale_equivariance=False, negation="never")
_ANGLES = Properties(identity=None, elementwise=False)

SLERP = MergeMethod(
    "slerp",
    "from one model to another along the arc between them",
    (
        Rule(
            "mergekit", "mergekit 0.1.4 merge_method slerp", _combine(_slerp),
            # The order is t's, and there are no weights.
            _NONE._replace(permutation_invariance=False, weighted=False),
            hyperparameters=(T, origin("zero"), LAMBDA), start=_start, rounds=_GRAM, check_weights=only_equal,
            needs_base=_models, least=2, most=2,
        ),
    ),
)  # fmt: skip
NUSLERP = MergeMethod(
    "nuslerp",
    "between two models or deltas along their arc, by weights",
    (
        Rule(
            "mergekit", "mergekit 0.1.4 merge_method nuslerp", _rows(_nuslerp, "nuslerp_flatten", True),
            _ANGLES._replace(zero_weight_is_absence=False),
            hyperparameters=(FLATTEN, ROW_WISE, origin("base"), LAMBDA), start=_start, rounds=_GRAM,
            check_weights=_refuse_zero, needs_base=_models, least=2, most=2,
        ),
    ),
)  # fmt: skip
MULTISLERP = MergeMethod(
    "multislerp",
    "barycentre on the sphere, through the tangent space at the mean direction",
    (
        Rule(
            "mergekit", "mergekit 0.1.4 merge_method multislerp", _combine(_multislerp),
            Properties(identity=None),
            hyperparameters=(NORMALIZE_WEIGHTS, EPS, origin("base"), LAMBDA), start=_start, rounds=_GRAM,
            check_weights=_refuse_zero, needs_base=_models,
        ),
    ),
)  # fmt: skip
KARCHER = MergeMethod(
    "karcher",
    "Riemannian mean of the directions",
    (
        Rule(
            "mergekit", "mergekit 0.1.4 merge_method karcher", _combine(_karcher),
            _NONE,
            hyperparameters=(MAX_ITER, TOL, origin("zero"), LAMBDA), start=_start, rounds=_GRAM,
            check_weights=_refuse_zero, needs_base=_models,
        ),
    ),
)  # fmt: skip
MODEL_STOCK = MergeMethod(
    "model_stock",
    "the mean, shortened by how far the deltas point apart",
    (
        Rule(
            "paper", "Model Stock 2403.19522, equation 6; the mean of the pairs' angles is mergekit's",
            _rows(_stock, "filter_wise", False), _ANGLES._replace(weighted=False),
            hyperparameters=(FILTER_WISE, LAMBDA), start=_start, rounds=_GRAM, check_weights=only_equal, least=2,
        ),
    ),
)  # fmt: skip
METHODS = (SLERP, NUSLERP, MULTISLERP, KARCHER, MODEL_STOCK)
