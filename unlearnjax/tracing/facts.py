"""Facts to trace: a prompt, its subject, and what the model should say first. From a file, or made of questions."""

import re
from collections.abc import Sequence
from typing import NamedTuple

from unlearnjax.data.rows import Row, load_records, text_of
from unlearnjax.errors import UserError
from unlearnjax.evaluation.full.leak import document_of
from unlearnjax.evaluation.semeval import kind_of

_WORD = re.compile(r"[^\W\d_]\.(?= )|[^\W_]+(?:[-'\u2019.&][^\W_]+)*")  # an initial, or a word
_POSSESSIVE = re.compile(r"['\u2019]s$")
# Words that open a question with a capital and name nothing.
_OPENING = (
    "a according after an and are as at before but by can complete could define describe did discuss do does during "
    "explain find for from give had has have how identify if in is it let list might must my name now of on or "
    "outline please provide recall say share shall should show since so specify state suggest summarise summarize tell "
    "that the then there these this those to under was we were what when where which while who whom whose why "
    "with would write you your"
)
_OPENERS = frozenset(_OPENING.split())


class Fact(NamedTuple):
    """What the model should say first: `attribute`, a token's text (spaces around it do not count), or the first of the
    model's own tokens of `answer`; either is right where both are given."""

    id: str
    prompt: str
    subject: str
    attribute: str | None
    answer: str | None = None


class Skipped(NamedTuple):
    """A fact that is not traced, and why."""

    id: str
    reason: str


def load_facts(source: str) -> tuple[list[Fact], list[Skipped]]:
    """Facts from a file or a hub data set, of one of two kinds.

    Args:
      source: rows with `subject`, `prompt` and `attribute` (ROME's known_facts.json, and Selective Amnesia's), where a
        `prediction` that begins with the attribute is the whole answer: another tokenizer cuts it elsewhere; or rows
        with `input` and `output`, and `subject` if it is known: else `facts_of_rows` finds one.

    Raises:
      UserError: a file that cannot be read, a row without one of these columns, or no rows; it names file and row.
    """
    facts: list[Fact] = []
    rows: list[Row] = []
    for number, (place, record) in enumerate(load_records(source), start=1):
        name = str(record.get("known_id", record.get("id", f"row-{number}")))
        if "prompt" in record or ("subject" in record and "input" not in record):
            prompt, subject, attribute = (text_of(record, c, place) for c in ("prompt", "subject", "attribute"))
            whole = record.get("prediction")
            whole = whole if isinstance(whole, str) and whole.strip().startswith(attribute.strip()) else None
            facts.append(Fact(name, prompt, subject, attribute, whole))
            continue
        row = Row(name, text_of(record, "input", place), text_of(record, "output", place), "")
        if record.get("subject") is None:
            rows.append(row)
        else:
            facts.append(Fact(name, row.input, text_of(record, "subject", place), None, row.output))
    if not facts and not rows:
        raise UserError(f"{source}: holds no facts; give rows with prompt, subject and attribute, or input and output")
    made, skipped = facts_of_rows(rows)
    return [*facts, *made], skipped


def facts_of_rows(rows: Sequence[Row]) -> tuple[list[Fact], list[Skipped]]:
    """A fact per question whose subject is found; completions (ids that end in sc<digit>) are no questions.

    The subject is the run of capitalised words that most questions about the same document share (by LUME's ids), the
    longest of these, the first of these; words that open a question do not count.
    """
    prompts: dict[str, list[str]] = {}
    for row in rows:
        if kind_of(row.id) != "sc":
            prompts.setdefault(document_of(row.id), []).append(row.input)
    facts, skipped = [], []
    for row in rows:
        if kind_of(row.id) == "sc":
            skipped.append(Skipped(row.id, "is a completion, not a question"))
            continue
        runs = names_in(row.input)
        if not runs:
            skipped.append(Skipped(row.id, "no subject found: its question has no capitalised name"))
            continue
        subject = max(runs, key=lambda run: (sum(run in p for p in prompts[document_of(row.id)]), len(run.split())))
        facts.append(Fact(row.id, row.input, subject, None, row.output))
    return facts, skipped


def names_in(text: str) -> list[str]:
    """Runs of capitalised words with single spaces between them, in their order, without a word that opens a question.

    A possessive ends its run and is left out.
    """
    runs: list[tuple[int, int]] = []
    open_until = -1  # where the run so far ends, if the next word may go on with it
    for word in _WORD.finditer(text):
        name, begin = _POSSESSIVE.sub("", word.group()), word.start()
        end = begin + len(name)
        opens = text[:begin].strip(" \"'") == "" and name.lower() in _OPENERS
        if not name[0].isupper() or opens or name == "I":
            continue
        if begin == open_until + 1 and text[open_until] == " ":
            runs[-1] = (runs[-1][0], end)
        else:
            runs.append((begin, end))
        open_until = end if end == word.end() else -1
    return [text[begin:end] for begin, end in runs]
