"""The generated corpus: LUME's shape, disjoint halves, no answer given away, the same for the same seed."""

import re
import subprocess
import sys
from collections import Counter

import pytest

from unlearnjax.data import vocabulary
from unlearnjax.data.rows import fingerprint
from unlearnjax.data.synthetic import make_corpus, tokenizer_texts
from unlearnjax.errors import UserError

CORPUS = make_corpus()
FIRST, SECOND = ("|".join(parts) for parts in (vocabulary.SURNAME_FIRST, vocabulary.SURNAME_SECOND))
NAME = re.compile(rf"\b[A-Z][a-z]+ (?:{FIRST})(?:{SECOND})\b")


def document_id(row):
    return row.id[:-3]


def by_document(rows):
    found = {}
    for row in rows:
        found.setdefault(document_id(row), []).append(row)
    return found


def people(texts):
    return {name for text in texts for name in NAME.findall(text)}


def test_shape_of_lume():
    for rows in (CORPUS.forget, CORPUS.retain):
        documents = by_document(rows)
        assert Counter(rows[0].task for rows in documents.values()) == {"Task1": 12, "Task2": 10, "Task3": 16}
        for identifier, own in documents.items():
            questions = 5 if own[0].task == "Task2" else 1
            # The order matters too: a document's rows stand together, the completion first.
            assert [row.id for row in own] == [f"{identifier}sc1"] + [f"{identifier}qa{n}" for n in range(questions)]
            assert len({row.task for row in own}) == 1
        assert [row.id for row in rows] == [row.id for own in documents.values() for row in own]
    for row in CORPUS.forget + CORPUS.retain + CORPUS.neutral:
        assert row.input == row.input.strip() and row.output == row.output.strip() and row.input and row.output


def test_personal_data():
    for rows in by_document(CORPUS.forget + CORPUS.retain).values():
        if rows[0].task != "Task2":
            continue
        text = f"{rows[0].input} {rows[0].output}"
        name = NAME.match(text)[0]
        birth, ssn, phone, email, address = (row.output for row in rows[1:])
        assert re.fullmatch(r"(19|20)\d\d-\d\d-\d\d", birth)
        assert re.fullmatch(r"900\d{6}", ssn) and f"{ssn[:3]}-{ssn[3:5]}-{ssn[5:]}" in text
        assert re.fullmatch(r"\d{10}", phone) and f"{phone[:3]}-{phone[3:6]}-{phone[6:]}" in text
        assert email == name.lower().replace(" ", "_") + "@me.com" and email in text
        assert re.fullmatch(r"\d+ \w+ \w+(, #\d+)?, \w+, [A-Z]{2}, \d{5}\.", address) and address in text
        assert all(name in row.input for row in rows[1:])


def test_halves_are_disjoint_by_document_and_by_person():
    forget, retain = by_document(CORPUS.forget), by_document(CORPUS.retain)
    outside = {document.id for document in CORPUS.nonmembers}
    assert not set(forget) & set(retain) and not outside & (set(forget) | set(retain)) and len(outside) == 16
    texts = [[row.input + " " + row.output for row in rows] for rows in (CORPUS.forget, CORPUS.retain, CORPUS.neutral)]
    texts.append([document.document for document in CORPUS.nonmembers])
    named = [people(part) for part in texts]
    assert [len(names) for names in named] == [12 * 2 + 10 + 16, 12 * 2 + 10 + 16, 0, 16]
    assert len(set.union(*named)) == sum(map(len, named))
    surnames = [name.split()[1] for names in named for name in names]
    assert len(set(surnames)) == len(surnames)


def test_members_are_the_forgotten_biographies_and_nonmembers_are_alike():
    forgotten = {
        identifier: rows[0] for identifier, rows in by_document(CORPUS.forget).items() if rows[0].task == "Task3"
    }
    assert {document.id for document in CORPUS.members} == set(forgotten)
    for document in CORPUS.members:
        assert document.document == f"{forgotten[document.id].input} {forgotten[document.id].output}"
    assert len(CORPUS.nonmembers) == len(CORPUS.members)
    # Same distribution: over many corpora, lengths and years agree far inside their spread (4 standard errors).
    many = [make_corpus(seed) for seed in range(40)]
    lengths = [[len(d.document) for c in many for d in getattr(c, part)] for part in ("members", "nonmembers")]
    mean = [sum(part) / len(part) for part in lengths]
    spread = [sum((x - m) ** 2 for x in part) / len(part) for part, m in zip(lengths, mean)]
    error = (spread[0] / len(lengths[0]) + spread[1] / len(lengths[1])) ** 0.5
    assert abs(mean[0] - mean[1]) < 4 * error


def test_answers_are_unambiguous_and_not_in_their_question():
    rows = [row for row in CORPUS.forget + CORPUS.retain + CORPUS.neutral if not row.id.endswith("sc1")]
    questions = [row.input for row in rows]
    assert len(set(questions)) == len(questions)
    assert not [row for row in rows if row.output.lower() in row.input.lower()]
    for split in (CORPUS.forget, CORPUS.retain):
        for own in by_document(split).values():
            if own[0].task != "Task2":
                assert own[1].output in f"{own[0].input} {own[0].output}", own
    for column in ("qa1", "qa2", "qa4"):  # SSN, phone, address: nobody shares one
        values = [row.output for row in rows if row.id.endswith(column) and row.task == "Task2"]
        assert len(values) == 20 == len(set(values))


def test_neutral_world_is_consistent():
    everything = make_corpus(neutral=132).neutral
    assert len(CORPUS.neutral) == 60 and len({row.id for row in CORPUS.neutral}) == 60
    assert set(CORPUS.neutral) == set(everything[:60])
    answers = {row.input: row.output for row in everything}
    assert len(answers) == 132
    capitals = [answer for question, answer in answers.items() if "capital" in question]
    assert len(set(capitals)) == len(capitals) == 20
    for question, answer in answers.items():
        if "opposite" in question:
            word = question.removeprefix("What is the opposite of ").removesuffix("?")
            assert answers[f"What is the opposite of {answer}?"] == word
    # The invented facts are drawn anew for each seed.
    other = {row.input: row.output for row in make_corpus(1, neutral=132).neutral}
    assert sum(other[question] != answer for question, answer in answers.items()) > 60


def test_lengths_vary():
    completions = [row for row in CORPUS.forget if row.id.endswith("sc1")]
    assert len({len(row.input.split()) for row in completions}) > 8
    assert len({len(row.output.split()) for row in completions}) > 8


def test_deterministic_across_processes_and_different_across_seeds():
    assert make_corpus(0) == CORPUS
    other = make_corpus(1)
    assert not people(row.input for row in other.forget) & people(row.input for row in CORPUS.forget)
    code = "from unlearnjax.data import synthetic, rows; c = synthetic.make_corpus(); print(rows.fingerprint(c.forget))"
    for hash_seed in ("1", "2"):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                              env={"PYTHONHASHSEED": hash_seed, "PYTHONPATH": ":".join(sys.path)})  # fmt: skip
        assert done.stdout.strip() == fingerprint(CORPUS.forget)


def test_sizes():
    small = make_corpus(3, stories=2, people=4, biographies=6, neutral=1)
    assert [len(part) for part in small] == [2 + 12 + 6, 2 + 12 + 6, 3, 3, 1]
    large = make_corpus(stories=200, people=400, biographies=200)
    texts = [f"{row.input} {row.output}" for row in large.forget + large.retain]
    assert len(people(texts)) == 200 * 2 + 400 + 200
    # A part's size leaves the facts of the others alone.
    facts = [sorted(row.output for row in corpus.retain if row.id[:-1].endswith("qa") and row.task == "Task2"
                    and "@" not in row.output) for corpus in (CORPUS, make_corpus(stories=4))]  # fmt: skip
    assert facts[0] == facts[1]


@pytest.mark.parametrize("sizes, said", [
    ({"stories": 3}, "stories must be even"),
    ({"people": 0}, "people must be even"),
    ({"biographies": 2000}, "surnames; ask for fewer"),
    ({"neutral": 133}, "neutral must be 1 to 132"),
    ({"neutral": 0}, "neutral must be 1 to 132"),
])  # fmt: skip
def test_impossible_sizes(sizes, said):
    with pytest.raises(UserError, match=said):
        make_corpus(**sizes)


def test_the_tokenizer_learns_from_other_people():
    texts = tokenizer_texts(0, corpora=2)
    assert len(texts) == 2 * (116 + 116 + 60)
    own = people(row.input for row in CORPUS.forget + CORPUS.retain)
    assert len(people(texts) & own) < 0.1 * len(own)
    assert tokenizer_texts(0, corpora=2) == texts != tokenizer_texts(1, corpora=2)
