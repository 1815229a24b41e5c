"""Facts as token ids, with the span of their subject."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from unlearnjax.tracing.facts import Fact, Skipped


class Located(NamedTuple):
    """A fact's prompt as ids; its subject is ids[begin:end]. `expected`: texts of the right first token, stripped."""

    fact: Fact
    ids: list[int]
    begin: int
    end: int
    expected: frozenset[str]


def locate(facts: Sequence[Fact], tokenizer: Any, most: int) -> tuple[list[Located], list[Skipped]]:
    """Tokenize prompts as they are (no chat template) and find their subjects: the tokens that share a letter with its
    first occurrence.

    Args:
      tokenizer: a fast transformers tokenizer. most: tokens that the model's context holds.
    """
    if not facts:
        return [], []
    coded = tokenizer([f.prompt for f in facts], return_offsets_mapping=True)
    located, skipped = [], []
    for fact, ids, offsets in zip(facts, coded["input_ids"], coded["offset_mapping"], strict=True):
        first = fact.prompt.find(fact.subject) if fact.subject else -1
        if first < 0:
            skipped.append(Skipped(fact.id, f"its subject {fact.subject!r} is not in its prompt {fact.prompt!r}"))
            continue
        stop = first + len(fact.subject)
        inside = [i for i, (a, b) in enumerate(offsets) if a < stop and b > first and b > a]
        if not inside:
            skipped.append(Skipped(fact.id, f"its subject {fact.subject!r} has no token of its own"))
            continue
        if len(ids) > most:
            skipped.append(Skipped(fact.id, f"has {len(ids)} tokens, and the model's context holds {most}"))
            continue
        located.append(Located(fact, list(ids), inside[0], inside[-1] + 1, _expected(fact, tokenizer)))
    return located, skipped


def _expected(fact: Fact, tokenizer: Any) -> frozenset[str]:
    """An answer may follow with or without a space, and its first token may differ with it."""
    attribute = frozenset() if fact.attribute is None else frozenset([fact.attribute.strip()])
    answer = (fact.answer or "").strip()
    coded = tokenizer([answer, f" {answer}"], add_special_tokens=False)["input_ids"]
    texts = [next((t for t in (tokenizer.decode([i]).strip() for i in ids) if t), "") for ids in coded]
    return attribute | {t for t in texts if t}
