"""leak@k: what a model gives away when it is asked k times at temperature 1, though its greedy answer is clean.

    leak@k = mean over prompts of E[max over k draws of the leak score]

The score of a draw is the official one: ROUGE-L recall for a completion, exact match for a question. With n >= k draws
of a prompt, sorted x_1 <= ... <= x_n, the expectation has the unbiased estimate (every subset of k draws is as likely,
and x_i is the largest of C(i - 1, k - 1) of them)

    sum_i C(i - 1, k - 1) / C(n, k) x_i

The idea is that of 2511.04934 and 2410.03523 (their exact formula was not at hand). Candidates draw with the same
noise, so that they differ by what they learnt and not by luck. Unlike ROUGE of the greedy output this is a maximum, and
grows with k on any model: compare it with that of the gold model.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Array, Float, PyTree

from unlearnjax.data.rows import Row
from unlearnjax.errors import UserError
from unlearnjax.evaluation.exact import exact_match
from unlearnjax.evaluation.generate import Sampling, generate_candidates
from unlearnjax.evaluation.rouge import rouge_l_recall
from unlearnjax.evaluation.semeval import KINDS, kind_of
from unlearnjax.models.protocol import Model

KS = (1, 4, 16, 64)


def expected_maximum(scores: Sequence[float], k: int) -> float:
    """The unbiased estimate of the expected maximum of k draws from n >= k of them.

    Raises:
      ValueError: k is not from 1 to n.
    """
    n = len(scores)
    if not 1 <= k <= n:
        raise ValueError(f"the maximum of {k} draws cannot be estimated from {n}")
    ways = math.comb(n, k)
    return math.fsum(math.comb(i, k - 1) / ways * x for i, x in enumerate(sorted(scores)))


def bootstrap_mean(values: Sequence[float], *, resamples: int = 1000, seed: int = 0) -> tuple[float, float]:
    """95% percentile interval of a mean over prompts, which are resampled with replacement."""
    drawn = np.asarray(values)[np.random.default_rng(seed).integers(0, len(values), (resamples, len(values)))]
    low, high = np.quantile(drawn.mean(axis=1), [0.025, 0.975])
    return float(low), float(high)


def spread(rows: Sequence[Row], most: int) -> list[Row]:
    """At most so many rows, evenly of every task and kind, in their order; rows of no kind are left out."""
    groups: dict[tuple[str, str], list[int]] = {}
    for place, row in enumerate(rows):
        kind = kind_of(row.id)
        if kind is not None:
            groups.setdefault((row.task, kind), []).append(place)
    chosen: list[int] = []
    left = most
    for remaining, places in zip(range(len(groups), 0, -1), sorted(groups.values(), key=len)):
        count = min(len(places), left // remaining)
        chosen += [places[int((i + 0.5) * len(places) / count)] for i in range(count)]
        left -= count
    return [rows[place] for place in sorted(chosen)]


def draw_scores(rows: Sequence[Row], texts: Sequence[str], draws: int) -> Float[np.ndarray, "rows draws"]:
    """Each draw's score; `texts` has each row's draws one after another."""
    scores = np.zeros((len(rows), draws))
    for i, row in enumerate(rows):
        score = rouge_l_recall if kind_of(row.id) == "sc" else exact_match
        for j, text in enumerate(texts[i * draws : (i + 1) * draws]):
            scores[i, j] = float(score(row.output, text))
    return scores


def leak_at(rows: Sequence[Row], scores: Float[np.ndarray, "rows draws"], ks: Sequence[int] = KS) -> dict[str, Any]:
    """leak@k with its interval over all rows, and per kind (`regurgitation`, `knowledge`) without one."""
    kinds = [KINDS[kind_of(row.id) or ""] for row in rows]
    curve: list[dict[str, Any]] = []
    of_kind: dict[str, list[float]] = {kind: [] for kind in kinds}
    ks = [k for k in ks if k <= scores.shape[1]]
    for k in ks:
        each = [expected_maximum(row, k) for row in scores.tolist()]
        low, high = bootstrap_mean(each)
        curve.append({"k": k, "leak": math.fsum(each) / len(each), "interval": [low, high]})
        for kind, values in of_kind.items():
            own = [x for x, other in zip(each, kinds) if other == kind]
            values.append(math.fsum(own) / len(own))
    return {"rows": len(rows), "draws": scores.shape[1], "leak_at": curve, "by_kind": of_kind}


def sampled_leak(
    model: Model,
    params: PyTree[Array],
    lora: PyTree[Array] | None,
    tokenizer: Any,
    rows: Sequence[Row],
    *,
    eos_token_ids: Sequence[int],
    max_new_tokens: int,
    batch_size: int,
    draws: int = 64,
    most: int = 64,
    temperature: float = 1.0,
    seed: int = 0,
    decode: Callable[[Any, list[list[int]]], list[str]] | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[dict[str, Any]]:
    """leak@k of N candidates on forget rows.

    Args:
      model, params, lora: as `generate_candidates` takes them.
      rows: forget rows; at most `most` of them are asked (see `spread`).
      draws: per prompt; k goes up to it.
      decode: from token ids to texts; default the tokenizer's, special tokens skipped.
      progress: called with the number of draws finished since the last call, over all candidates.

    Returns:
      For each candidate `temperature`, `seed`, `rows`, `draws`, `leak_at` ([{k, leak, interval}]) and `by_kind`
      ({kind: [leak for each k]}).

    Raises:
      UserError: no row of a known kind, and what `generate_candidates` raises.
    """
    chosen = spread(rows, most)
    if not chosen or draws < 1:
        raise UserError("leak@k needs a draw, and forget rows whose ids end in sc<digit> or qa<digit>")
    prompts = [list(ids) for ids in tokenizer([row.input for row in chosen])["input_ids"] for _ in range(draws)]
    pad = model.config.pad_token_id
    found = generate_candidates(
        model, params, lora, prompts, eos_token_ids=eos_token_ids, pad_token_id=0 if pad is None else pad,
        max_new_tokens=max_new_tokens, batch_size=batch_size, sampling=Sampling(temperature, seed), progress=progress,
    )  # fmt: skip
    to_texts = decode or (lambda tokenizer, ids: tokenizer.batch_decode(ids, skip_special_tokens=True))
    results = []
    for ids in found:
        scores = draw_scores(chosen, to_texts(tokenizer, ids), draws)
        results.append({"temperature": temperature, "seed": seed, **leak_at(chosen, scores)})
    return results
