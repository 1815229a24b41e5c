"""Facts as token ids, with the span of their subject."""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from unlearnjax.tracing.facts import Fact, Skipped

BROKEN = "\ufffd"  # what a piece of a letter decodes to


class Located(NamedTuple):
    """A fact's prompt as ids; its subject is ids[begin:end].

    The right first token is one of `first`, or has one of the stripped texts `expected`.
    """

    fact: Fact
    ids: list[int]
    begin: int
    end: int
    expected: frozenset[str]
    first: frozenset[int]


def locate(facts: Sequence[Fact], tokenizer: Any, most: int) -> tuple[list[Located], list[Skipped]]:
    """Tokenize prompts as they are (no chat template) and find their subjects: the tokens that share a letter with its
    first occurrence as whole words, or where there is none with its first occurrence.

    Args:
      tokenizer: a fast transformers tokenizer. most: tokens that the model's context holds.
    """
    if not facts:
        return [], []
    coded = tokenizer([f.prompt for f in facts], return_offsets_mapping=True)
    located, skipped = [], []
    for fact, ids, offsets in zip(facts, coded["input_ids"], coded["offset_mapping"], strict=True):
        first = _place(fact.subject, fact.prompt)
        if first is None:
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
        located.append(Located(fact, list(ids), inside[0], inside[-1] + 1, *_expected(fact, tokenizer)))
    return located, skipped


def _place(subject: str, prompt: str) -> int | None:
    """Where the subject begins: not in the middle of a word (Ann in Annabel), if it can be had elsewhere."""
    if not subject:
        return None
    whole = re.search(rf"(?<!\w){re.escape(subject)}(?!\w)", prompt)
    first = prompt.find(subject) if whole is None else whole.start()
    return None if first < 0 else first


def _expected(fact: Fact, tokenizer: Any) -> tuple[frozenset[str], frozenset[int]]:
    """Texts and ids of the right first token: an answer may follow with or without a space, and its first token may
    differ with it. A token that is blank (some tokenizers cut the space before a number off) is not the first one; one
    that is a piece of a letter has no text."""
    texts = set() if fact.attribute is None else {fact.attribute.strip()}
    answer, first = (fact.answer or "").strip(), set()
    for ids in tokenizer([answer, f" {answer}"], add_special_tokens=False)["input_ids"]:
        token, text = next(((i, t) for i in ids if (t := tokenizer.decode([i]).strip())), (None, ""))
        if token is not None:
            first.add(token)
            texts.add(text)
    return frozenset(t for t in texts if t and BROKEN not in t), frozenset(first)
