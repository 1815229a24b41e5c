"""Everything in this folder, of models that share base weights: what the official score hides (`--evaluate full`).

A model's report has, where it could be measured (else the key is missing):

  membership    six attacks on the forgotten documents (`attacks`)
  personal      personal values found anywhere in the outputs, per split (`leak`)
  rouge         ROUGE-L recall of as many words as the gold has, above chance, per split (`fair_rouge`)
  outputs       the outputs' shape per split, their perplexity under the original model, their entropy (`collapse`)
  sampled       leak@k at temperature 1 (`sampled`)
  probes        the forget rows reworded, or begun with the gold's first tokens (`probes`)
  relearning    how fast a few rows bring the rest back (`relearn`)
  quantisation  the scores after rounding the weights to bfloat16, 8 and 4 bits (`quantise`)
  gold_gap      each term's distance to the gold model (`gold_gap`)
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, PyTree

from unlearnjax.data.rows import Document, Row
from unlearnjax.evaluation.csvs import Scored
from unlearnjax.evaluation.full.asked import Asking
from unlearnjax.evaluation.full.attacks import Losses, document_losses, membership_attacks
from unlearnjax.evaluation.full.collapse import collapse, output_statistics
from unlearnjax.evaluation.full.fair_rouge import chance_floors, fair_rouge
from unlearnjax.evaluation.full.gold_gap import gold_gap
from unlearnjax.evaluation.full.leak import document_of, leak
from unlearnjax.evaluation.full.probes import probes
from unlearnjax.evaluation.full.quantise import quantisation
from unlearnjax.evaluation.full.relearn import Attack, original_knowledge, relearn
from unlearnjax.evaluation.full.sampled import sampled_leak, spread
from unlearnjax.evaluation.generate import stack_of_one
from unlearnjax.evaluation.journal import Journal
from unlearnjax.models.protocol import Model

SPLITS = ("forget", "retain")
BASE = "base"  # the name of the model before unlearning, first among those that share its weights
PARTS = (
    "membership", "personal", "rouge", "outputs", "sampled", "probes", "relearning", "quantisation", "gold_gap",
)  # fmt: skip


class Texts(NamedTuple):
    """The data, as far as this suite reads it. Members and non-members may be empty."""

    forget: Sequence[Row]
    retain: Sequence[Row]
    members: Sequence[Document]
    nonmembers: Sequence[Document]


class Effort(NamedTuple):
    """`rows` forget rows are asked where rows are asked many times, and `draws` times each where tokens are drawn."""

    rows: int = 32
    draws: int = 64
    attack: Attack = Attack()


class Subjects(NamedTuple):
    """Models that share base weights, and what the official evaluation found for each."""

    params: PyTree[Array]
    lora: PyTree[Array] | None  # [N, ...], the scale folded into b; None for the base weights alone
    names: Sequence[str]
    outputs: Sequence[Mapping[str, Sequence[Scored]]]  # {forget, retain}
    scores: Sequence[Mapping[str, Any]]


class Yardsticks(NamedTuple):
    """What every model of a report is measured against."""

    original: PyTree[Array]  # the base weights before unlearning
    floors: Mapping[str, Mapping[tuple[str, str], float | None]]  # of ROUGE by chance, per split
    losses: Losses | None  # of the documents under `original`
    known: Sequence[dict[str, float | None]] | None  # what relearning would restore


def yardsticks(
    model: Model, original: PyTree[Array], texts: Texts, outputs: Mapping[str, Sequence[Scored]], asking: Asking,
    effort: Effort,
) -> Yardsticks:  # fmt: skip
    """Measure the model before unlearning.

    Args:
      outputs: of any model, {forget, retain}: only the golds are read.
    """
    losses = None
    if texts.members:
        (losses,) = document_losses(
            model, original, None, asking.tokenizer, texts.members, texts.nonmembers, batch_size=asking.batch_size
        )
    known = None
    if can_relearn(texts.forget):
        known = original_knowledge(model, original, texts.forget, asking, effort.attack, most=effort.rows)
    return Yardsticks(original, {split: chance_floors(outputs[split]) for split in SPLITS}, losses, known)


def can_relearn(rows: Sequence[Row]) -> bool:
    """Whether there is another document to ask about when one is attacked."""
    return len({document_of(row.id) for row in spread(rows, len(rows))}) > 1


def measure(
    model: Model,
    subjects: Subjects,
    texts: Texts,
    asking: Asking,
    effort: Effort,
    against: Yardsticks,
    *,
    gold: Mapping[str, Any] | None = None,
    gold_scores: Mapping[str, Any] | None = None,
    journal: Journal | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """What the official score hides about each of the subjects.

    Args:
      gold, gold_scores: what this function and the official evaluation found for the gold model.
      journal: keeps each part that is done; its fingerprint must tell the subjects' weights.
      progress: called as (part, parts done, parts in all).

    Returns:
      Per model the keys of the file's docstring. `membership` needs documents, `sampled` and `probes` rows of a known
      kind, `relearning` those of several documents, `gold_gap` the gold model's scores.
    """
    params, lora = subjects.params, subjects.lora
    count = len(subjects.names)
    rows = spread(texts.forget, effort.rows)
    batch_size, tokenizer = asking.batch_size, asking.tokenizer

    def membership() -> list[Any]:
        of_gold = None if gold is None else gold.get("membership")

        def attacks(lora: PyTree[Array] | None, reference: Losses | None) -> list[Any]:
            return membership_attacks(
                model, params, lora, tokenizer, texts.members, texts.nonmembers, batch_size=batch_size,
                reference=reference, gold=of_gold,
            )  # fmt: skip

        found = attacks(lora, against.losses)
        if params is against.original and subjects.names[0] == BASE:
            # Against itself the reference attack would compare rounding errors.
            found[0] = attacks(None, None)[0]
        return found

    def outputs() -> list[Any]:
        found = []
        for n, own in enumerate(subjects.outputs):
            alone = None if lora is None else stack_of_one(jax.tree.map(lambda x, n=n: x[n], lora))
            statistics: dict[str, Any] = {}
            for split in SPLITS:
                (original,) = output_statistics(
                    model, against.original, None, tokenizer, own[split], batch_size=batch_size
                )
                (itself,) = output_statistics(model, params, alone, tokenizer, own[split], batch_size=batch_size)
                statistics[split] = {
                    **collapse([row.model_output for row in own[split]]),
                    "perplexity": original["perplexity"],
                    "entropy": itself["entropy"],
                }
            found.append(statistics)
        return found

    def sampled() -> list[Any]:
        return sampled_leak(
            model, params, lora, tokenizer, rows, eos_token_ids=asking.eos_token_ids,
            max_new_tokens=asking.max_new_tokens, batch_size=batch_size, draws=effort.draws, most=effort.rows,
            decode=asking.decode,
        )  # fmt: skip

    def relearning() -> list[Any]:
        return relearn(model, params, lora, texts.forget, asking, effort.attack, most=effort.rows, before=against.known)

    parts: dict[str, Callable[[], list[Any]]] = {
        "personal": lambda: [{split: leak(own[split]) for split in SPLITS} for own in subjects.outputs],
        "rouge": lambda: [
            {split: fair_rouge(own[split], against.floors[split]) for split in SPLITS} for own in subjects.outputs
        ],
        "outputs": outputs,
        "quantisation": lambda: quantisation(model, params, lora, rows, asking, against.original),
    }
    if texts.members:
        parts["membership"] = membership
    if rows:
        parts["sampled"], parts["probes"] = sampled, lambda: probes(model, params, lora, rows, asking)
    else:
        del parts["quantisation"]
    if against.known is not None:
        parts["relearning"] = relearning
    if gold_scores is not None:
        parts["gold_gap"] = lambda: [gold_gap(scores, gold_scores) for scores in subjects.scores]
    found: list[dict[str, Any]] = [{} for _ in range(count)]
    names = [name for name in PARTS if name in parts]
    for done, name in enumerate(names, start=1):
        values = kept(journal, name, parts[name])
        for one, value in zip(found, values, strict=True):
            one[name] = value
        if progress is not None:
            progress("what the score hides", done, len(names))
    return found


def kept(journal: Journal | None, name: str, compute: Callable[[], list[Any]]) -> list[Any]:
    """A part from the journal if it is there, else computed and recorded."""
    if journal is None:
        return compute()
    records = journal.records(f"full {name}")
    found = records.found.get((0,))
    if found is None:
        found = compute()
        records.add([0], found)
    return list(found)
