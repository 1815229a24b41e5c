"""RAM and RAM+ (2601.13572): what one candidate alone has changed is kept whole, what several have is averaged.

A candidate has changed an entry where |delta| > epsilon. ramplus_tl (mergekit: "tensor-local") multiplies the entries
that are a candidate's alone by 1 + r min(shared / alone, alpha), with its numbers of shared and of own entries in the
tensor. Neither has weights.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32
from unlearnjax_kernels.threshold.api import to_limbs

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
    State,
    candidates,
    total,
)

EPSILON = Hyperparameter("epsilon", "largest magnitude that counts as no change", default=1e-5, low=0.0)
R = Hyperparameter("r", "what own entries gain per shared one", default=0.1, low=0.0)
ALPHA = Hyperparameter("alpha", "the most that shared / own counts", default=0.2, low=0.0)


def _changed(deltas: Float[Array, "N ..."], settings: Settings) -> tuple[list[Bool[Array, "..."]], Int32[Array, "..."]]:
    """Per candidate what it has changed, and by how many candidates each entry was."""
    masks = [jnp.abs(delta) > settings["epsilon"] for delta in candidates(deltas)]
    return masks, total([mask.astype(jnp.int32) for mask in masks])


def _counts(
    deltas: Float[Array, "N ..."],
    weights: Float32[Array, "N"],
    state: State,
    draws: Draws,
    base: Array | None,
    settings: Settings,
) -> Int32[Array, "N 2 2"]:
    masks, number = _changed(deltas, settings)
    counts = [
        jnp.stack([jnp.sum(mask & (number > 1), dtype=jnp.int32), jnp.sum(mask & (number == 1), dtype=jnp.int32)])
        for mask in masks
    ]
    return to_limbs(jnp.stack(counts))


def _gain(state: State, counts: Int32[Array, "N 2 2"], settings: Settings) -> Float32[Array, "N"]:
    numbers = counts[..., 1].astype(jnp.float32) * 65536 + counts[..., 0].astype(jnp.float32)
    # mergekit's floor under the divisor is its epsilon of 1e-5: where nothing is a candidate's own, alpha.
    ratio = numbers[:, 0] / jnp.maximum(numbers[:, 1], jnp.float32(1e-5))
    return 1 + settings["r"] * jnp.clip(ratio, 0, settings["alpha"])


def _combine(gains: bool) -> Callable[..., Float32[Array, "..."]]:
    def combine(
        deltas: Float[Array, "N ..."],
        weights: Float32[Array, "N"],
        state: State,
        draws: Draws,
        base: Array | None,
        settings: Settings,
    ) -> Float32[Array, "..."]:
        masks, number = _changed(deltas, settings)
        kept = [jnp.where(mask, x, jnp.float32(0)) for mask, x in zip(masks, candidates(deltas), strict=True)]
        mean = total(kept) / jnp.maximum(number, 1).astype(jnp.float32)
        if not gains:  # one candidate's own entry is the mean of one
            return settings["lambda"] * mean
        alone = total([state[i] * x for i, x in enumerate(kept)])
        return settings["lambda"] * jnp.where(number == 1, alone, mean)

    return combine


_PROPERTIES = Properties(identity=None, weighted=False, scale_equivariance=False)

METHODS = (
    MergeMethod(
        "ram",
        "entries that one candidate changed whole, the others averaged",
        (
            Rule(
                "paper", "RAM 2601.13572, as in mergekit", _combine(False), _PROPERTIES,
                hyperparameters=(EPSILON, LAMBDA), check_weights=only_equal,
            ),
        ),
    ),
    MergeMethod(
        "ramplus_tl",
        "RAM with a candidate's own entries enlarged",
        (
            Rule(
                "mergekit", "mergekit merge_method ramplus_tl, after RAM+ 2601.13572", _combine(True), _PROPERTIES,
                hyperparameters=(R, ALPHA, EPSILON, LAMBDA), check_weights=only_equal,
                start=lambda size, count, settings: jnp.zeros(count, jnp.float32), rounds=(Round(_counts, _gain),),
            ),
        ),
    ),
)  # fmt: skip
