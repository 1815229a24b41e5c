"""Asking N candidates some rows and scoring the answers: what several parts of the suite do over and over."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, PyTree

from unlearnjax.data.rows import Row
from unlearnjax.evaluation.exact import exact_match
from unlearnjax.evaluation.generate import generate_candidates
from unlearnjax.evaluation.nll import token_nll_candidates
from unlearnjax.evaluation.rouge import rouge_l_recall
from unlearnjax.evaluation.semeval import kind_of
from unlearnjax.models.protocol import Model


class Asking(NamedTuple):
    """How rows are asked. `decode` turns token ids into texts, as the official protocol does."""

    tokenizer: Any
    decode: Callable[[Any, list[list[int]]], list[str]]
    eos_token_ids: Sequence[int]
    max_new_tokens: int
    batch_size: int


def tokens_of(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, with the tokenizer's own special tokens."""
    return [list(ids) for ids in tokenizer(list(texts))["input_ids"]] if texts else []


def texts_of(
    model: Model, params: PyTree[Array], lora: PyTree[Array] | None, prompts: Sequence[Sequence[int]], asking: Asking
) -> list[list[str]]:
    """Greedy answers of N candidates to prompts, [N][rows]."""
    if not prompts:
        return [[] for _ in range(1 if lora is None else jax.tree.leaves(lora)[0].shape[0])]
    pad = model.config.pad_token_id
    found = generate_candidates(
        model, params, lora, prompts, eos_token_ids=asking.eos_token_ids, pad_token_id=0 if pad is None else pad,
        max_new_tokens=asking.max_new_tokens, batch_size=asking.batch_size,
    )  # fmt: skip
    return [asking.decode(asking.tokenizer, ids) for ids in found]


def row_score(row: Row, text: str) -> float:
    """The official score of an answer: ROUGE-L recall of a completion, exact match of a question's answer."""
    return rouge_l_recall(row.output, text) if kind_of(row.id) == "sc" else float(exact_match(row.output, text))


def answer_scores(
    model: Model, params: PyTree[Array], lora: PyTree[Array] | None, rows: Sequence[Row], asking: Asking
) -> list[Float[np.ndarray, " rows"]]:
    """Each candidate's official score of every row."""
    texts = texts_of(model, params, lora, tokens_of(asking.tokenizer, [row.input for row in rows]), asking)
    return [np.array([row_score(row, text) for row, text in zip(rows, own, strict=True)]) for own in texts]


def knowledge(
    model: Model, params: PyTree[Array], lora: PyTree[Array] | None, rows: Sequence[Row], asking: Asking
) -> list[dict[str, float | None]]:
    """Per candidate `leak`, the rows' mean official score, and `nll`, the mean over rows of the answer's mean NLL.

    `nll` is in nats per token, None where it is not finite.
    """
    scores = answer_scores(model, params, lora, rows, asking)
    whole = tokens_of(asking.tokenizer, [row.input + row.output for row in rows])
    starts = [len(ids) for ids in tokens_of(asking.tokenizer, [row.input for row in rows])]
    nll = token_nll_candidates(model, params, lora, whole, starts, batch_size=asking.batch_size).mean
    return [
        {"leak": float(own.mean()), "nll": _finite(float(np.nanmean(likelihoods)))}
        for own, likelihoods in zip(scores, nll, strict=True)
    ]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
