"""Sums and elections over sparsified deltas: task arithmetic, magnitude pruning, DARE, DELLA and Model Breadcrumbs.

| method | what stays of each delta | then |
|---|---|---|
| task_arithmetic | everything | sum |
| magnitude_prune | the largest entries of each tensor | sum |
| dare_linear, dare_ties (2311.03099) | random entries, each with probability density | sum, election |
| della_linear, della (2406.11617) | random entries, of each row the larger ones more often | sum, election |
| breadcrumbs, breadcrumbs_ties (2312.06795) | the largest entries of each tensor but its outliers | sum, election |

The semantics differ in the scale of what stays, the divisor and the election:

- "paper": what was drawn at random is divided by its chance of staying, so that its mean is the delta. The sum of
  dare_linear and della_linear is divided by the weights' sum (normalize=False leaves that out), the others' is not. The
  election is the TIES paper's (`elect.paper`): mean of the agreeing entries, and where the vote is 0 the model's
  majority sign.
- "peft": random entries are divided by density; no sum is divided; the election is PEFT's.
- "mergekit": with rescale the entries that stay are multiplied until the tensor's L1 norm is that of the delta (not
  where either norm is below 1e-7). Its election is a weighted vote in which 0 is plus; normalize divides by the
  (agreeing) weights. Where int(gamma * size) is 0 no outlier is dropped; mergekit drops the whole tensor there.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32
from unlearnjax_kernels.threshold import api as threshold

from unlearnjax.merging import elect
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
    rounds_on,
)
from unlearnjax.merging.sparsify import INSIDE, LARGEST, RANDOM, RANDOM_RANKS, WHOLE, Sparsifier

LEAST_NORM = 1e-7  # mergekit's: it rescales no tensor of a smaller L1 norm


def normalize(default: bool) -> Hyperparameter:
    return Hyperparameter("normalize", "divide by the sum of the (agreeing) weights", default=default)


def rescale(default: bool) -> Hyperparameter:
    return Hyperparameter("rescale", "multiply what stays until the tensor has the delta's L1 norm", default=default)


class Sums(NamedTuple):
    """The sparsifier's state, per candidate the L1 norm of the delta and of what stays of it, and the majority sign."""

    own: State
    norms: Float32[Array, "N 2"]
    majority: Int32[Array, ""]


def _start(sparsifier: Sparsifier) -> Any:
    def start(size: int, count: int, settings: Settings) -> Sums:
        return Sums(sparsifier.start(size, count, settings), jnp.zeros((count, 2), jnp.float32), jnp.int32(0))

    return start


def _unbiased(
    sparsifier: Sparsifier, deltas: Float[Array, "N ..."], state: Sums, draws: Draws, settings: Settings
) -> list[Float32[Array, "..."]]:
    """What stays, over its chance of staying."""
    if not sparsifier.needs_key:
        return [kept for kept, _ in sparsifier.apply(deltas, state.own, draws, settings)]
    return [
        # An entry of chance 0 never stays.
        kept / jnp.where(chance == 0, jnp.float32(1), chance)
        for kept, chance in sparsifier.apply(deltas, state.own, draws, settings)
    ]


def _refuse_zero_sum(weights: np.ndarray, settings: Settings) -> str | None:
    if settings.get("normalize", False) and weights.sum() == 0:
        return "they sum to 0 and cannot be normalised; pass normalize=False"
    return None


def _refuse_zeros(weights: np.ndarray, settings: Settings) -> str | None:
    return "all of them are 0" if not weights.any() else None


def _properties(sparsifier: Sparsifier, elects: bool, identity: Sequence[tuple[str, Any]] = ()) -> Properties:
    names = {parameter.name for parameter in sparsifier.hyperparameters}
    whole: list[tuple[str, Any]] = [("density", 1.0)] if "density" in names else []
    return Properties(
        identity=(*whole, *identity, ("lambda", 1.0)),
        # The draws belong to a candidate's number, so another order is another draw.
        permutation_invariance=not sparsifier.needs_key,
        zero_weight_is_absence=not sparsifier.needs_key,
        negation="unless sums cancel" if elects else "always",
        elementwise=sparsifier.elementwise,
    )


def _paper_sum(sparsifier: Sparsifier, source: str, divides: bool) -> Rule:
    def combine(
        deltas: Float[Array, "N ..."], weights: Float32[Array, "N"], state: Sums, draws: Draws,
        base: Array | None, settings: Settings,
    ) -> Float32[Array, "..."]:  # fmt: skip
        value = elect.weighted_sum(_unbiased(sparsifier, deltas, state, draws, settings), weights)
        return settings["lambda"] * (elect.divided(value, weights) if settings.get("normalize", False) else value)

    return Rule(
        "paper", source, combine, _properties(sparsifier, elects=False),
        hyperparameters=(*sparsifier.hyperparameters, *([normalize(True)] if divides else []), LAMBDA),
        default_weight="mean" if divides else "one", start=_start(sparsifier),
        rounds=rounds_on("own", sparsifier.rounds),
        check_weights=_refuse_zero_sum, needs_key=sparsifier.needs_key,
    )  # fmt: skip


def _paper_election(sparsifier: Sparsifier, source: str) -> Rule:
    """The vote's majority is the whole model's, so the statistics are the tree's."""
    assert not sparsifier.rounds, "the sparsifier's thresholds would become the tree's too"

    def combine(
        deltas: Float[Array, "N ..."], weights: Float32[Array, "N"], state: Sums, draws: Draws,
        base: Array | None, settings: Settings,
    ) -> Float32[Array, "..."]:  # fmt: skip
        return settings["lambda"] * elect.paper(
            _unbiased(sparsifier, deltas, state, draws, settings), weights, state.majority
        )

    def count(
        deltas: Float[Array, "N ..."], weights: Float32[Array, "N"], state: Sums, draws: Draws,
        base: Array | None, settings: Settings,
    ) -> Int32[Array, "2"]:  # fmt: skip
        kept = _unbiased(sparsifier, deltas, state, draws, settings)
        elected = jnp.sign(elect.weighted_sum(kept, elect.relative(weights))).astype(jnp.int32)
        return threshold.to_limbs(jnp.sum(elected, dtype=jnp.int32))

    def update(state: Sums, signs: Int32[Array, "2"], settings: Settings) -> Sums:
        return state._replace(majority=threshold.sign(signs))

    return Rule(
        "paper", source, combine, _properties(sparsifier, elects=True),
        hyperparameters=(*sparsifier.hyperparameters, LAMBDA), scope="tree", start=_start(sparsifier),
        rounds=(Round(count, update),), check_weights=_refuse_zeros, needs_key=sparsifier.needs_key,
    )  # fmt: skip


def peft_rule(sparsifier: Sparsifier, source: str, elects: bool) -> Rule:
    """PEFT's: everything per tensor, weights as they are."""

    def combine(
        deltas: Float[Array, "N ..."], weights: Float32[Array, "N"], state: Sums, draws: Draws,
        base: Array | None, settings: Settings,
    ) -> Float32[Array, "..."]:  # fmt: skip
        kept = _unbiased(sparsifier, deltas, state, draws, settings)
        if elects:
            return settings["lambda"] * elect.peft(kept, weights, settings["majority_sign_method"])
        return settings["lambda"] * elect.weighted_sum(kept, weights)

    properties = _properties(sparsifier, elects)
    if elects:  # a candidate of weight 0 still votes and is counted
        properties = properties._replace(zero_weight_is_absence=False)
    return Rule(
        "peft", source, combine, properties,
        hyperparameters=(*sparsifier.hyperparameters, *([elect.MAJORITY] if elects else []), LAMBDA),
        spaces=("delta", "core", "factors"), default_weight="one", start=_start(sparsifier),
        rounds=rounds_on("own", sparsifier.rounds), needs_key=sparsifier.needs_key,
    )  # fmt: skip


def mergekit_rule(sparsifier: Sparsifier, source: str, elects: bool, normalizes: bool, rescales: bool) -> Rule:
    """mergekit's generalised task arithmetic: everything per tensor; `normalizes` and `rescales` are defaults."""

    def combine(
        deltas: Float[Array, "N ..."], weights: Float32[Array, "N"], state: Sums, draws: Draws,
        base: Array | None, settings: Settings,
    ) -> Float32[Array, "..."]:  # fmt: skip
        kept = [x for x, _ in sparsifier.apply(deltas, state.own, draws, settings)]
        if settings["rescale"]:
            before, after = state.norms[:, 0], state.norms[:, 1]
            small = (before < LEAST_NORM) | (after < LEAST_NORM)
            factor = jnp.where(small, jnp.float32(1), before / jnp.where(small, jnp.float32(1), after))
            kept = [factor[i] * x for i, x in enumerate(kept)]
        if elects:
            return settings["lambda"] * elect.mergekit(kept, weights, settings["normalize"])
        value = elect.weighted_sum(kept, weights)
        return settings["lambda"] * (elect.divided(value, weights, 1e-8) if settings["normalize"] else value)

    def norms(
        deltas: Float[Array, "N ..."], weights: Float32[Array, "N"], state: Sums, draws: Draws,
        base: Array | None, settings: Settings,
    ) -> Float32[Array, "N 2"]:  # fmt: skip
        if not settings["rescale"]:
            return jnp.zeros_like(state.norms)
        kept = sparsifier.apply(deltas, state.own, draws, settings)
        sums = [
            jnp.stack([jnp.sum(jnp.abs(delta)), jnp.sum(jnp.abs(x))])
            for delta, (x, _) in zip(candidates(deltas), kept, strict=True)
        ]
        return jnp.stack(sums)

    def update(state: Sums, found: Float32[Array, "N 2"], settings: Settings) -> Sums:
        return state._replace(norms=found)

    return Rule(
        "mergekit", source, combine, _properties(sparsifier, elects),
        hyperparameters=(*sparsifier.hyperparameters, normalize(normalizes), rescale(rescales), LAMBDA),
        default_weight="one", start=_start(sparsifier),
        rounds=(*rounds_on("own", sparsifier.rounds), Round(norms, update)),
        check_weights=_refuse_zeros if elects else _refuse_zero_sum, needs_key=sparsifier.needs_key,
    )  # fmt: skip


_MERGEKIT = "mergekit 0.1.4 merge_method "
_PEFT = "PEFT 0.21 merge_utils."

TASK_ARITHMETIC = MergeMethod(
    "task_arithmetic",
    "weighted sum of the deltas",
    (
        _paper_sum(WHOLE, "task arithmetic 2212.04089", divides=False),
        peft_rule(WHOLE, _PEFT + "task_arithmetic", elects=False),
        mergekit_rule(WHOLE, _MERGEKIT + "task_arithmetic", elects=False, normalizes=False, rescales=False),
    ),
)
MAGNITUDE_PRUNE = MergeMethod(
    "magnitude_prune",
    "keep each tensor's largest entries, sum",
    (peft_rule(LARGEST, _PEFT + "magnitude_prune", elects=False),),
)
DARE_LINEAR = MergeMethod(
    "dare_linear",
    "keep random entries, sum",
    (
        _paper_sum(RANDOM, "DARE 2311.03099, equations 1 to 3, with task arithmetic", divides=True),
        peft_rule(RANDOM, _PEFT + "dare_linear", elects=False),
        mergekit_rule(RANDOM, _MERGEKIT + "dare_linear", elects=False, normalizes=False, rescales=True),
    ),
)
DARE_TIES = MergeMethod(
    "dare_ties",
    "keep random entries, elect a sign, average the entries that agree",
    (
        _paper_election(RANDOM, "DARE 2311.03099 in place of the trim of TIES 2306.01708"),
        peft_rule(RANDOM, _PEFT + "dare_ties", elects=True),
        mergekit_rule(RANDOM, _MERGEKIT + "dare_ties", elects=True, normalizes=False, rescales=True),
    ),
)
DELLA_LINEAR = MergeMethod(
    "della_linear",
    "keep random entries, larger ones more often, sum",
    (
        _paper_sum(RANDOM_RANKS, "DELLA 2406.11617 without its election", divides=True),
        mergekit_rule(RANDOM_RANKS, _MERGEKIT + "della_linear", elects=False, normalizes=False, rescales=True),
    ),
)
DELLA = MergeMethod(
    "della",
    "keep random entries, larger ones more often, elect a sign, average the entries that agree",
    (
        _paper_election(RANDOM_RANKS, "DELLA 2406.11617: drop, elect, fuse"),
        mergekit_rule(RANDOM_RANKS, _MERGEKIT + "della", elects=True, normalizes=True, rescales=True),
    ),
)
BREADCRUMBS = MergeMethod(
    "breadcrumbs",
    "keep each tensor's largest entries but not its outliers, sum",
    (
        _paper_sum(INSIDE, "Model Breadcrumbs 2312.06795", divides=False),
        mergekit_rule(INSIDE, _MERGEKIT + "breadcrumbs", elects=False, normalizes=False, rescales=False),
    ),
)
BREADCRUMBS_TIES = MergeMethod(
    "breadcrumbs_ties",
    "keep each tensor's largest entries but not its outliers, elect a sign, sum the entries that agree",
    (mergekit_rule(INSIDE, _MERGEKIT + "breadcrumbs_ties", elects=True, normalizes=False, rescales=False),),
)
METHODS = (
    TASK_ARITHMETIC, MAGNITUDE_PRUNE, DARE_LINEAR, DARE_TIES, DELLA_LINEAR, DELLA, BREADCRUMBS, BREADCRUMBS_TIES,
)  # fmt: skip
