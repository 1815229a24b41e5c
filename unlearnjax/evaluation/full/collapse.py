"""Signs that a model has broken down and not forgotten: what the outputs are like, beside whether they match.

A low forget score with many degenerate outputs is collapse. Per split: the shares of `unlearnjax.evaluation.degenerate`
(a loop, silence), of outputs that ran into the limit on new tokens where that is known, and the mean zlib ratio
(compressed over plain bytes; loops are near 0, LUME's golds at about .7 to 1.3, short texts above 1 because of zlib's
11 bytes of its own). With a model at hand, two numbers more: the perplexity of the outputs under the ORIGINAL model
(prose that it finds likely, or noise), and the mean entropy of the unlearned model's next-token distribution along its
own outputs (near 0: it is sure of its loop; near log of the vocabulary's size: it says anything).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Array, PyTree

from unlearnjax.errors import UserError
from unlearnjax.evaluation.csvs import Scored
from unlearnjax.evaluation.degenerate import degeneration, zlib_ratio
from unlearnjax.evaluation.full.token_stats import token_stats_candidates
from unlearnjax.models.protocol import Model


def collapse(texts: Sequence[str], hit_limit: Sequence[bool] | None = None) -> dict[str, Any]:
    """The shape of one split's outputs.

    Args:
      hit_limit: which generations ended for want of room; None where it is not known.

    Returns:
      outputs (their number), degenerate, distinct_2, repeated, compressed, empty (shares), hit_limit (share or None),
      zlib_ratio (mean; None without outputs that hold anything), words (mean number, between white space).

    Raises:
      UserError: not one `hit_limit` per text.
    """
    if hit_limit is not None and len(hit_limit) != len(texts):
        raise UserError(f"hit_limit has {len(hit_limit)} entries for {len(texts)} outputs; give one for each")
    ratios = [zlib_ratio(text) for text in texts if text]
    return {
        "outputs": len(texts),
        **degeneration(texts, hit_limit)._asdict(),
        "zlib_ratio": math.fsum(ratios) / len(ratios) if ratios else None,
        "words": sum(len(text.split()) for text in texts) / len(texts) if texts else None,
    }


def output_statistics(
    model: Model,
    params: PyTree[Array],
    lora: PyTree[Array] | None,
    tokenizer: Any,
    rows: Sequence[Scored],
    *,
    batch_size: int,
    progress: Callable[[int], None] | None = None,
) -> list[dict[str, float | None]]:
    """What N candidates of one model make of outputs after their prompts, token by token.

    The outputs' perplexity is this on the original model (`lora` None); the entropy along a candidate's own outputs is
    this on that candidate alone, a stack of one. Prompt and output are tokenised together, as the official script does
    for its likelihoods; what does not fit the context is cut off at its end.

    Args:
      model, params, lora, batch_size, progress: as of `token_stats_candidates`.
      rows: all of one model's outputs (or any texts).

    Returns:
      Per candidate: tokens (of the outputs, in all), nll (mean over them, in nats), perplexity (its exponential) and
      entropy (mean, in nats); the last three None where there are no tokens, or numbers are not finite.

    Raises:
      UserError: a row without tokens in prompt and output, or with ids outside the vocabulary.
    """
    room = model.config.max_positions
    prompts = [list(x) for x in tokenizer([row.input for row in rows])["input_ids"]] if rows else []
    whole = [list(x)[:room] for x in tokenizer([r.input + r.model_output for r in rows])["input_ids"]] if rows else []
    starts = [max(len(prompt), 1) - 1 for prompt in prompts]
    names = [f"row {row.id!r}" for row in rows]
    kept = [i for i, row in enumerate(whole) if len(row) - 1 > starts[i] or not row]
    found = token_stats_candidates(
        model,
        params,
        lora,
        [whole[i] for i in kept],
        batch_size=batch_size,
        names=[names[i] for i in kept],
        progress=progress,
    )
    results: list[dict[str, float | None]] = []
    for one in found:
        log_p = [stats.log_probability[starts[i] :] for i, stats in zip(kept, one)]
        mean = [stats.mean[starts[i] :] for i, stats in zip(kept, one)]
        tokens = sum(map(len, log_p))
        nll = -float(np.concatenate(log_p).astype(np.float64).mean()) if tokens else math.nan
        entropy = -float(np.concatenate(mean).astype(np.float64).mean()) if tokens else math.nan
        fine = math.isfinite(nll) and math.isfinite(entropy)
        results.append(
            {
                "tokens": tokens,
                "nll": nll if fine else None,
                "perplexity": math.exp(nll) if fine and nll < math.log(1e300) else None,
                "entropy": entropy if fine else None,
            }
        )
    return results
