"""SCE (2408.07990): select the entries that vary most, calculate the candidates' weights, erase the losing sign.

    select     keep the int(select_topk * V) entries of largest variance over the candidates, of the V where it is not 0
    calculate  w_i = the mean square of candidate i's selected entries, over the sum of all candidates'
    erase      drop entries whose sign is not that of the candidates' sum (0 counts as plus)
    fuse       sum of w_i x_i over what is left, divided by its summed w_i

"mergekit" weighs the candidates equally where the summed mean squares are below 1e-6, which fine-tunes' small deltas
often are, and divides by no less than 1e-6. There are no weights of the user's.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32
from unlearnjax_kernels.threshold import api as threshold

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

SELECT = Hyperparameter("select_topk", "share of the varying entries that is kept", default=1.0, low=0.0, high=1.0)


class Selected(NamedTuple):
    """How many entries to keep (limbs), the search for their least variance, and the candidates' sums of squares."""

    keep: Int32[Array, "2"]
    search: threshold.Search
    squares: Float32[Array, "N"]


def _start(size: int, count: int, settings: Settings) -> Selected:
    return Selected(threshold.to_limbs(0), threshold.search(1), jnp.zeros(count, jnp.float32))


def _variance(deltas: Float[Array, "N ..."]) -> Float32[Array, "1 ..."]:
    points = candidates(deltas)
    mean = total(points) / len(points)
    return (total([jnp.square(x - mean) for x in points]) / len(points))[None]


def _varying(
    deltas: Float[Array, "N ..."], weights: Array, state: Selected, draws: Draws | None, base: Array | None,
    settings: Settings,
) -> Int32[Array, "2"]:  # fmt: skip
    return threshold.to_limbs(jnp.sum(_variance(deltas) > 0, dtype=jnp.int32))


def _choose(state: Selected, number: Int32[Array, "2"], settings: Settings) -> Selected:
    """int(select_topk * number), in float32 as in mergekit."""
    whole = number[1].astype(jnp.float32) * 65536 + number[0].astype(jnp.float32)
    product = jnp.floor(whole * jnp.asarray(settings["select_topk"], jnp.float32))
    high = jnp.floor(product / 65536)
    return state._replace(keep=jnp.stack([(product - high * 65536).astype(jnp.int32), high.astype(jnp.int32)]))


def _count(
    deltas: Float[Array, "N ..."], weights: Array, state: Selected, draws: Draws | None, base: Array | None,
    settings: Settings,
) -> Int32[Array, "1 2"]:  # fmt: skip
    return threshold.count(_variance(deltas), state.search)


def _narrow(state: Selected, counts: Int32[Array, "1 2"], settings: Settings) -> Selected:
    return state._replace(search=threshold.narrow(state.search, counts, state.keep))


def _selected(deltas: Float[Array, "N ..."], state: Selected, settings: Settings) -> list[Float32[Array, "..."]]:
    reaches = threshold.magnitude_bits(_variance(deltas))[0] >= state.search.pattern[0]
    kept = reaches | (jnp.asarray(settings["select_topk"], jnp.float32) >= 1)
    return [jnp.where(kept, delta, jnp.float32(0)) for delta in candidates(deltas)]


def _squares(
    deltas: Float[Array, "N ..."], weights: Array, state: Selected, draws: Draws | None, base: Array | None,
    settings: Settings,
) -> Float32[Array, "N"]:  # fmt: skip
    points = _selected(deltas, state, settings)
    # The number of entries comes along as the last sum: a shard knows only its own.
    size = jnp.float32(points[0].size)
    return jnp.stack([*(jnp.sum(x * x) for x in points), size])


def _keep(state: Selected, sums: Float32[Array, "N1"], settings: Settings) -> Selected:
    return state._replace(squares=sums[:-1] / sums[-1])


def _combine(guard: float) -> Callable[..., Float32[Array, "..."]]:
    def combine(
        deltas: Float[Array, "N ..."],
        weights: Float32[Array, "N"],
        state: Selected,
        draws: Draws | None,
        base: Array | None,
        settings: Settings,
    ) -> Float32[Array, "..."]:
        points = _selected(deltas, state, settings)
        whole = jnp.sum(state.squares)
        equal = whole <= guard if guard == 0 else whole < guard
        own = jnp.where(equal, jnp.float32(1 / len(points)), state.squares / jnp.where(equal, jnp.float32(1), whole))
        positive = total(points) >= 0
        agrees = [jnp.where(positive, x > 0, x < 0) for x in points]
        value = total([jnp.where(keep, own[i] * x, jnp.float32(0)) for i, (keep, x) in enumerate(zip(agrees, points))])
        divisor = total([jnp.where(keep, own[i], jnp.float32(0)) for i, keep in enumerate(agrees)])
        floor = jnp.float32(guard)
        divisor = jnp.where(divisor == 0, jnp.float32(1), jnp.maximum(divisor, floor))
        return settings["lambda"] * value / divisor

    return combine


def _rule(semantics: str, source: str, guard: float) -> Rule:
    return Rule(
        semantics, source, _combine(guard),
        Properties(
            identity=(("select_topk", 1.0), ("lambda", 1.0)), zero_weight_is_absence=False,
            negation="unless sums cancel", scale_equivariance=guard == 0,
        ),
        hyperparameters=(SELECT, LAMBDA), start=_start,
        rounds=(Round(_varying, _choose), Round(_count, _narrow, repeat=threshold.BITS), Round(_squares, _keep)),
        check_weights=only_equal,
    )  # fmt: skip


SCE = MergeMethod(
    "sce",
    "select what varies most, weigh by squares, erase the losing sign",
    (
        _rule("paper", "SCE 2408.07990 (FuseChat), section 3.3", 0.0),
        _rule("mergekit", "mergekit 0.1.4 merge_method sce", 1e-6),
    ),
)
