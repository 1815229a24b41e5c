"""Keeping a share of a delta's entries by magnitude: exact thresholds (unlearnjax_kernels.threshold).

Where several entries tie with the k-th largest magnitude all of them are kept; the published codes break such ties
arbitrarily. With `exact_k` only those at the lowest places are, k in all (see `exact`). A Python density gives
k = int(density * size) in double precision, as in those codes. A density that is a JAX array (traced or not) is
float32: its k may differ by about 6e-8 * size.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int32
from unlearnjax_kernels.threshold import api as threshold
from unlearnjax_kernels.threshold import host, passes

from unlearnjax.merging import exact
from unlearnjax.merging.protocol import Draws, Hyperparameter, Leaves, Round, Settings, candidates, each, of_state

DENSITY = Hyperparameter(
    "density", "share of each delta's entries that is kept", low=0.0, high=1.0, low_open=True, per_candidate=True
)
EXACT_K = Hyperparameter(
    "exact_k", "of entries that tie with the k-th largest keep only the first, k in all", default=False
)


class Trim(NamedTuple):
    """How many entries of each to keep (limbs), and the search for the thresholds that keep them."""

    keep: Int32[Array, "N 2"]
    search: threshold.Search
    cut: exact.Cut | None = None
    """With exact_k: which of the entries at the threshold stay. None: all of them."""


def keep_count(density: float | Float32[Array, ""], size: int, extra: int = 0) -> Int32[Array, "2"]:
    """min(int(density * size) + extra, size) in limbs (see the module's docstring on precision)."""
    if isinstance(density, (int, float)):
        return threshold.to_limbs(min(int(density * size) + extra, size))
    product = jnp.minimum(jnp.floor(jnp.asarray(density, jnp.float32) * jnp.float32(size)), jnp.float32(size))
    high = jnp.floor(product / 65536)
    low = product - high * 65536  # exact: all are multiples of the product's last bit
    return jnp.stack([low.astype(jnp.int32) + extra, high.astype(jnp.int32)])


def start(size: int, count: int, settings: Settings, extra: int = 0) -> Trim:
    keep = [keep_count(density, size, extra) for density in each(settings["density"], count)]
    stack = np.stack if all(isinstance(x, np.ndarray) for x in keep) else jnp.stack
    own = exact.begin(count, size) if settings.get("exact_k", False) else None
    return Trim(stack(keep), threshold.search(count, size), own)  # type: ignore[arg-type]


def _aim(state: Trim, found: threshold.Sample, settings: Settings) -> Trim:
    return state._replace(search=threshold.aim(state.search, found, state.keep))


def _narrow(state: Trim, counts: Int32[Array, "N P 2"], settings: Settings) -> Trim:
    return state._replace(search=threshold.narrow(state.search, counts, state.keep))


def _done(state: Trim) -> Bool[Array, ""]:
    return jnp.all(threshold.done(state.search, state.keep))


def at_once(leaves: Leaves, state: Trim, settings: Settings) -> Trim:
    keep = np.asarray(state.keep)
    if callable(leaves):
        low, high = np.asarray(state.search.at_low[0], np.int64)  # all entries: no pass has been made
        found = passes.found(leaves, keep, int((high << 16) + low))
        return state if found is None else state._replace(search=found)
    size = sum(leaf[0].size for leaf in leaves)
    found = passes.found(passes.through(leaves), keep, size) if size > host.KEPT else None
    return state._replace(search=host.found(leaves, keep) if found is None else found)


def settled(state: Trim) -> bool:
    return host.settled(state.search)


_SAMPLE = of_state(lambda deltas, state: threshold.sample(deltas, state.search))
_COUNT = of_state(lambda deltas, state: threshold.count(deltas, state.search))
ROUNDS = (Round(_COUNT, _narrow, _done, Round(_SAMPLE, _aim), at_once, settled),)


def _count_tied(
    deltas: Float[Array, "N ..."], weights: Any, state: Trim, draws: Draws, base: Any, settings: Settings
) -> Int32[Array, "N P"]:
    assert state.cut is not None
    return exact.count(deltas, state.search, state.cut, draws)


def _narrow_cut(state: Trim, counts: Int32[Array, "N P"], settings: Settings) -> Trim:
    assert state.cut is not None
    return state._replace(cut=exact.narrow(state.cut, counts, state.search, state.keep))


def _cut_done(state: Trim) -> Bool[Array, ""]:
    assert state.cut is not None
    return exact.done(state.cut)


def _cut_at_once(leaves: Leaves, state: Trim, settings: Settings) -> Trim:
    if state.cut is None:
        return state
    assert not callable(leaves)  # the thresholds are each tensor's own
    return state._replace(cut=exact.at_once(leaves, np.asarray(state.search.low), np.asarray(state.keep)))


def _cut_settled(state: Trim) -> bool:
    return state.cut is None or state.cut.start is None


CUT = Round(_count_tied, _narrow_cut, _cut_done, None, _cut_at_once, _cut_settled)
"""After ROUNDS, of one tensor: with exact_k."""


def reaches(deltas: Float[Array, "N ..."], state: Trim) -> list[Bool[Array, "..."]]:
    """Per candidate, which entries are among the kept."""
    pattern = state.search.low
    return [threshold.magnitude_bits(delta) >= pattern[i] for i, delta in enumerate(candidates(deltas))]


def trimmed(deltas: Float[Array, "N ..."], state: Trim, draws: Draws) -> list[Float32[Array, "..."]]:
    """The candidates with everything else set to 0."""
    if state.cut is None:
        kept = reaches(deltas, state)
    else:
        places, low, end = exact.places_of(draws, deltas.shape[1:]), state.search.low, state.cut.end
        bits = [threshold.magnitude_bits(delta) for delta in candidates(deltas)]
        kept = [exact.stays(b, low[i], end[i], places) for i, b in enumerate(bits)]
    return [jnp.where(mask, delta, jnp.float32(0)) for mask, delta in zip(kept, candidates(deltas), strict=True)]
