"""The whole job: read, train all candidates in one program, merge, evaluate everything, write what others can load."""

import dataclasses
import datetime
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import yaml
from jaxtyping import Array, PyTree

import unlearnjax
from unlearnjax.adapters.apply import add_delta
from unlearnjax.adapters.lora import lora, resolve_targets, scaled
from unlearnjax.evaluation.protocol import evaluate_candidates
from unlearnjax.io.atomic import require_free, staged_file
from unlearnjax.io.card import model_card
from unlearnjax.io.peft import save_adapter
from unlearnjax.models.language_model import LanguageModel, load_model, save_model
from unlearnjax.recipes.merge_step import Exported, Merged, describe, export, merge_candidates
from unlearnjax.recipes.prepare import (
    Data,
    Prepared,
    Sources,
    check_evaluation,
    describe_data,
    load_data,
    prepare,
)
from unlearnjax.recipes.progress import bars
from unlearnjax.recipes.schema import Recipe, to_plain
from unlearnjax.report.html import render_html
from unlearnjax.report.schema import write_report
from unlearnjax.report.scores import render_markdown_table
from unlearnjax.training.loop import Result, finished, train
from unlearnjax.training.reference import stores_for
from unlearnjax.training.step import Task


class Trained(NamedTuple):
    """All candidates after training: adapters stacked over N (padded to one rank), their scales, and the history."""

    lora: PyTree[Array]
    scale: Array
    result: Result


def train_candidates(model: LanguageModel, prepared: Prepared, recipe: Recipe, *, progress: bool = False) -> Trained:
    """Train every candidate of the recipe in one compiled program (per length bucket)."""
    targets = resolve_targets(recipe.adapter.targets, model.config, "recipe: adapter")
    adapter = lora(model.config, targets, max(c.rank for c in recipe.candidates))
    use_dropout = any(c.dropout > 0 for c in recipe.candidates)
    stores = stores_for(model.model, model.params, prepared.sides, prepared.objective)
    task = Task(model.model, adapter, prepared.objective, use_dropout)
    h = prepared.hyperparameters
    result = train(task, model.params, stores, prepared.schedule, h, progress=progress)
    return Trained(result.states.trainable, h.lora_alpha / h.lora_rank.astype(jnp.float32), result)


def _stack_adapters(adapters: Sequence[PyTree[Array]]) -> PyTree[Array]:
    """Adapters (scale folded in) of different ranks to one stack, padded with zeros to the largest rank."""
    is_pair = lambda x: isinstance(x, dict) and set(x) == {"a", "b"}  # noqa: E731
    largest = max(p["a"].shape[1] for t in adapters for p in jax.tree.leaves(t, is_leaf=is_pair))

    def pad(pair: dict[str, Array]) -> dict[str, Array]:
        more = largest - pair["a"].shape[1]
        return {
            "a": jnp.pad(pair["a"], ((0, 0), (0, more), (0, 0))),
            "b": jnp.pad(pair["b"], ((0, 0), (0, 0), (0, more))),
        }

    padded = [jax.tree.map(pad, t, is_leaf=is_pair) for t in adapters]
    return jax.tree.map(lambda *xs: jnp.stack(xs), *padded)


def evaluate_all(
    model: LanguageModel,
    trained: Trained,
    merges: Sequence[Merged],
    recipe: Recipe,
    data: Data,
    out: Path,
    warnings: list[str],
    *,
    progress: bool = False,
) -> list[dict[str, Any]]:
    """Score base, finished candidates and merges. Whatever is an adapter is scored in one program, side by side."""
    kept = list(finished(trained.result))
    names = [c.name for c in recipe.candidates]
    one = lambda i: jax.tree.map(lambda x: x[i], scaled(trained.lora, trained.scale))  # noqa: E731
    zero = jax.tree.map(lambda x: jnp.zeros_like(x[0]), trained.lora)
    adapters = [("base", "base", zero)]
    adapters += [(names[i], "candidate", one(i)) for i in kept]
    adapters += [(m.merge.name, "merge", m.lora) for m in merges if m.lora is not None]
    settings: dict[str, Any] = {
        "max_new_tokens": recipe.evaluation.max_new_tokens,
        "batch_size": recipe.evaluation.batch_size,
        "warn": warnings.append,
    }

    def evaluate(params: PyTree[Array], stack: PyTree[Array] | None, named: Sequence[str]) -> list[Any]:
        folders = [out / "generations" / name for name in named]
        with bars(progress, "evaluating") as bar:
            return evaluate_candidates(
                model.model,
                params,
                stack,
                model.require_tokenizer(),
                *data,
                out_folders=folders,
                progress=bar,
                **settings,
            )

    scores = evaluate(model.params, _stack_adapters([a for _, _, a in adapters]), [n for n, _, _ in adapters])
    models = [{"name": n, "kind": k, "scores": s} for (n, k, _), s in zip(adapters, scores, strict=True)]
    for merged in merges:
        if merged.delta is not None:
            name = merged.merge.name
            (score,) = evaluate(add_delta(model.params, merged.delta), None, [name])
            models.append({"name": name, "kind": "merge", "scores": score})
    return models


def _rank_of(scores: dict[str, Any]) -> float:
    for key in ("aggregate", "aggregate_without_mmlu", "task_aggregate"):
        if scores.get(key) is not None:
            return float(scores[key])
    return -1.0


def _hardware() -> dict[str, Any]:
    device = jax.devices()[0]
    kind = platform.processor() or platform.machine() if device.platform == "cpu" else device.device_kind
    return {
        "platform": device.platform,
        "device": kind,
        "device_count": jax.device_count(),
        "cpu_count": os.cpu_count() or 1,
        "jax": jax.__version__,
    }


def _candidate_entries(recipe: Recipe, trained: Trained) -> list[dict[str, Any]]:
    entries = []
    for i, c in enumerate(recipe.candidates):
        curve, at = trained.result.curves[i], trained.result.diverged_at[i]
        hyper = {k: v for k, v in dataclasses.asdict(c).items() if k != "name"}
        entries.append(
            {
                "name": c.name,
                "hyperparameters": hyper,
                "status": "finished" if at is None else "diverged",
                "diverged_at": at,
                "updates": len(curve.update),
                "curves": {
                    "update": curve.update,
                    "loss": curve.loss,
                    **curve.terms,
                    "gradient_norm": curve.gradient_norm,
                },
            }
        )
    return entries


def _save_adapters(
    out: Path, model: LanguageModel, recipe: Recipe, trained: Trained, merges: Sequence[tuple[Merged, Exported]]
) -> None:
    targets = resolve_targets(recipe.adapter.targets, model.config)
    common: dict[str, Any] = {"config": model.config, "base_model": model.source, "targets": targets}
    for i, c in enumerate(recipe.candidates):
        own = jax.tree.map(lambda x, i=i: x[i], trained.lora)
        folder = out / "candidates" / c.name
        save_adapter(folder, own, rank=c.rank, alpha=c.alpha, dropout=c.dropout, **common)
    for merged, exported in merges:
        folder = out / "merges" / merged.merge.name
        save_adapter(folder, exported.lora, rank=exported.rank, alpha=exported.rank, **common)


def _final_params(model: LanguageModel, merged: Merged) -> PyTree[Array]:
    from unlearnjax.adapters.lora import lora_weights

    return add_delta(model.params, lora_weights(merged.lora) if merged.lora is not None else merged.delta)


def run(
    model: str | LanguageModel,
    sources: Sources,
    out: str | Path,
    recipe: Recipe,
    *,
    dtype: str = "float32",
    command: Sequence[str] = (),
    title: str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Unlearn: the job that `unlearnjax run` does.

    Args:
      model: a folder, a hub id, or a loaded model.
      sources: where forget, retain, members, non-members and probe rows come from.
      out: a new or empty folder. It gets candidates/ and merges/ (PEFT adapters), model/ (the chosen merge as a Hugging
        Face folder), generations/ (CSV), recipe.yml, report.json and report.html. Each appears whole; report.json comes
        last, so a folder without it is a run that did not end.
      recipe: see `unlearnjax.recipes.load_recipe`.
      dtype: of the base weights, when `model` is a name.
      command: the command line, for the report.

    Returns:
      The report (see `unlearnjax.report.schema`).

    Raises:
      UserError: any bad input, before anything is computed or written.
    """
    out = require_free(out)
    data = load_data(sources)
    lm = load_model(model, dtype) if isinstance(model, str) else model
    prepared = prepare(recipe, lm, data, sources)
    resolve_targets(recipe.adapter.targets, lm.config, "recipe: adapter")
    check_evaluation(lm, data, sources, recipe.evaluation.max_new_tokens)

    out.mkdir(parents=True, exist_ok=True)
    plain = to_plain(recipe)
    with staged_file(out / "recipe.yml") as path:
        path.write_text(yaml.safe_dump(plain, sort_keys=False), encoding="utf-8")

    trained = train_candidates(lm, prepared, recipe, progress=progress)
    names = [c.name for c in recipe.candidates]
    kept = list(finished(trained.result))
    warnings = [
        f"candidate {names[i]} diverged after {at} updates; it is left out of every merge"
        for i, at in enumerate(trained.result.diverged_at)
        if at is not None
    ]
    _save_adapters(out, lm, recipe, trained, [])
    largest = max(c.rank for c in recipe.candidates)
    merges = [merge_candidates(m, trained.lora, trained.scale, kept, recipe.training.seed) for m in recipe.merges]
    exports = [export(m, trained.lora, trained.scale, largest) for m in merges]
    _save_adapters(
        out, lm, dataclasses.replace(recipe, candidates=()), trained, list(zip(merges, exports, strict=True))
    )
    models = evaluate_all(lm, trained, merges, recipe, data, out, warnings, progress=progress)

    result = trained.result
    report: dict[str, Any] = {
        "schema": "unlearnjax.report",
        "version": 1,
        "title": title or f"Unlearning with the recipe {recipe.name}",
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "unlearnjax": unlearnjax.__version__,
        "command": list(command),
        "hardware": _hardware(),
        "recipe": plain,
        "data": {**describe_data(sources, data), "padding_share": prepared.schedule.padding_share},
        "training": {
            "seconds": result.seconds,
            "candidate_steps": result.candidate_steps,
            "candidate_steps_per_second": result.steady_candidate_steps / max(result.steady_seconds, 1e-9),
        },
        "candidates": _candidate_entries(recipe, trained),
        "merges": [describe(m, e, names) for m, e in zip(merges, exports, strict=True)],
        "models": models,
        "warnings": list(dict.fromkeys(warnings)),
    }
    if merges:
        chosen = choose_export(recipe, merges, models)
        card = model_card_for(lm, report, chosen.merge.name)
        merged_model = dataclasses.replace(lm, params=_final_params(lm, chosen))
        save_model(merged_model, out / "model", card=card)
        report["exported"] = chosen.merge.name
    with staged_file(out / "report.html") as path:
        path.write_text(render_html(report), encoding="utf-8")
    write_report(out, report)
    return report


def choose_export(recipe: Recipe, merges: Sequence[Merged], models: Sequence[dict[str, Any]]) -> Merged:
    """The merge to write as a model: the one named, or the one with the best official aggregate that was measured."""
    if recipe.evaluation.export != "best":
        return next(m for m in merges if m.merge.name == recipe.evaluation.export)
    scores = {m["name"]: _rank_of(m["scores"]) for m in models}
    return max(merges, key=lambda m: scores[m.merge.name])


def model_card_for(lm: LanguageModel, report: dict[str, Any], name: str) -> str:
    """README.md of the merged model."""
    cite = "{source} ({rows} rows, sha256 {sha256})".format
    entry = next(m for m in report["merges"] if m["name"] == name)
    return model_card(
        title=f"{Path(lm.source).name}, unlearned ({name})",
        base_model=lm.source,
        merge=True,
        method=f"{entry['method']} merge ({entry['semantics']} semantics, space {entry['space']}) of the candidates "
        f"{', '.join(entry['candidates'])}.",
        scores=render_markdown_table(report),
        recipe=report["recipe"],
        forget=cite(**report["data"]["forget"]),
        retain=cite(**report["data"]["retain"]),
    )
