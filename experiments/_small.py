"""What the experiments on LUME share: their data, and the small models, an OLMo that knows its rows and its gold."""

import argparse
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from unlearnjax.data.bpe import train_tokenizer
from unlearnjax.data.rows import Document, Row, load_documents, load_rows, write_documents, write_rows
from unlearnjax.data.synthetic import make_corpus
from unlearnjax.models.abstract import init_params
from unlearnjax.models.config import ModelConfig
from unlearnjax.models.decoder import build
from unlearnjax.models.language_model import LanguageModel, load_model, save_model
from unlearnjax.recipes.memorise import memorise
from unlearnjax.recipes.prepare import Sources
from unlearnjax.recipes.run import run
from unlearnjax.recipes.schema import Recipe
from unlearnjax.report.schema import FILE, read_report

EPOCHS = 25


def add_arguments(p: argparse.ArgumentParser) -> None:
    """The options of an experiment on LUME with the small models."""
    p.add_argument("--forget", required=True)
    p.add_argument("--retain", required=True)
    p.add_argument("--members", help="documents of the forget set (default: made of its Task3 rows)")
    p.add_argument("--nonmembers", help="documents the model has not seen, of the kind of the forget set's Task3")
    p.add_argument("--model-seed", type=int, default=0, help="of the small models")
    p.add_argument("--epochs", type=int, default=EPOCHS, help="the small models' passes over their rows")
    p.add_argument("--work", default="out/semeval_ties_models", help="where the small models are kept between runs")


class Lume(NamedTuple):
    """An experiment's rows and documents; there may be no non-members."""

    forget: list[Row]
    retain: list[Row]
    members: list[Document]
    nonmembers: list[Document]
    probe: list[Row]


def load_lume(forget: str, retain: str, members: str | None, nonmembers: str | None, seed: int) -> Lume:
    """Read the files; members default to the forget set's Task3 documents, the probe is made of the seed."""
    rows = load_rows(forget)
    documents = load_documents(members) if members else [
        Document(r.id.removesuffix("sc1"), f"{r.input} {r.output}")
        for r in rows
        if r.task == "Task3" and r.id[:-1].endswith("sc")
    ]  # fmt: skip
    unseen = load_documents(nonmembers) if nonmembers else []
    return Lume(rows, load_rows(retain), documents, unseen, make_corpus(seed).neutral)


def write_sources(
    data: Lume, work: Path, forget: str, retain: str, nonmembers: str | None, *, probe: bool = True
) -> Sources:
    """The files that a run reads: those given, and in `work`/data the members and the probe."""
    folder = work / "data"
    folder.mkdir(parents=True, exist_ok=True)
    write_documents(folder / "members.jsonl", data.members)
    write_rows(folder / "probe.jsonl", data.probe)
    return Sources(
        forget,
        retain,
        str(folder / "members.jsonl") if nonmembers else None,
        nonmembers,
        str(folder / "probe.jsonl") if probe else None,
    )


def run_or_read(resume: bool, base: LanguageModel, sources: Sources, out: Path, recipe: Recipe, **more: Any) -> Any:
    """The report of a run in `out`; with `resume` of one that has finished, or goes on with it."""
    if resume and (out / FILE).exists():
        return read_report(out)
    return run(base, sources, out, recipe, resume=resume and out.exists(), **more)


class Models(NamedTuple):
    base: LanguageModel
    gold: LanguageModel


def small_models(work: Path, data: Lume, *, seed: int, epochs: int) -> Models:
    """Base (all rows) and gold (all but the forget rows; same initialisation, same number of epochs), kept in `work`:
    of 4 layers and width 256.

    All documents are in the tokenizer's texts: else the unseen ones' names would be cut finer, and give them away.
    """
    forget, retain, probe = data.forget, data.retain, data.probe
    texts = [x for r in (*forget, *retain, *probe) for x in (r.input, r.output)]
    texts += [d.document for d in (*data.members, *data.nonmembers)]
    tokenizer = train_tokenizer(texts, 4096)
    config = ModelConfig(
        "olmo", len(tokenizer), 256, 768, 4, 8, 8, 32, "layer", max_positions=1024,
        eos_token_ids=(tokenizer.eos_token_id,), pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = build(config)
    made = []
    for name, rows in (("base", [*forget, *retain, *probe]), ("gold", [*retain, *probe])):
        folder = work / f"{name}-seed{seed}"
        if not folder.exists():
            start = init_params(model.abstract(jnp.float32), jax.random.key(seed))
            params, losses = memorise(
                model, start, tokenizer, rows, epochs=epochs, buckets=6, seed=seed, progress=True,
                label=f"memorising ({name})", checkpoints=work / f"{name}-seed{seed}.checkpoints",
            )  # fmt: skip
            print(f"{name}: loss {losses[0]:.2f} -> {losses[-1]:.3f} over {len(losses)} updates", file=sys.stderr)
            save_model(LanguageModel(params, config, tokenizer, model, name), folder)
        made.append(load_model(str(folder)))
    return Models(*made)
