"""The job of `unlearnjax run` with nothing to download: a small model, made here, learns a generated corpus by heart
and then forgets half of it."""

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
from unlearnjax.recipes.prepare import Sources
from unlearnjax.recipes.run import run
from unlearnjax.recipes.schema import Recipe

WIDTH, INNER, LAYERS, HEADS = 128, 384, 4, 4
VOCABULARY = 1536
EPOCHS = 60


def make_base(corpus: Corpus, seed: int, *, epochs: int = EPOCHS, progress: bool = True) -> LanguageModel:
    """A small model of OLMo's architecture that knows the corpus by heart (and its neutral part)."""
    tokenizer = train_tokenizer(tokenizer_texts(seed), VOCABULARY)
    config = ModelConfig(
        "olmo", len(tokenizer), WIDTH, INNER, LAYERS, HEADS, HEADS, WIDTH // HEADS, "layer", max_positions=512,
        eos_token_ids=(tokenizer.eos_token_id,), pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = build(config)
    params = init_params(model.abstract(jnp.float32), jax.random.key(seed))
    rows = [*corpus.forget, *corpus.retain, *corpus.neutral]
    params, _ = memorise(
        model, params, tokenizer, rows, epochs=epochs, buckets=2, seed=seed, progress=progress, label="making the model"
    )
    return LanguageModel(params, config, tokenizer, model, "demo-base")


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
    out: str | Path, *, recipe: Recipe | None = None, seed: int = 0, command: Sequence[str] = (), progress: bool = True
) -> dict[str, Any]:
    """Make the corpus in `out`/data and the model in `out`/base, then unlearn into `out`/result; returns the report.

    Raises:
      UserError: `out` exists and is not empty.
    """
    out = require_free(out)
    recipe = recipe or load_recipe("demo")
    corpus = make_corpus(seed)
    base = make_base(corpus, seed, progress=progress)
    sources = write_corpus(corpus, out / "data")
    save_model(base, out / "base")
    # The path as the user wrote it is where the adapters' base is found.
    base = LanguageModel(base.params, base.config, base.tokenizer, base.model, str(out / "base"))
    title = "Demo: a small model forgets half of what it learned by heart"
    return run(base, sources, out / "result", recipe, command=command, title=title, progress=progress)
