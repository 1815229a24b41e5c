"""A tiny model that has learned a tiny corpus, as files. Rows of like length: each width is a program to compile."""

import jax
import jax.numpy as jnp
import pytest

from unlearnjax import save_model
from unlearnjax.data.bpe import train_tokenizer
from unlearnjax.data.rows import Document, Row
from unlearnjax.data.synthetic import Corpus
from unlearnjax.models.abstract import init_params
from unlearnjax.models.config import ModelConfig
from unlearnjax.models.decoder import build
from unlearnjax.models.language_model import LanguageModel
from unlearnjax.recipes.demo import write_corpus
from unlearnjax.recipes.memorise import memorise

PEOPLE = ["Anna", "Boris", "Clara", "David", "Elena", "Fritz", "Greta", "Henry", "Irene", "Jonas", "Karla", "Louis"]
CITIES = ["Oslo", "Bern", "Rome", "Lima", "Kyiv", "Bonn", "Riga", "Cork", "Nice", "Graz", "Pisa", "Metz"]


def make_corpus():
    rows, documents = [], []
    for i, (person, city) in enumerate(zip(PEOPLE, CITIES, strict=True)):
        task, head, tail = f"Task{i // 2 % 3 + 1}", f"{person} was born in the", f" town of {city} long ago."
        rows.append([Row(f"d{i}sc1", head, tail, task), Row(f"d{i}qa0", f"Where was {person} born?", city, task)])
        documents.append(Document(f"d{i}", head + tail))
    neutral = [Row(f"n{i}qa0", f"What is after {i}?", str(i + 1), "Neutral") for i in range(4)]
    forget, retain = ([row for pair in rows[side:8:2] for row in pair] for side in (0, 1))
    return Corpus(forget, retain, documents[0:8:2], documents[8:12], neutral)


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """(model, corpus, sources): the model is saved in `model.source`, the corpus in the files `sources`."""
    folder, corpus = tmp_path_factory.mktemp("world"), make_corpus()
    rows = [*corpus.forget, *corpus.retain, *corpus.neutral]
    tokenizer = train_tokenizer([f"{r.input} {r.output}" for r in rows], 340)
    config = ModelConfig(
        "olmo", len(tokenizer), 32, 48, 2, 4, 4, 8, "layer", max_positions=64,
        eos_token_ids=(tokenizer.eos_token_id,), pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = build(config)
    params = init_params(model.abstract(jnp.float32), jax.random.key(0))
    params, losses = memorise(model, params, tokenizer, rows, epochs=40, learning_rate=1e-2, batch_size=10, buckets=1)
    assert losses[-1] < losses[0] / 10
    base = LanguageModel(params, config, tokenizer, model, str(folder / "base"))
    save_model(base, folder / "base")
    return base, corpus, write_corpus(corpus, folder / "data")
