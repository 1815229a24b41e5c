"""The job of `unlearnjax run` with nothing to download: a small model, made here, learns a generated corpus by heart
and then forgets half of it."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from unlearnjax.data.bpe import train_tokenizer
from unlearnjax.data.rows import write_documents, write_rows
from unlearnjax.data.synthetic import Corpus, make_corpus, tokenizer_texts
from unlearnjax.io.atomic import require_free
from unlearnjax.models.abstract import init_params
from unlearnjax.models.config import ModelConfig
from unlearnjax.models.decoder import build
from unlearnjax.models.language_model import LanguageModel, save_model
from unlearnjax.recipes.load import load_recipe
from unlearnjax.recipes.memorise import memorise
from unlearnjax.recipes.prepare import Data, Sources, prepare
from unlearnjax.recipes.run import run
from unlearnjax.recipes.schema import Recipe

WIDTH, INNER, LAYERS, HEADS = 128, 384, 4, 4
VOCABULARY = 1536
EPOCHS = 60


def make_outline(seed: int) -> LanguageModel:
    """The demo's model without its weights: a small decoder of OLMo's architecture, and a tokenizer made for it."""
    tokenizer = train_tokenizer(tokenizer_texts(seed), VOCABULARY)
    config = ModelConfig(
        "olmo", len(tokenizer), WIDTH, INNER, LAYERS, HEADS, HEADS, WIDTH // HEADS, "layer", max_positions=512,
        eos_token_ids=(tokenizer.eos_token_id,), pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return LanguageModel(None, config, tokenizer, build(config), "demo-base")


def teach(outline: LanguageModel, corpus: Corpus, seed: int, *, epochs: int, progress: bool) -> LanguageModel:
    """The model that knows the corpus (and its neutral part) by heart."""
    params = init_params(outline.model.abstract(jnp.float32), jax.random.key(seed))
    rows = [*corpus.forget, *corpus.retain, *corpus.neutral]
    params, _ = memorise(
        outline.model, params, outline.tokenizer, rows, epochs=epochs, buckets=2, seed=seed, progress=progress,
        label="making the model",
    )  # fmt: skip
    return dataclasses.replace(outline, params=params)


def write_corpus(corpus: Corpus, folder: Path) -> Sources:
    """The corpus as files that `unlearnjax run` reads."""
    folder.mkdir(parents=True)
    for name in ("forget", "retain", "neutral"):
        write_rows(folder / f"{name}.jsonl", getattr(corpus, name))
    for name in ("members", "nonmembers"):
        write_documents(folder / f"{name}.jsonl", getattr(corpus, name))
    files = ("forget", "retain", "members", "nonmembers", "neutral")
    return Sources(*(str(folder / f"{name}.jsonl") for name in files))


def demo(
    out: str | Path, *, recipe: Recipe | None = None, seed: int = 0, epochs: int = EPOCHS, command: Sequence[str] = (),
    progress: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """Make the corpus in `out`/data and the model in `out`/base, then unlearn into `out`/result; returns the report.

    Args:
      out: a new or empty folder.
      recipe: default: the recipe `demo`.
      seed: of the corpus and the model.
      epochs: passes over the corpus while the model learns it; fewer leave less to forget.
      command: the command line, for the report.

    Raises:
      UserError: `out` exists and is not empty, or the recipe does not suit the model; before anything is computed.
    """
    folder = require_free(out)
    recipe = recipe or load_recipe("demo")
    corpus = make_corpus(seed)
    outline = make_outline(seed)
    data = Data(corpus.forget, corpus.retain, corpus.members, corpus.nonmembers, corpus.neutral)
    prepare(recipe, outline, data, Sources(*Data._fields))
    base = teach(outline, corpus, seed, epochs=epochs, progress=progress)
    sources = write_corpus(corpus, folder / "data")
    save_model(base, folder / "base")
    # The adapters name their base by the path as the user wrote it.
    base = dataclasses.replace(base, source=str(Path(out) / "base"))
    title = "Demo: a small model forgets half of what it learned by heart"
    return run(base, sources, folder / "result", recipe, command=command, title=title, progress=progress)
