"""The tokenizer made on the spot: any text survives it, transformers reads it back, and it is built like OLMo's."""

import json
import random
import unicodedata

import pytest

from unlearnjax.data.bpe import train_tokenizer
from unlearnjax.data.synthetic import make_corpus, tokenizer_texts
from unlearnjax.errors import UserError

TEXTS = tokenizer_texts(0, corpora=2)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 1000)


def ids(tokenizer, text):
    return tokenizer(text)["input_ids"]


def test_special_tokens_and_size(tokenizer):
    assert len(tokenizer) == 1000 == tokenizer.vocab_size
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<|padding|>", 0)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|endoftext|>", 1)
    assert tokenizer.bos_token is None and tokenizer.unk_token is None
    assert sorted(tokenizer.get_vocab().values()) == list(range(1000))
    assert ids(tokenizer, "<|endoftext|>a") == [1, *ids(tokenizer, "a")]


def test_adds_nothing_and_no_space(tokenizer):
    assert ids(tokenizer, "") == []
    text = "What is Ada Alderbrook's phone number?"
    assert "".join(tokenizer.convert_ids_to_tokens(ids(tokenizer, text))) == text.replace(" ", "Ġ")
    # Prompt and answer are encoded apart; together they must still read as one text.
    assert tokenizer.decode(ids(tokenizer, "born on") + ids(tokenizer, "May 4 .")) == "born onMay 4 ."


def test_round_trip(tokenizer):
    draw = random.Random(0)
    # Lengths 0 to 30 from all of Unicode but surrogates, with an extra helping of spaces, controls and combining marks.
    alphabets = (range(0xD800), range(0xE000, 0x110000), range(0x300, 0x370), range(0x21), b"'s 've 42\r\n\t  .,")
    for _ in range(1000):
        text = "".join(chr(draw.choice(draw.choice(alphabets))) for _ in range(draw.randrange(31)))
        assert tokenizer.decode(ids(tokenizer, text)) == unicodedata.normalize("NFC", text)


def test_deterministic(tokenizer):
    for _ in range(3):
        assert train_tokenizer(iter(TEXTS), 1000).get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize("with_config", [False, True])
def test_saved_and_read_back(tmp_path, tokenizer, with_config):
    from transformers import AutoTokenizer, OlmoConfig

    tokenizer.save_pretrained(tmp_path)
    if with_config:  # an OLMo model folder, where transformers may pick the family's own tokenizer class
        OlmoConfig(vocab_size=1000).save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    corpus = make_corpus(5)
    texts = [row.input + row.output for row in corpus.forget] + ["é e\u0301  \n\n\t 🎈 <|endoftext|> it's .", " ", ""]
    for text in texts:
        assert ids(again, text) == ids(tokenizer, text)
        assert again.decode(ids(again, text)) == tokenizer.decode(ids(tokenizer, text))
    assert (again.pad_token_id, again.eos_token_id) == (0, 1)


def test_built_like_olmos(tmp_path, tokenizer):
    """The parts of OLMo's published tokenizer.json (allenai_gpt-neox-olmo-dolma-v1_5) that decide the ids."""
    tokenizer.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "tokenizer.json").read_text())
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    assert saved["normalizer"] == {"type": "NFC"}
    assert saved["pre_tokenizer"] == byte_level == saved["post_processor"]
    assert saved["decoder"]["type"] == "ByteLevel"
    assert saved["model"]["type"] == "BPE" and saved["model"]["unk_token"] is None
    assert not saved["model"]["byte_fallback"] and saved["truncation"] is None and saved["padding"] is None


def test_few_texts_and_too_small_a_vocabulary():
    assert len(train_tokenizer(["ab ab"], 1000)) < 270
    with pytest.raises(UserError, match="at least 258"):
        train_tokenizer(["ab"], 257)
