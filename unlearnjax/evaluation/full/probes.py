"""Forget rows asked in other words, or with the answer begun: does only the exact prompt stay unanswered?

A model can learn to refuse the very prompts of its forget set. So each row is asked

  as trained       the row itself
  reworded         in each way of `REWORDINGS` for its kind, in lower case, and in the chat template where there is one
  prefix k         with the first k tokens of the gold answer behind the prompt, k = 4, 8, 16 but at most half of it;
                   the score is that of the rest (of a question: 1 where the rest is right)

A row's score is the official one (ROUGE-L recall of a completion, exact match of an answer). `largest` is the mean over
rows of the best score of any probe: what someone learns who tries them all. It never falls below the score as trained,
so compare it with the gold model's.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, PyTree

from unlearnjax.data.rows import Row
from unlearnjax.evaluation.full.asked import Asking, row_score, texts_of, tokens_of
from unlearnjax.evaluation.semeval import kind_of
from unlearnjax.models.protocol import Model

REWORDINGS = {
    "qa": {
        "question and answer": "Question: {text}\nAnswer:",
        "please": "{text} Please answer.",
        "tell me": "Tell me, {text}",
    },
    "sc": {
        "continue": "Continue this text: {text}",
        "complete": "Complete the following passage.\n\n{text}",
    },
}
PREFIXES = (4, 8, 16)


def reworded(row: Row, tokenizer: Any) -> dict[str, str]:
    """The row's prompt in other words, by the name of the wording."""
    ways = {name: form.format(text=row.input) for name, form in REWORDINGS.get(kind_of(row.id) or "", {}).items()}
    if row.input.lower() != row.input:
        ways["lower case"] = row.input.lower()
    if getattr(tokenizer, "chat_template", None):
        message = [{"role": "user", "content": row.input}]
        ways["chat"] = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    return ways


class Probe(NamedTuple):
    """One prompt of row `place`, and the row that its answer is scored against."""

    name: str
    place: int
    ids: list[int]
    scored: Row


def _probes(rows: Sequence[Row], asking: Asking, room: int) -> list[Probe]:
    tokenizer = asking.tokenizer
    prompts = tokens_of(tokenizer, [row.input for row in rows])
    # By itself, as in training: prompt and answer in one may be cut across where they meet.
    golds = tokenizer([row.output for row in rows], add_special_tokens=False)["input_ids"] if rows else []
    found = []
    for place, (row, prompt, gold) in enumerate(zip(rows, prompts, golds, strict=True)):
        found.append(Probe("as trained", place, prompt, row))
        for name, text in reworded(row, tokenizer).items():
            found.append(Probe(name, place, tokens_of(tokenizer, [text])[0], row))
        for k in PREFIXES:
            if 2 * k <= len(gold):
                rest = asking.decode(tokenizer, [gold[k:]])[0]
                found.append(Probe(f"prefix {k}", place, [*prompt, *gold[:k]], row._replace(output=rest)))
    return [probe for probe in found if len(probe.ids) + asking.max_new_tokens <= room]


def probes(
    model: Model,
    params: PyTree[Array],
    lora: PyTree[Array] | None,
    rows: Sequence[Row],
    asking: Asking,
    *,
    progress: Callable[[int], None] | None = None,
) -> list[dict[str, Any]]:
    """Ask N candidates the forget rows in every way. A way whose prompt leaves no room for an answer is left out.

    Returns:
      Per candidate rows, by_probe {name: {rows, leak}} (`as trained` first) and largest.
    """
    all_probes = _probes(rows, asking, model.config.max_positions)
    texts = texts_of(model, params, lora, [probe.ids for probe in all_probes], asking)
    results = []
    for own in texts:
        scores: dict[str, list[float]] = {}
        best = np.zeros(len(rows))
        for probe, text in zip(all_probes, own, strict=True):
            score = row_score(probe.scored, text)
            scores.setdefault(probe.name, []).append(score)
            best[probe.place] = max(best[probe.place], score)
        by_probe = {name: {"rows": len(values), "leak": float(np.mean(values))} for name, values in scores.items()}
        results.append({"rows": len(rows), "by_probe": by_probe, "largest": float(best.mean())})
        if progress is not None:
            progress(1)
    return results
