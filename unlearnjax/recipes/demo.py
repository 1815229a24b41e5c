"""The job of `unlearnjax run` with nothing to download: a small model, made here, learns a generated corpus by heart
and then forgets half of it."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from unlearnjax.data.bpe import train_tokenizer
from unlearnjax.data.rows import write_documents, write_rows
from unlearnjax.data.synthetic import Corpus, make_corpus, tokenizer_texts
from unlearnjax.distributed.mesh import choose_mesh
from unlearnjax.distributed.processes import from_first, put
from unlearnjax.distributed.rules import of_params
from unlearnjax.errors import UserError
from unlearnjax.io.atomic import remove_left_overs, require_free, staged_file
from unlearnjax.io.fingerprint import difference
from unlearnjax.io.huggingface import load_params
from unlearnjax.models.abstract import init_params, weight_bytes
from unlearnjax.models.config import ModelConfig
from unlearnjax.models.decoder import build
from unlearnjax.models.language_model import LanguageModel, save_model
from unlearnjax.recipes.load import load_recipe
from unlearnjax.recipes.memorise import memorise
from unlearnjax.recipes.prepare import Data, Sources, prepare
from unlearnjax.recipes.resume import check_interval, claim
from unlearnjax.recipes.run import CHECKPOINT_EVERY, run
from unlearnjax.recipes.schema import Recipe
from unlearnjax.recipes.train_step import check_waypoints
from unlearnjax.report.schema import FILE as REPORT
from unlearnjax.training.interrupt import Stop

WIDTH, INNER, LAYERS, HEADS = 128, 384, 4, 4
VOCABULARY = 1536
EPOCHS = 60
SETTINGS = "demo.json"  # what the model and the corpus in the folder were made with


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
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("forget", "retain", "neutral"):
        write_rows(folder / f"{name}.jsonl", getattr(corpus, name))
    for name in ("members", "nonmembers"):
        write_documents(folder / f"{name}.jsonl", getattr(corpus, name))
    files = ("forget", "retain", "members", "nonmembers", "neutral")
    return Sources(*(str(folder / f"{name}.jsonl") for name in files))


def demo(
    out: str | Path, *, recipe: Recipe | None = None, seed: int = 0, epochs: int = EPOCHS, command: Sequence[str] = (),
    progress: bool = True, resume: bool = False, checkpoint_every: float = CHECKPOINT_EVERY, stop: Stop | None = None,
    say: Callable[[str], None] | None = None, mesh: Mapping[str, int] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Make the corpus in `out`/data and the model in `out`/base, then unlearn into `out`/result; returns the report.

    Args:
      out: a new or empty folder.
      recipe: default: the recipe `demo`.
      seed: of the corpus and the model.
      epochs: passes over the corpus while the model learns it; fewer leave less to forget.
      command: the command line, for the report.
      resume: go on with an unfinished demo in `out`, if there is one: a model in `out`/base is not made again.
      checkpoint_every, stop, say, mesh: see `unlearnjax.recipes.run.run`.

    Raises:
      UserError: `out` exists and is not empty, or the recipe does not suit the model; before anything is computed. With
        `resume`, `out` holds something else than an unfinished demo of the same settings.
    """
    settings = {"seed": seed, "epochs": epochs, "sizes": [WIDTH, INNER, LAYERS, HEADS, VOCABULARY]}
    check_interval(checkpoint_every)
    folder = claim_demo(out, settings, resume)
    recipe = recipe or load_recipe("demo")
    corpus = make_corpus(seed)
    outline = make_outline(seed)
    shared = choose_mesh(mesh, len(recipe.candidates), weight_bytes(outline.config, "float32"))
    data = Data(corpus.forget, corpus.retain, corpus.members, corpus.nonmembers, corpus.neutral)
    check_waypoints(recipe, prepare(recipe, outline, data, Sources(*Data._fields)))
    if (folder / "base").is_dir():
        base = dataclasses.replace(outline, params=load_params(folder / "base", outline.config, "float32"))
    else:
        base = teach(outline, corpus, seed, epochs=epochs, progress=progress)
        # Each process of a job teaches its own; of unlike hosts they may differ in the last digits.
        base = dataclasses.replace(base, params=from_first(base.params))
    remove_left_overs(folder)
    with staged_file(folder / SETTINGS) as path:
        path.write_text(json.dumps(settings), encoding="utf-8")
    sources = write_corpus(corpus, folder / "data")
    if not (folder / "base").is_dir():
        save_model(base, folder / "base")
    # The adapters name their base by the path as the user wrote it.
    base = dataclasses.replace(base, source=str(Path(out) / "base"))
    if shared is not None:
        places = of_params(shared, base.model.abstract(jnp.float32))
        base = dataclasses.replace(base, params=put(base.params, places))
    title = "Demo: a small model forgets half of what it learned by heart"
    return run(
        base, sources, folder / "result", recipe, command=command, title=title, progress=progress, resume=resume,
        checkpoint_every=checkpoint_every, stop=stop, say=say,
    )  # fmt: skip


def claim_demo(out: str | Path, settings: dict[str, Any], resume: bool) -> Path:
    """Check that the demo may write to `out`, without writing anything yet; returns the resolved path.

    Raises:
      UserError: see `demo`.
    """
    folder = Path(out).expanduser().resolve()
    if not folder.is_dir() or not any(folder.iterdir()):
        return require_free(out)
    begun = folder / SETTINGS
    if not begun.is_file():
        return require_free(out)
    if not resume:
        finished = (folder / "result" / REPORT).exists()
        hint = "give a new folder" if finished else "add --resume to go on with it, or give a new folder"
        raise UserError(f"{out}: holds {'a' if finished else 'an unfinished'} demo; {hint}")
    try:
        other = difference(json.loads(begun.read_text(encoding="utf-8")), settings)
    except (OSError, ValueError) as error:
        raise UserError(f"{begun}: cannot be read ({error}); give a new folder") from None
    if other is not None:
        raise UserError(f"{out}: holds a demo of other settings: {other}; give the same ones, or a new folder")
    claim(folder / "result", resume)
    return folder
