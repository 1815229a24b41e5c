"""Probes with a model that answers as it is told, so that every score is known."""

import pytest

from unlearnjax.data.bpe import train_tokenizer
from unlearnjax.data.rows import Row
from unlearnjax.evaluation.full import probes
from unlearnjax.evaluation.full.asked import Asking
from unlearnjax.evaluation.protocol import decode
from unlearnjax.models.config import ModelConfig
from unlearnjax.models.decoder import build

GOLD = " upon a time there was a king who had no crown and no castle but a very good horse"
ROWS = [Row("a1sc1", "Once", GOLD, "Task1"), Row("a1qa0", "Who is he?", "Ann", "Task1")]


@pytest.fixture
def asking():
    # Every word is a token, so that a prefix of k tokens is a prefix of k words.
    tokenizer = train_tokenizer([r.input + r.output for r in ROWS] * 20, 400)
    return Asking(tokenizer, decode, (tokenizer.eos_token_id,), 16, 8)


def ask(monkeypatch, asking, *answers):
    """Each candidate is a function from the prompt's text to an answer."""
    config = ModelConfig("llama", 400, 16, 24, 1, 2, 2, 8, "rms", max_positions=64)

    def texts_of(model, params, lora, prompts, asking):
        return [[answer(text) for text in decode(asking.tokenizer, prompts)] for answer in answers]

    monkeypatch.setattr(probes, "texts_of", texts_of)
    return probes.probes(build(config), None, None, ROWS, asking)


def test_every_way_is_scored_and_the_best_counts(monkeypatch, asking):
    def silent(prompt):
        return ""

    def reluctant(prompt):
        """Knows the name when it is asked politely, and the text's end when 8 words of it are there."""
        if "Please" in prompt:
            return "ann"
        return GOLD.removeprefix(prompt.removeprefix("Once")) if "king who" in prompt else "nothing"

    none, some = ask(monkeypatch, asking, silent, reluctant)
    assert none["largest"] == 0 and {p["leak"] for p in none["by_probe"].values()} == {0.0}
    assert some["rows"] == 2 and some["largest"] == 1.0
    assert some["by_probe"]["please"] == {"rows": 1, "leak": 1.0}
    assert some["by_probe"]["as trained"] == {"rows": 2, "leak": 0.0}
    assert some["by_probe"]["lower case"] == {"rows": 2, "leak": 0.0}
    assert some["by_probe"]["prefix 8"] == {"rows": 1, "leak": 1.0}
    assert some["by_probe"]["prefix 4"]["leak"] == 0.0
    assert "prefix 16" not in some["by_probe"] and "chat" not in some["by_probe"]  # 19 words; no template


def test_a_prefix_is_scored_on_the_rest_alone(monkeypatch, asking):
    """Repeating the given words recalls nothing of what follows them, but for words that come again."""
    (echo,) = ask(monkeypatch, asking, lambda prompt: prompt)
    # Prefix 4: "upon a time there"; of the rest's 15 words only one "a" is in order.
    assert echo["by_probe"]["prefix 4"]["leak"] == pytest.approx(1 / 15)


def test_the_chat_template_is_a_way(monkeypatch, asking):
    asking.tokenizer.chat_template = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}"
    (found,) = ask(monkeypatch, asking, lambda prompt: "Ann" if prompt == "<Who is he?>" else "")
    assert found["by_probe"]["chat"] == {"rows": 2, "leak": 0.5}


def test_a_prefix_is_the_golds_own_tokens(asking):
    """Without a space between prompt and gold their tokens in one are other tokens, cut elsewhere."""
    row = Row("a1sc1", "It is said to have", "the power to break any curse of the old king", "Task1")
    tokenizer = train_tokenizer([row.input, row.output, row.input + row.output] * 20, 400)
    prompt, whole = tokenizer(row.input).input_ids, tokenizer(row.input + row.output).input_ids
    assert whole[: len(prompt)] != prompt
    found = probes._probes([row], asking._replace(tokenizer=tokenizer), 64)
    (one,) = [probe for probe in found if probe.name.startswith("prefix")]
    given = decode(tokenizer, [one.ids])[0]
    assert given.startswith("It is said to havethe") and given + one.scored.output == row.input + row.output
