"""Making deltas sparse before they are summed: by magnitude, at random, by random ranks, or without the outliers.

A sparsifier decides per candidate which entries stay; `arithmetic` joins it with a sum or an election.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32
from unlearnjax_kernels.threshold import api as threshold

from unlearnjax.merging import trim
from unlearnjax.merging.protocol import (
    Draws,
    Hyperparameter,
    Leaves,
    Round,
    Settings,
    State,
    candidates,
    each,
    of_state,
)
from unlearnjax.merging.trim import DENSITY, EXACT_K, Trim

GAMMA = Hyperparameter(
    "gamma", "share of the largest entries that is dropped", default=0.01, low=0.0, high=1.0, per_candidate=True
)
EPSILON = Hyperparameter(
    "epsilon", "how far the keep rate of the largest and the smallest entry lies from density", default=0.15,
    low=0.0, high=1.0, per_candidate=True,
)  # fmt: skip


class Sparsifier(NamedTuple):
    """apply: (deltas[N, ...], state, draws, settings) -> per candidate the entries that stay (others 0), and the
    chance that each had of staying: what `x / chance` needs to have the mean of x. The chance is 1 where no random
    number was drawn.
    """

    apply: Callable[
        [Float[Array, "N ..."], State, Draws, Settings],
        list[tuple[Float32[Array, "..."], Float32[Array, "..."]]],
    ]
    hyperparameters: tuple[Hyperparameter, ...] = ()
    start: Callable[[int, int, Settings], State] = lambda size, count, settings: ()
    rounds: tuple[Round, ...] = ()
    needs_key: bool = False
    elementwise: bool = True


def _whole(
    deltas: Float[Array, "N ..."], state: State, draws: Draws, settings: Settings
) -> list[tuple[Float32[Array, "..."], Float32[Array, "..."]]]:
    return [(delta, jnp.float32(1)) for delta in candidates(deltas)]


def _largest(
    deltas: Float[Array, "N ..."], state: Trim, draws: Draws, settings: Settings
) -> list[tuple[Float32[Array, "..."], Float32[Array, "..."]]]:
    return [(delta, jnp.float32(1)) for delta in trim.trimmed(deltas, state, draws)]


def _random(
    deltas: Float[Array, "N ..."], state: State, draws: Draws, settings: Settings
) -> list[tuple[Float32[Array, "..."], Float32[Array, "..."]]]:
    chances = [jnp.asarray(density, jnp.float32) for density in each(settings["density"], deltas.shape[0])]
    return [
        (jnp.where(draws.kept(i, delta.shape, chances[i]), delta, jnp.float32(0)), chances[i])
        for i, delta in enumerate(candidates(deltas))
    ]


def _random_ranks(
    deltas: Float[Array, "N ..."], state: State, draws: Draws, settings: Settings
) -> list[tuple[Float32[Array, "..."], Float32[Array, "..."]]]:
    """Chances from density - epsilon for a row's smallest entry to density + epsilon for its largest, by rank."""
    pairs = zip(*(each(settings[name], deltas.shape[0]) for name in ("density", "epsilon")), strict=True)
    found = []
    for i, (delta, pair) in enumerate(zip(candidates(deltas), pairs, strict=True)):
        density, epsilon = (jnp.asarray(value, jnp.float32) for value in pair)
        # The codes refuse chances outside (0, 1); a traced pair cannot be refused, and density 1 keeps everything.
        epsilon = jnp.minimum(epsilon, jnp.minimum(density, 1 - density))
        chance = density - epsilon + 2 * epsilon * _ranks(jnp.abs(delta))
        kept = draws.kept(i, delta.shape, chance)
        found.append((jnp.where(kept, delta, jnp.float32(0)), chance))
    return found


def _ranks(magnitudes: Float32[Array, "..."]) -> Float32[Array, "..."]:
    """Ranks along the second axis (a vector's only one) from 0 for the smallest to 1 for the largest; equal magnitudes
    rank in the order of their places."""
    axis = min(magnitudes.ndim - 1, 1)
    if axis < 0:
        return jnp.zeros_like(magnitudes)
    order = jnp.argsort(magnitudes, axis=axis, stable=True)
    ranks = jnp.argsort(order, axis=axis).astype(jnp.float32)
    return ranks / jnp.float32(max(magnitudes.shape[axis] - 1, 1))


class Band(NamedTuple):
    """Two thresholds: entries below the one for `outer.keep` are too small, those of `inner` are outliers."""

    outer: Trim
    inner: Trim


def _start_band(size: int, count: int, settings: Settings) -> Band:
    pairs = zip(*(each(settings[name], count) for name in ("density", "gamma")), strict=True)
    counts = zip(*(_band_counts(size, *pair) for pair in pairs), strict=True)
    return Band(*(Trim(jnp.stack(keep), threshold.search(count, size)) for keep in counts))


def _band_counts(size: int, density: Any, gamma: Any) -> tuple[Int32[Array, "2"], Int32[Array, "2"]]:
    """How many entries reach the lower threshold, and how many the upper one, in limbs."""
    if all(isinstance(value, (int, float)) for value in (density, gamma)):
        kept = min(int(density * size), size)
        dropped = min(int(gamma * size), size - kept)
        return threshold.to_limbs(kept + dropped), threshold.to_limbs(dropped)
    whole = jnp.float32(size)
    share = jnp.minimum(jnp.floor(jnp.asarray(density, jnp.float32) * whole), whole)
    above = jnp.minimum(jnp.floor(jnp.asarray(gamma, jnp.float32) * whole), whole - share)
    return _limbs(share) + _limbs(above), _limbs(above)


def _limbs(number: Float32[Array, ""]) -> Int32[Array, "2"]:
    high = jnp.floor(number / 65536)
    return jnp.stack([(number - high * 65536).astype(jnp.int32), high.astype(jnp.int32)])


def _aim_band(state: Band, found: tuple[threshold.Sample, threshold.Sample], settings: Settings) -> Band:
    pairs = zip(state, found, strict=True)
    return Band(*(t._replace(search=threshold.aim(t.search, own, t.keep)) for t, own in pairs))


def _narrow_band(state: Band, counts: tuple[Int32[Array, "N P 2"], Int32[Array, "N P 2"]], settings: Settings) -> Band:
    pairs = zip(state, counts, strict=True)
    return Band(*(Trim(t.keep, threshold.narrow(t.search, found, t.keep)) for t, found in pairs))


def _band_done(state: Band) -> Bool[Array, ""]:
    return jnp.stack([threshold.done(t.search, t.keep) for t in state]).all()


def _band_at_once(leaves: Leaves, state: Band, settings: Settings) -> Band:
    return Band(*(trim.at_once(leaves, t, settings) for t in state))


def _band_settled(state: Band) -> bool:
    return trim.settled(state.outer)


def _inside(
    deltas: Float[Array, "N ..."], state: Band, draws: Draws, settings: Settings
) -> list[tuple[Float32[Array, "..."], Float32[Array, "..."]]]:
    masks = zip(trim.reaches(deltas, state.outer), trim.reaches(deltas, state.inner), strict=True)
    return [
        (jnp.where(large & ~outlier, delta, jnp.float32(0)), jnp.float32(1))
        for (large, outlier), delta in zip(masks, candidates(deltas), strict=True)
    ]


_SAMPLE = of_state(lambda deltas, state: tuple(threshold.sample(deltas, t.search) for t in state))
_COUNT = of_state(lambda deltas, state: tuple(threshold.count(deltas, t.search) for t in state))

WHOLE = Sparsifier(_whole)
LARGEST = Sparsifier(_largest, (DENSITY, EXACT_K), trim.start, (*trim.ROUNDS, trim.CUT))
RANDOM = Sparsifier(_random, (DENSITY,), needs_key=True)
RANDOM_RANKS = Sparsifier(_random_ranks, (DENSITY, EPSILON), needs_key=True, elementwise=False)
INSIDE = Sparsifier(
    _inside,
    (DENSITY, GAMMA),
    _start_band,
    (Round(_COUNT, _narrow_band, _band_done, Round(_SAMPLE, _aim_band), _band_at_once, _band_settled),),
)
