"""Sign consensus in XLA: all candidates in one elementwise fusion, or one candidate at a time into running votes."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int16, Int32


class Votes(NamedTuple):
    """What the candidates so far add up to. Sums are over w_i x_i and |w_i|; only a mean of the agreeing needs them
    apart by sign, so a mean of all takes two bytes per vote and four for the sum: no more than two models of float32.
    """

    up: Float32[Array, "..."]
    """Over the positive entries, or over all."""
    down: Float32[Array, "..."]
    """Over the negative entries, or a scalar 0."""
    up_share: Float32[Array, "..."]
    """The weights of the positive entries, or of all (a scalar)."""
    down_share: Float32[Array, "..."]
    ups: Int16[Array, "..."] | Int32[Array, "..."]
    downs: Int16[Array, "..."] | Int32[Array, "..."]


def start(shape: tuple[int, ...], agreeing: bool, counts: type = jnp.int16) -> Votes:
    """No votes. `counts`: the dtype they are counted in."""
    sums, number, none = jnp.zeros(shape, jnp.float32), jnp.zeros(shape, counts), jnp.float32(0)
    own = sums if agreeing else none
    return Votes(sums, own, own, own, number, number)


def add(votes: Votes, delta: Float[Array, "..."], weight: Float32[Array, ""], agreeing: bool) -> Votes:
    """The votes with one more candidate's."""
    x, strength, none = weight * delta.astype(jnp.float32), jnp.abs(weight), jnp.float32(0)
    if agreeing:
        sums = (
            votes.up + jnp.where(x > 0, x, none),
            votes.down + jnp.where(x < 0, x, none),
            votes.up_share + jnp.where(x > 0, strength, none),
            votes.down_share + jnp.where(x < 0, strength, none),
        )
    else:
        sums = (votes.up + x, none, votes.up_share + strength, none)
    kind = votes.ups.dtype
    return Votes(*sums, votes.ups + (x > 0).astype(kind), votes.downs + (x < 0).astype(kind))


def finish(votes: Votes, needed: Int32[Array, ""], agreeing: bool, conflict: bool) -> Float32[Array, "..."]:
    """The mean at the entries that are kept, 0 elsewhere."""
    none = jnp.float32(0)
    # `needed` is more than half of the candidates that vote, so never both.
    up, down = (number.astype(jnp.int32) >= needed for number in (votes.ups, votes.downs))
    if agreeing:
        value, share = jnp.where(up, votes.up, votes.down), jnp.where(up, votes.up_share, votes.down_share)
    else:
        value, share = votes.up, votes.up_share
    kept = ~(up | down) if conflict else (up & (value > 0)) | (down & (value < 0))
    return jnp.where(kept, value / jnp.where(share == 0, jnp.float32(1), share), none)


def consensus(
    deltas: Float[Array, "N ..."],
    weights: Float32[Array, "N"],
    needed: Int32[Array, ""],
    agreeing: bool,
    conflict: bool,
) -> Float32[Array, "..."]:
    """See `api.consensus`. Votes are counted in 32 bits, as wide as the entries: narrower ones would break up the
    fusion's vectors."""
    votes = start(deltas.shape[1:], agreeing, jnp.int32)
    for i in range(weights.shape[0]):
        votes = add(votes, deltas[i], weights[i], agreeing)
    return finish(votes, needed, agreeing, conflict)
