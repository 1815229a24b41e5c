"""A suite of membership attacks: is a document recognised as one the model was trained on, by any of six signals?

The official score attacks by the loss alone. A model may hide from it and be open to another, and an AUC far BELOW
one half gives the forgotten documents away as well as one above. Signals of a document x of n predicted tokens, each
turned so that lower means member:

  loss             mean NLL
  zlib             sum of NLLs / bytes of zlib(x): nats per compressed byte (Carlini 2021, 2012.07805, section 5.2)
  zlib_mean        mean NLL / bytes of zlib(x): the same where all texts have one length, as in Carlini's; what most
                   codes compute. Where lengths differ it also measures the length
  min_k            minus the mean log p of the int(.2 n) least likely tokens, at least one (2310.16789)
  min_k_plus_plus  minus the mean of the int(.2 n) lowest (log p - mean) / sd, mean and sd of log p being those under
                   the model's own next-token distribution (2404.02936)
  reference        mean NLL minus that under a reference model: the base before unlearning, or gold

Of each: the AUC with its 95% bootstrap interval, its distance from one half, the AUC minus gold's (gold never saw the
members, so what it shows is how the two sets differ by themselves), and the true-positive rate at a false-positive
rate of 1% and 5%: the largest share of members that any threshold recognises while it takes at most that share of
non-members for members; no interpolation between thresholds. (With fewer than 100 non-members the 1% allows none.)
`reversed_tpr_*` is the same for the attacker who takes a HIGH signal for the mark of a member.
"""

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Float, PyTree

from unlearnjax.data.rows import Document
from unlearnjax.errors import UserError
from unlearnjax.evaluation.full.token_stats import TokenStats, token_stats_candidates
from unlearnjax.evaluation.membership import membership
from unlearnjax.evaluation.nll import token_nll_candidates
from unlearnjax.models.protocol import Model

ATTACKS = ("loss", "zlib", "zlib_mean", "min_k", "min_k_plus_plus", "reference")
RATES = (1, 5)  # percent of false positives
SHARE = 0.2  # of a document's tokens that min-k looks at
# A distribution sharper than this is standardised as if it were this wide: where one token has probability 1 in
# float32, its variance is rounding or 0.
LEAST_VARIANCE = 1e-6


class Losses(NamedTuple):
    """Mean NLLs in nats of the members' and the non-members' documents, in their order."""

    members: Float[np.ndarray, " members"]
    nonmembers: Float[np.ndarray, " nonmembers"]


def lowest_mean(values: Float[np.ndarray, " tokens"], share: float = SHARE) -> float:
    """The mean of the int(share * tokens) lowest values, of one at least."""
    return float(np.sort(values.astype(np.float64))[: max(1, int(share * len(values)))].mean())


def signals(stats: TokenStats, text: str, reference: float | None = None, *, share: float = SHARE) -> dict[str, float]:
    """The signals of one document (see the file's docstring); `reference` only where its loss is given."""
    nll = -stats.log_probability.astype(np.float64)
    size = len(zlib.compress(text.encode("utf-8", "surrogatepass")))
    spread = np.sqrt(np.maximum(stats.variance.astype(np.float64), LEAST_VARIANCE))
    standard = (stats.log_probability.astype(np.float64) - stats.mean.astype(np.float64)) / spread
    found = {
        "loss": float(nll.mean()),
        "zlib": float(nll.sum()) / size,
        "zlib_mean": float(nll.mean()) / size,
        "min_k": -lowest_mean(-nll, share),
        "min_k_plus_plus": -lowest_mean(standard, share),
    }
    return found if reference is None else {**found, "reference": found["loss"] - reference}


def tpr_at_fpr(members: Sequence[float], nonmembers: Sequence[float], rate: float) -> float:
    """The largest share of members below a threshold that at most `rate` of the non-members are below.

    A step function: no interpolation. Equal values are on the same side of every threshold.
    """
    known = np.sort(np.asarray(nonmembers, np.float64))
    allowed = int(np.sum(np.arange(1, known.size + 1) / known.size <= rate))
    if allowed == known.size:
        return 1.0
    return float(np.mean(np.asarray(members, np.float64) < known[allowed]))


def attack(
    members: Sequence[float],
    nonmembers: Sequence[float],
    gold: Mapping[str, Any] | None = None,
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any] | None:
    """One signal's result; None where a signal is not finite (a model whose numbers have overflowed).

    Args:
      gold: this attack's result on the gold model.

    Returns:
      auc, interval [low, high], distance (|auc - 1/2|), auc_minus_gold (None without gold), tpr_at_fpr_1, _5,
      reversed_tpr_at_fpr_1, _5.

    Raises:
      UserError: an empty side.
    """
    lower = [np.asarray(side, np.float64) for side in (members, nonmembers)]
    if not all(np.isfinite(side).all() for side in lower):
        return None
    found = membership(lower[0].tolist(), lower[1].tolist(), resamples=resamples, seed=seed)
    rates = {f"tpr_at_fpr_{r}": tpr_at_fpr(members, nonmembers, r / 100) for r in RATES}
    other = {f"reversed_tpr_at_fpr_{r}": tpr_at_fpr((-lower[0]).tolist(), (-lower[1]).tolist(), r / 100) for r in RATES}
    return {
        "auc": found.auc,
        "interval": list(found.interval),
        "distance": abs(found.auc - 0.5),
        "auc_minus_gold": None if gold is None else found.auc - gold["auc"],
        **rates,
        **other,
    }


def suite(
    stats: Sequence[TokenStats],
    members: Sequence[Document],
    nonmembers: Sequence[Document],
    *,
    reference: Losses | None = None,
    gold: Mapping[str, Any] | None = None,
    share: float = SHARE,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """One candidate's result from its token statistics, those of the members first. See `membership_attacks`."""
    documents = [*members, *nonmembers]
    losses = None if reference is None else np.concatenate([reference.members, reference.nonmembers])
    found = [
        signals(one, document.document, None if losses is None else float(losses[i]), share=share)
        for i, (one, document) in enumerate(zip(stats, documents))
    ]
    results: dict[str, Any] = {}
    for name in ATTACKS:
        if name not in found[0]:
            results[name] = None
            continue
        values = [one[name] for one in found]
        its_gold = None if gold is None else gold["attacks"].get(name)
        results[name] = attack(values[: len(members)], values[len(members) :], its_gold, resamples=resamples, seed=seed)
    known = {name: result["distance"] for name, result in results.items() if result is not None}
    strongest = max(known, key=lambda name: known[name]) if known else None
    return {
        "members": len(members),
        "nonmembers": len(nonmembers),
        "attacks": results,
        "strongest": strongest,
        "largest_distance": None if strongest is None else known[strongest],
    }


def membership_attacks(
    model: Model,
    params: PyTree[Array],
    lora: PyTree[Array] | None,
    tokenizer: Any,
    members: Sequence[Document],
    nonmembers: Sequence[Document],
    *,
    batch_size: int,
    reference: Losses | None = None,
    gold: Mapping[str, Any] | None = None,
    share: float = SHARE,
    resamples: int = 1000,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> list[dict[str, Any]]:
    """All attacks on N candidates of one model at once.

    Args:
      model, params, lora, batch_size, progress: as of `token_stats_candidates`; `progress` counts documents times N.
      tokenizer: a transformers tokenizer; texts get the special tokens that it adds to any text.
      members, nonmembers: documents of two tokens or more.
      reference: `document_losses` of the reference model on the same documents; without it that attack is None.
      gold: what this function returned for the gold model.
      share: min-k's share of tokens.
      resamples, seed: of the bootstrap.

    Returns:
      Per candidate: members, nonmembers (numbers of documents), attacks {name: `attack`'s dict, or None}, strongest
      (the attack with the largest distance from one half: the best of several, so in expectation above 0 even for a
      model that never saw the members) and largest_distance.

    Raises:
      UserError: no members or no non-members, a document that is empty, of one token, or longer than the context
        (named), or a reference of other documents.
    """
    ids, names = _prepare(tokenizer, members, nonmembers)
    if reference is not None and (len(reference.members), len(reference.nonmembers)) != (len(members), len(nonmembers)):
        raise UserError(
            f"membership: the reference has losses of {len(reference.members)} members and "
            f"{len(reference.nonmembers)} non-members, for {len(members)} and {len(nonmembers)} documents; "
            "compute it on the same documents"
        )
    found = token_stats_candidates(model, params, lora, ids, batch_size=batch_size, names=names, progress=progress)
    return [
        suite(one, members, nonmembers, reference=reference, gold=gold, share=share, resamples=resamples, seed=seed)
        for one in found
    ]


def document_losses(
    model: Model,
    params: PyTree[Array],
    lora: PyTree[Array] | None,
    tokenizer: Any,
    members: Sequence[Document],
    nonmembers: Sequence[Document],
    *,
    batch_size: int,
    progress: Callable[[int], None] | None = None,
) -> list[Losses]:
    """Mean NLLs under N candidates: what `membership_attacks` takes as its reference. Arguments and errors as there."""
    ids, names = _prepare(tokenizer, members, nonmembers)
    found = token_nll_candidates(model, params, lora, ids, batch_size=batch_size, names=names, progress=progress)
    return [Losses(one[: len(members)], one[len(members) :]) for one in found.mean]


def _prepare(
    tokenizer: Any, members: Sequence[Document], nonmembers: Sequence[Document]
) -> tuple[list[list[int]], list[str]]:
    for what, documents in (("members", members), ("non-members", nonmembers)):
        if not documents:
            raise UserError(f"the membership attacks need members and non-members; there are no {what}")
    names = [f"member document {d.id!r}" for d in members] + [f"nonmember document {d.id!r}" for d in nonmembers]
    ids = [list(x) for x in tokenizer([d.document for d in (*members, *nonmembers)])["input_ids"]]
    for row, name in zip(ids, names):
        if len(row) == 1:
            raise UserError(f"{name}: a single token has no NLL; leave the document out")
    return ids, names
