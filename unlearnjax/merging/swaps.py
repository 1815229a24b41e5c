"""Methods for one candidate beside its base: NearSwap, Arcee Fusion and passthrough, as mergekit defines them.

- nearswap: entries move to the candidate's the more the nearer they are: delta * clip(t / max(|delta|, 1e-6), 0, 1).
- arcee_fusion: entries whose importance, |delta| times the row's KL divergence of softmax(model) from softmax(base),
  reaches the tensor's median + 1.5 interquartile ranges move; the others stay. mergekit takes the quartiles of a
  random million entries where a tensor is larger; here they are exact.
- passthrough: the model, times scale.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32
from unlearnjax_kernels.threshold import api as threshold

from unlearnjax.merging.protocol import (
    LAMBDA,
    Draws,
    Hyperparameter,
    MergeMethod,
    Properties,
    Rule,
    Settings,
    State,
)

T = Hyperparameter("t", "distance within which an entry moves all the way", low=0.0)
SCALE = Hyperparameter("scale", "what the model is multiplied by", default=1.0)


def _nearswap(
    deltas: Float[Array, "1 ..."],
    weights: Float32[Array, "1"],
    state: State,
    draws: Draws,
    base: Array | None,
    settings: Settings,
) -> Float32[Array, "..."]:
    delta = deltas[0].astype(jnp.float32)
    return settings["lambda"] * delta * jnp.clip(settings["t"] / jnp.maximum(jnp.abs(delta), jnp.float32(1e-6)), 0, 1)


def _fusion(
    deltas: Float[Array, "1 ..."],
    weights: Float32[Array, "1"],
    state: State,
    draws: Draws,
    base: Array | None,
    settings: Settings,
) -> Float32[Array, "..."]:
    assert base is not None  # needs_base
    before, delta = base.astype(jnp.float32), deltas[0].astype(jnp.float32)
    axis = -1 if delta.ndim else None
    p, q = (jax.nn.softmax(x, axis=axis) + jnp.float32(1e-8) for x in (before + delta, before))
    divergence = jnp.sum(p * jnp.log(p / q), axis=axis, keepdims=delta.ndim > 0)
    importance = jnp.abs(delta) * divergence
    # Rounding can make a divergence of almost 0 negative; among magnitudes those are zeros.
    ranked = jnp.maximum(importance, jnp.float32(0))[None]
    q1, median, q3 = (_quantile(ranked, share) for share in (0.25, 0.5, 0.75))
    limit = median + 1.5 * (q3 - q1)
    return settings["lambda"] * jnp.where(importance >= limit, delta, jnp.float32(0))


def _quantile(x: Float32[Array, "1 ..."], share: float) -> Float32[Array, ""]:
    """The entry at place int(share * (size - 1)) from the smallest, of entries that are not negative."""
    from_smallest = int(share * (x.size - 1))
    return threshold.to_float(threshold.kth_magnitude(x, x.size - from_smallest))[0]


def _passthrough(
    deltas: Float[Array, "1 ..."],
    weights: Float32[Array, "1"],
    state: State,
    draws: Draws,
    base: Array | None,
    settings: Settings,
) -> Float32[Array, "..."]:
    assert base is not None  # needs_base
    scale = jnp.asarray(settings["scale"], jnp.float32)
    return settings["lambda"] * (scale * deltas[0].astype(jnp.float32) + (scale - 1) * base.astype(jnp.float32))


METHODS = (
    MergeMethod(
        "nearswap",
        "one candidate's entries, the more the nearer they are to the base",
        (
            Rule(
                "mergekit", "mergekit 0.1.4 merge_method nearswap", _nearswap,
                Properties(identity=None, scale_equivariance=False), hyperparameters=(T, LAMBDA), most=1,
            ),
        ),
    ),
    MergeMethod(
        "arcee_fusion",
        "one candidate's most important entries",
        (
            Rule(
                "mergekit", "mergekit 0.1.4 merge_method arcee_fusion", _fusion,
                Properties(identity=None, scale_equivariance=False, negation="never", elementwise=False),
                hyperparameters=(LAMBDA,), needs_base=True, spaces=("delta",), most=1,
            ),
        ),
    ),
    MergeMethod(
        "passthrough",
        "one candidate as it is, or scaled",
        (
            Rule(
                "mergekit", "mergekit 0.1.4 merge_method passthrough", _passthrough,
                Properties(identity=(("scale", 1.0), ("lambda", 1.0)), scale_equivariance=False, negation="never"),
                hyperparameters=(SCALE, LAMBDA), needs_base=True, spaces=("delta",), most=1,
            ),
        ),
    ),
)  # fmt: skip
