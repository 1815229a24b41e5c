"""ROUGE-L recall with Porter stemming, by the library that the SemEval-2025 Task 4 scorer itself uses."""

import functools
from typing import Any


@functools.cache
def _scorer() -> Any:
    from rouge_score import rouge_scorer

    return rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)


def rouge_l_recall(gold: str, generated: str) -> float:
    """Longest common subsequence of words over the number of words in `gold` (Lin 2004, section 3.1), in [0, 1].

    Words are runs of a-z and 0-9 after lower-casing; those longer than 3 letters are stemmed. 0 when `gold` has none.
    Being a recall, it grows with the length of `generated`.
    """
    return float(_scorer().score(gold, generated)["rougeL"].recall)
