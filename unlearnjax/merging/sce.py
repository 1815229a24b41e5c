"""SCE (2408.07990): select the entries that vary most, calculate the candidates' weights, erase the losing sign.

    select     keep the int(select_topk * V) entries of largest variance over the candidates, of the V where it is not 0
    calculate  w_i = the mean square of candidate i's selected entries, over the sum of all candidates'
    erase      drop entries whose sign is not that of the candidates' sum (0 counts as plus)
    fuse       sum of w_i x_i over what is left, divided by its summed w_i

"mergekit" weighs the candidates equally where the summed mean squares are below 1e-6, which fine-tunes' small deltas
often are, and divides by no less than 1e-6. There are no weights of the user's.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32
from unlearnjax_kernels.threshold import api as threshold

from unlearnjax.merging.linear import only_equal
from unlearnjax.merging.protocol import (
    LAMBDA,
    Draws,
    Hyperparameter,
    MergeMethod,
    Properties,
    Rule,
    Settings,
    State,
    candidates,
    total,
)

SELECT = Hyperparameter("select_topk", "share of the varying entries that is kept", default=1.0, low=0.0, high=1.0)


def _rounded(product: Float32[Array, "..."]) -> Float32[Array, "..."]:
    """It without its last bit. XLA computes a variance again wherever it is used, and beside an addition a product
    would become part of a fused multiply-add, which rounds otherwise: an entry could miss its own threshold.
    """
    bits = jax.lax.bitcast_convert_type(product, jnp.uint32) & jnp.uint32(0xFFFFFFFE)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _selected(points: list[Float32[Array, "..."]], share: Float32[Array, ""]) -> Bool[Array, "..."]:
    mean = _rounded(total(points) / len(points))
    variance = total([_rounded(jnp.square(x - mean)) for x in points]) / len(points)
    # The product in float32, as in mergekit.
    number = jnp.sum(variance > 0, dtype=jnp.int32).astype(jnp.float32) * share
    pattern = threshold.kth_magnitude(variance[None], number.astype(jnp.int32))[0]
    return (threshold.magnitude_bits(variance) >= pattern) | (share >= 1)


def _combine(guard: float) -> Callable[..., Float32[Array, "..."]]:
    """guard: the sums that count as none."""

    def combine(
        deltas: Float[Array, "N ..."],
        weights: Float32[Array, "N"],
        state: State,
        draws: Draws,
        base: Array | None,
        settings: Settings,
    ) -> Float32[Array, "..."]:
        kept = _selected(candidates(deltas), jnp.asarray(settings["select_topk"], jnp.float32))
        points = [jnp.where(kept, delta, jnp.float32(0)) for delta in candidates(deltas)]
        squares = jnp.stack([jnp.mean(x * x) for x in points])
        whole = jnp.sum(squares)
        equal = (whole < guard) | (whole == 0)
        own = jnp.where(equal, jnp.float32(1 / len(points)), squares / jnp.where(equal, jnp.float32(1), whole))
        positive = total(points) >= 0
        agrees = [jnp.where(positive, x > 0, x < 0) for x in points]
        value = total([jnp.where(keep, own[i] * points[i], jnp.float32(0)) for i, keep in enumerate(agrees)])
        divisor = total([jnp.where(keep, own[i], jnp.float32(0)) for i, keep in enumerate(agrees)])
        divisor = jnp.where(divisor == 0, jnp.float32(1), jnp.maximum(divisor, jnp.float32(guard)))
        return settings["lambda"] * value / divisor

    return combine


def _rule(semantics: str, source: str, guard: float) -> Rule:
    return Rule(
        semantics, source, _combine(guard),
        Properties(
            identity=(("select_topk", 1.0), ("lambda", 1.0)), weighted=False, negation="unless sums cancel",
            scale_equivariance=guard == 0, elementwise=False,
        ),
        hyperparameters=(SELECT, LAMBDA), check_weights=only_equal,
    )  # fmt: skip


SCE = MergeMethod(
    "sce",
    "select what varies most, weigh by squares, erase the losing sign",
    (
        _rule("paper", "SCE 2408.07990 (FuseChat), section 3.3", 0.0),
        _rule("mergekit", "mergekit 0.1.4 merge_method sce", 1e-6),
    ),
)
