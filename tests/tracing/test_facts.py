import json

import pytest

from unlearnjax.data.bpe import train_tokenizer
from unlearnjax.data.rows import Row
from unlearnjax.errors import UserError
from unlearnjax.tracing.facts import Fact, facts_of_rows, load_facts, names_in
from unlearnjax.tracing.tokens import locate


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("What is Tiffi Magenta's phone number?", ["Tiffi Magenta"]),
        ("In which city did Sherry, Odilia and Zuzana meet?", ["Sherry", "Odilia", "Zuzana"]),
        ("Which university did Peter S. Hellman attend?", ["Peter S. Hellman"]),
        ("Who saw Anna's Bern?", ["Anna", "Bern"]),  # a possessive ends its run
        ("Marie-Claire\u2019s home is where?", ["Marie-Claire"]),
        ("\u00c9mile knows who The Hague chose?", ["\u00c9mile", "The Hague"]),
        ("what is after three?", []),
        ("Describe Anna Smith's career.", ["Anna Smith"]),
        ("Tell me about Paris.", ["Paris"]),
        ("Could you name what Anna wrote?", ["Anna"]),
        ("Do I know Bern?", ["Bern"]),
        ("Will Smith's town is where?", ["Will Smith"]),
    ],
)
def test_names_are_runs_of_capitals(text, names):
    assert names_in(text) == names


def test_the_subject_is_what_questions_about_one_thing_share():
    rows = [
        Row("p1qa0", "When did Social Security Office File know Ann Lee?", "1980", "Task2"),
        Row("p1qa1", "What is Ann Lee's town?", "Bern", "Task2"),
        Row("p1qa2", "Where does Ann Lee work?", "Metz", "Task2"),
        Row("p1sc1", "Ann Lee was born", "in Bern", "Task2"),
        Row("p2qa0", "what comes next?", "this", "Task2"),
    ]
    facts, skipped = facts_of_rows(rows)
    assert [(f.id, f.subject, f.answer) for f in facts] == [
        ("p1qa0", "Ann Lee", "1980"), ("p1qa1", "Ann Lee", "Bern"), ("p1qa2", "Ann Lee", "Metz")
    ]  # fmt: skip
    assert [s.id for s in skipped] == ["p1sc1", "p2qa0"]
    assert "completion" in skipped[0].reason and "no subject" in skipped[1].reason


def test_files_of_both_kinds(tmp_path):
    record = {
        "known_id": 7,
        "subject": "Ann Lee",
        "prompt": "Ann Lee's town",
        "attribute": " Be",
        "prediction": "Bern.",
    }
    other = {"subject": "Ann", "prompt": "Ann is", "attribute": "x", "prediction": "unlike it"}
    (tmp_path / "known.json").write_text(json.dumps([record, other]))
    facts, skipped = load_facts(str(tmp_path / "known.json"))
    assert facts == [Fact("7", "Ann Lee's town", "Ann Lee", " Be", "Bern."), Fact("row-2", "Ann is", "Ann", "x")]
    assert not skipped
    (tmp_path / "rows.jsonl").write_text(json.dumps({"id": "aqa0", "input": "Who is Ann?", "output": "Me"}) + "\n")
    assert load_facts(str(tmp_path / "rows.jsonl"))[0] == [Fact("aqa0", "Who is Ann?", "Ann", None, "Me")]
    told = {"id": "b", "input": "where does anna live?", "output": "Bern", "subject": "anna"}
    (tmp_path / "told.json").write_text(json.dumps([told]))
    assert load_facts(str(tmp_path / "told.json"))[0] == [Fact("b", "where does anna live?", "anna", None, "Bern")]
    (tmp_path / "broken.json").write_text(json.dumps([{"subject": "Ann", "prompt": "Ann is"}]))
    with pytest.raises(UserError, match=r"broken.json, row 1: no column 'attribute'"):
        load_facts(str(tmp_path / "broken.json"))
    (tmp_path / "empty.json").write_text("[]")
    with pytest.raises(UserError, match=r"empty.json: holds no facts"):
        load_facts(str(tmp_path / "empty.json"))


def test_spans_cover_the_subject_and_nothing_else():
    prompts = ["Where is Ann Lee now?", "Ann Lee is where?", "Ask \u00c9mile Z\u00f6e"]
    tokenizer = train_tokenizer(prompts * 3, 300)
    facts = [Fact(str(i), p, s, None, "Bern") for i, (p, s) in
             enumerate(zip(prompts, ["Ann Lee", "Ann Lee", "\u00c9mile Z\u00f6e"], strict=True))]  # fmt: skip
    facts += [Fact("3", "Where is he?", "Ann Lee", None), Fact("4", "Ann " * 40, "Ann", None), Fact("5", "x", "", None)]
    located, skipped = locate(facts, tokenizer, 30)
    for x in located:
        assert tokenizer.decode(x.ids[x.begin : x.end]).strip() == x.fact.subject
        assert x.fact.subject not in tokenizer.decode(x.ids[x.begin + 1 : x.end])
    assert [s.id for s in skipped] == ["3", "4", "5"]
    assert "'Ann Lee' is not in its prompt 'Where is he?'" in skipped[0].reason
    assert "context holds 30" in skipped[1].reason


def test_a_subject_is_a_word_where_it_can_be():
    prompts = ["Annabel and Ann met", "Annabel met"]
    tokenizer = train_tokenizer(prompts, 300)
    located, _ = locate([Fact(str(i), p, "Ann", None, "x") for i, p in enumerate(prompts)], tokenizer, 30)
    before = [tokenizer.decode(x.ids[: x.begin]).strip() for x in located]
    assert before == ["Annabel and", ""]


def test_blanks_and_pieces_of_letters_are_no_first_token():
    """Tokenizers that cut digits off from the space before them, and letters of several bytes."""
    tokenizer = train_tokenizer(["x"], 260)  # bytes
    ((number, city), _) = locate([Fact("a", "Ann", "Ann", None, "1988"), Fact("b", "Ann", "Ann", None, "\u6771")],
                                 tokenizer, 30)  # fmt: skip
    assert number.expected == {"1"} and len(number.first) == 1
    assert city.expected == frozenset() and len(city.first) == 1


def test_a_right_first_token_may_follow_a_space_or_not():
    tokenizer = train_tokenizer(["Bern Bern Bern xBern"] * 5, 300)
    ((x,), _) = locate([Fact("a", "Ann is", "Ann", " B", "Bern")], tokenizer, 30)
    assert "B" in x.expected
    first = tokenizer.decode(tokenizer("Bern", add_special_tokens=False)["input_ids"][:1]).strip()
    assert first in x.expected
