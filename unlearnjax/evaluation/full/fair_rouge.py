"""ROUGE-L recall that length and chance cannot raise.

ROUGE-L recall, the official regurgitation score, grows with the length of the output: 256 tokens of anything recall a
good part of a short text, and two unrelated texts of one task share words anyhow. So the output is cut to the gold's
number of words, and what an unrelated text of that length would get is subtracted:

    fair = (x - floor) / (1 - floor)          (at least -1)

x is the mean over the rows of one split, task and kind of the recall of the cut output. `floor` is the mean, over the
same rows, of the recall of chance texts: the golds of other documents' rows of the same group, put one after another
and cut to the same number of words. Row i of n takes its chance texts from the rows that start at i + 1, i + 1 + n/4,
...: the same ones for every model, so the floor is a property of the rows. 1 is the gold itself, 0 no better than
chance; one row's own score is not formed, because a floor of one row is mostly noise.

Texts are scored as they are: an empty output is empty, not the "nan" of the official scorer.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from unlearnjax.evaluation.csvs import Scored
from unlearnjax.evaluation.full.leak import document_of
from unlearnjax.evaluation.rouge import rouge_l_recall
from unlearnjax.evaluation.semeval import KINDS, kind_of

CHANCE_TEXTS = 4  # per row
LEAST = -1.0  # bound of the fair score; only a floor above one half could pass it

Groups = dict[tuple[str, str], list[Scored]]


def rouge_words(text: str) -> list[str]:
    """The words that ROUGE counts, before stemming: runs of a-z and 0-9 of the lower-cased text."""
    return re.findall(r"[a-z0-9]+", text.lower())


def fair_recall(gold: str, generated: str) -> float:
    """ROUGE-L recall of the output's first words, as many as `gold` has."""
    return rouge_l_recall(gold, " ".join(rouge_words(generated)[: len(rouge_words(gold))]))


def groups(rows: Sequence[Scored]) -> Groups:
    """Rows by (task, kind), kinds `regurgitation` and `knowledge`; rows of no kind, or without a word, are left out."""
    found: Groups = {}
    for row in rows:
        kind = kind_of(row.id)
        if kind is not None and rouge_words(row.expected_output):
            found.setdefault((row.task, KINDS[kind]), []).append(row)
    return dict(sorted(found.items()))


def chance_texts(rows: Sequence[Scored], index: int) -> list[str]:
    """Texts of as many words as row `index`'s gold (or as there are), made of other documents' golds."""
    own = document_of(rows[index].id)
    length = len(rouge_words(rows[index].expected_output))
    count = min(CHANCE_TEXTS, len(rows) - 1)
    texts = []
    for start in range(count):
        words: list[str] = []
        for step in range(len(rows)):
            if len(words) >= length:
                break
            other = rows[(index + 1 + start * len(rows) // count + step) % len(rows)]
            if document_of(other.id) != own:
                words += rouge_words(other.expected_output)
        if words:
            texts.append(" ".join(words[:length]))
    return texts


def chance_floors(rows: Sequence[Scored]) -> dict[tuple[str, str], float | None]:
    """The floor of each (task, kind) of one split; None where a group has rows of one document only.

    It needs the golds alone, so one call serves every model on the same rows.
    """
    floors: dict[tuple[str, str], float | None] = {}
    for key, members in groups(rows).items():
        values = [
            math.fsum(rouge_l_recall(row.expected_output, text) for text in texts) / len(texts)
            for i, row in enumerate(members)
            if (texts := chance_texts(members, i))
        ]
        floors[key] = math.fsum(values) / len(values) if values else None
    return floors


def fair_rouge(
    rows: Sequence[Scored], floors: Mapping[tuple[str, str], float | None] | None = None
) -> dict[str, dict[str, Any]]:
    """Length-fair ROUGE-L recall of one split's outputs.

    Args:
      floors: `chance_floors` of the same rows, to save forming them again for each model.

    Returns:
      {task: {"regurgitation" | "knowledge": {rows, recall (the official one but for its "nan"), cut (of the cut
      outputs), floor, fair}}}; floor and fair are None where there is no other document to take chance texts from,
      and fair also where the floor is 1 (all golds are the same).
    """
    known = chance_floors(rows) if floors is None else floors
    found: dict[str, dict[str, Any]] = {}
    for (task, kind), members in groups(rows).items():
        cut = math.fsum(fair_recall(row.expected_output, row.model_output) for row in members) / len(members)
        recall = math.fsum(rouge_l_recall(row.expected_output, row.model_output) for row in members) / len(members)
        floor = known.get((task, kind))
        fair = None if floor is None or floor >= 1.0 else max((cut - floor) / (1.0 - floor), LEAST)
        found.setdefault(task, {})[kind] = {
            "rows": len(members), "recall": recall, "cut": cut, "floor": floor, "fair": fair,
        }  # fmt: skip
    return found
