"""An objective is a weighted sum of terms; the weights are per candidate."""

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
from unlearnjax_kernels.vocab_logsumexp import vocab_logsumexp, vocab_logsumexp_and_mean, vocab_max

from unlearnjax.data.tokens import Side
from unlearnjax.errors import UserError, check_known
from unlearnjax.objectives.distilled import ceu, undial
from unlearnjax.objectives.dpo import dpo, idk
from unlearnjax.objectives.ga import forget_ce, ga
from unlearnjax.objectives.npo import npo, npo_mean
from unlearnjax.objectives.pdu import bound, margin
from unlearnjax.objectives.pooled import pool_ga, pool_retain, pool_retain_rows, row_ga, row_retain
from unlearnjax.objectives.protocol import Scores, Term
from unlearnjax.objectives.retain import gdr, klr, klr_all
from unlearnjax.objectives.rmu import rmu, rmu_retain
from unlearnjax.objectives.simnpo import simnpo
from unlearnjax.objectives.weighted import satimp, wga
from unlearnjax.training.hyperparameters import Hyperparameters

_FORGET = (ga, forget_ce, npo, npo_mean, simnpo, dpo, idk, wga, satimp, undial, ceu, margin, rmu)
_RETAIN = (gdr, klr, klr_all, bound, rmu_retain)
_POOL = (pool_ga, pool_retain, pool_retain_rows, row_ga, row_retain)
TERMS: dict[str, Term] = {t.name: t for t in (*_FORGET, *_RETAIN, *_POOL)}

Memory = Mapping[str, Mapping[str, Float[Array, ""]]]  # by term: what a candidate carries from step to step for it

# Names that stand for a sum; open-unlearning and the papers use them for whole methods.
SHORTHANDS: dict[str, dict[str, float]] = {
    "ga": {"ga": 1.0},
    "finetune": {"forget_ce": 1.0},
    "graddiff": {"ga": 1.0, "gdr": 1.0},
    "npo": {"npo": 1.0},
    "simnpo": {"simnpo": 0.125, "gdr": 1.0},
    "wga": {"wga": 1.0, "gdr": 1.0},
    "satimp": {"satimp": 1.0, "gdr": 1.0},
    "undial": {"undial": 1.0},
    "ceu": {"ceu": 1.0},
    "dpo": {"dpo": 1.0, "gdr": 1.0},
    "idk": {"idk": 1.0, "gdr": 1.0},
    "rmu": {"rmu": 1.0, "rmu_retain": 1.0},
    "pdu": {"margin": 1.0, "bound": 1.0},
    "zjuklab": {"npo": 0.4, "gdr": 0.2, "klr": 0.4},
    "selective_amnesia": {"pool_ga": 1.0, "pool_retain": 1.0},
    "sugd": {"row_ga": 1.0, "row_retain": 0.5},
    "agad": {"row_ga": 1.0, "row_retain": 1.0},
}


def sides_of(terms: Iterable[Term]) -> tuple[str, ...]:
    """The sides that terms read, in a fixed order: of forget and retain, retain last."""
    read = {side for t in terms for side in (t.side, t.beside)}
    return tuple(s for s in ("forget", "idk", "retain", "pool") if s in read)


class Objective(NamedTuple):
    """The terms of a run, in a fixed order.

    `layer`: how many layers run before the hidden states that a term reads as `layer`; fewer than the model has.
    """

    terms: tuple[Term, ...]
    layer: int | None = None

    @property
    def sides(self) -> tuple[str, ...]:
        """`sides_of` its terms."""
        return sides_of(self.terms)

    @property
    def shallow(self) -> bool:
        """All terms read a layer's output and nothing behind it."""
        return all(t.reads == {"layer"} for t in self.terms)

    def needs(self, side: str) -> frozenset[str]:
        """What the side's terms ask of the frozen base."""
        return frozenset().union(*(t.needs for t in self.terms if side in (t.side, t.beside)))

    def reads(self, side: str) -> frozenset[str]:
        """What the side's terms ask of the model beyond the answers' scores."""
        return frozenset().union(*(t.reads for t in self.terms if side in (t.side, t.beside)))


def expand(spec: str | Mapping[str, float], where: str) -> dict[str, float]:
    """An objective as written (`npo`, or {term: weight}) to term weights.

    Raises:
      UserError: an unknown term or shorthand, with the nearest valid name.
    """
    if isinstance(spec, str):
        check_known([spec], SHORTHANDS, "objective", where)
        return dict(SHORTHANDS[spec])
    check_known(spec, TERMS, "objective term", where)
    return {name: float(weight) for name, weight in spec.items()}


def objective(names: Iterable[str], layers: int | None = None, layer: int | None = None) -> Objective:
    """The terms by their names.

    Args:
      layers: of the model; terms that read a layer's output need it. layer: which one, counted from 1; default: a
        quarter of the way up, as the eighth of 32 in RMU's paper.

    Raises:
      UserError: a layer that the model does not have, or its last one.
    """
    chosen = set(names)
    terms = tuple(t for name, t in TERMS.items() if name in chosen)
    if not any("layer" in t.reads for t in terms):
        return Objective(terms)
    if layers is None:
        raise ValueError("objective: terms that read a layer need the model's number of layers")
    layer = max(1, layers // 4) if layer is None else layer
    if not 0 < layer < layers:
        raise UserError(f"objective: layer {layer} of a model with {layers}; give one from 1 to {layers - 1}")
    return Objective(terms, layer)


def answer_scores(
    hidden: Float[Array, "rows answers hidden"],
    head: Float[Array, "vocab hidden"],
    targets: Int[Array, "rows answers"],
    train_head: bool,
) -> tuple[Float[Array, "rows answers"], Float[Array, "rows answers"]]:
    """The answer tokens' log-likelihoods, and the logsumexp over the vocabulary, from the hidden states that predict
    them. Only answers meet the vocabulary; the rows of all sides do together, so that devices can share them."""
    total = vocab_logsumexp(hidden, head, train_head=train_head)
    target = jnp.sum(hidden.astype(jnp.float32) * head[targets].astype(jnp.float32), axis=-1)
    return target - total, total


def score(
    hidden: Float[Array, "rows answers hidden"],
    answered: tuple[Float[Array, "rows answers"], Float[Array, "rows answers"]],
    head: Float[Array, "vocab hidden"],
    side: Side,
    train_head: bool,
    every: Float[Array, "rows width hidden"] | None = None,
    reads: frozenset[str] = frozenset(),
) -> Scores:
    """One side's token scores.

    Args:
      answered: `answer_scores` of its rows.
      every: the hidden states of all positions; they meet the vocabulary too where a term reads `every`.
    """
    likelihood, total = answered
    others = vocab_logsumexp_and_mean(hidden, head, without=side.targets)[1] if "others" in reads else None
    everywhere = None if every is None else vocab_logsumexp(every, head, train_head=train_head)
    margin = None
    if "margin" in reads:
        mean = jnp.mean(head.astype(jnp.float32), axis=0)  # the mean logit is the mean row's
        mean_logit = jnp.einsum("rah,h->ra", hidden.astype(jnp.float32), mean, precision="highest")
        margin = vocab_max(hidden, head, train_head=train_head) - mean_logit
    return Scores(hidden, likelihood, total, others, every, everywhere, margin)


def unscored(side: Side, layer_hidden: Float[Array, "rows width hidden"] | None) -> Scores:
    """For terms that read a layer's output and nothing else."""
    zeros = jnp.zeros(side.mask.shape, jnp.float32)
    return Scores(zeros[..., None], zeros, zeros, layer_hidden=layer_hidden)


def evaluate(
    objective: Objective,
    scores: Mapping[str, Scores],
    sides: Mapping[str, Side],
    micro_weight: Float[Array, " micro"],
    h: Hyperparameters,
    multipliers: Mapping[str, Float[Array, ""]] = MappingProxyType({}),
    memory: Memory = MappingProxyType({}),
    epoch: Int[Array, ""] | None = None,
) -> tuple[Float[Array, ""], tuple[dict[str, Float[Array, ""]], Memory]]:
    """The step's share of its update's loss; each term's before its weight and multiplier; and what the terms remember
    after it.

    Args:
      memory, epoch: for terms that remember.
    """
    after = dict(memory)
    total = jnp.zeros((), jnp.float32)
    parts = {}
    for term in objective.terms:
        own = scores[term.side]
        if term.beside is not None:
            own = own._replace(beside=(scores[term.beside], sides[term.beside]))
        losses = term.loss(own, sides[term.side], h)
        parts[term.name] = jnp.sum(micro_weight * losses)
        counted = parts[term.name]
        if term.adaptive is not None:
            assert epoch is not None
            known = jax.lax.stop_gradient(losses)
            counted = jnp.sum(micro_weight * term.adaptive.weigh(known, memory[term.name], epoch, h) * losses)
            after[term.name] = term.adaptive.remember(known, sides[term.side], epoch, memory[term.name])
        # A term that a candidate does not use must not reach it, not even as 0 * inf.
        weight = h.term_weights[term.name]
        if term.name in multipliers:
            weight = jnp.where(weight == 0.0, 0.0, weight * multipliers[term.name])
        total = total + jnp.where(weight == 0.0, 0.0, weight * jnp.where(weight == 0.0, 0.0, counted))
    return total, (parts, after)
