"""The whole job for image models: fine-tune on what is to be forgotten, merge, subtract, score, write."""

import datetime
import functools
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import yaml
from jaxtyping import PyTree

import unlearnjax
from unlearnjax.data.labelled import labelled
from unlearnjax.errors import UserError
from unlearnjax.evaluation.images import edit
from unlearnjax.io.atomic import staged_file
from unlearnjax.io.card import model_card
from unlearnjax.models.vision.classifier import Classifier, save_classifier
from unlearnjax.models.vision.clip_model import save_clip
from unlearnjax.models.vision.net import Subject
from unlearnjax.recipes.describe import describe_hardware
from unlearnjax.recipes.images.data import ImageSources, Splits, describe
from unlearnjax.recipes.images.directions import direction, greedy_soup, sparsity
from unlearnjax.recipes.images.schema import ImageMerge, ImageRecipe, to_plain
from unlearnjax.recipes.images.scoring import Scorer
from unlearnjax.recipes.images.searched import Searched
from unlearnjax.recipes.images.select import Judge, Scores, choose, gap
from unlearnjax.recipes.images.store import Store
from unlearnjax.recipes.images.subjects import Subjects, load_subjects
from unlearnjax.recipes.resume import CHECKPOINTS, claim, weights_digest
from unlearnjax.report.images import render_images_html, write_images_report
from unlearnjax.training.images.fine_tune import default_mapping, fine_tune
from unlearnjax.training.interrupt import Interrupted, Stop


def run_images(
    model: str,
    sources: ImageSources,
    out: str | Path,
    recipe: ImageRecipe,
    *,
    gold: str | None = None,
    command: Sequence[str] = (),
    title: str | None = None,
    progress: bool = True,
    resume: bool = False,
    stop: Stop | None = None,
) -> dict[str, Any]:
    """Unlearn in an image classifier or a CLIP model: the job that `unlearnjax run` does for one.

    Args:
      model: a folder or hub id of a classifier or a CLIP model.
      sources: where images come from, and which are to be forgotten.
      out: a new or empty folder. It gets candidates/ (task vectors), baselines/, model/ (the chosen merge subtracted),
        recipe.yml, report.json and report.html. report.json comes last.
      gold: a classifier that was trained without the forget images, to be close to.
      resume: go on with the unfinished run in `out`: candidates, baselines and scores along lambda that are there are
        kept.
      stop: see `unlearnjax.training.interrupt.catch_signals`.

    Returns:
      The report (see `unlearnjax.report.images`).

    Raises:
      UserError: bad input, before anything is trained; no candidate is left.
      Interrupted: `stop` asked for it.
    """
    out = claim(out, resume)
    subjects, splits = load_subjects(model, sources, recipe, gold)
    job = _Job(recipe, subjects, splits, out, progress, stop)
    job.begin()
    return job.run(list(command), title or f"Unlearning with the recipe {recipe.name}")


Found = tuple[dict[str, Any], PyTree[np.ndarray], float]  # a merge's entry in the report, its direction, its cost


class _Job:
    """One run's fixed parts, and its steps in order."""

    def __init__(
        self, recipe: ImageRecipe, subjects: Subjects, splits: Splits, out: Path, progress: bool, stop: Stop | None
    ) -> None:
        self.recipe, self.subjects, self.splits, self.out = recipe, subjects, splits, out
        self.progress, self.stop = progress, stop
        self.subject: Subject = subjects.forget
        self.start: PyTree[Any] = jax.tree.map(np.asarray, self.subject.trained)
        self.store = Store(out / "candidates", self.start, self.subject.fixed)
        self.scorer = Scorer(recipe.selection, subjects, splits)
        self.described = describe(splits)
        selection = {k: v for k, v in to_plain(recipe)["selection"].items() if k not in ("rule", "keep")}
        known = {**self.origin, "selection": selection, "scored": self.described}
        self.searched = Searched(out / CHECKPOINTS / "searched", known, progress)
        self.warnings: list[str] = []

    @functools.cached_property
    def origin(self) -> dict[str, Any]:
        """What every candidate depends on. The weights are all that training sees: CLIP's head is made of the templates
        and the classes' names."""
        plain = to_plain(self.recipe)
        return {
            "training": {k: v for k, v in plain["training"].items() if k != "group"},
            "data": self.described["train"], "retain": self.described["retain"],
            "model": weights_digest([self.subject.trained, self.subject.fixed]), "unlearnjax": unlearnjax.__version__,
        }  # fmt: skip

    def begin(self) -> None:
        """Mark the folder as an unfinished run's, and say what is run."""
        (self.out / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        plain = to_plain(self.recipe)
        with staged_file(self.out / "recipe.yml") as path:
            path.write_text(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True), "utf-8")
        shutil.rmtree(self.out / "model", ignore_errors=True)

    def run(self, command: list[str], title: str) -> dict[str, Any]:
        """Everything; returns the report."""
        names = self.train()
        base = self.scorer.final(self.start, self.subject.fixed.get("statistics"))
        models = [self.entry("base", "base", base)]
        target = None
        if self.subjects.gold is not None:
            target = self.scorer.final_of(self.subjects.gold)
            models.append(self.entry("retrained", "retrained", target))
        judge = self.scorer.judge(self.start, self.subjects.gold)
        merges, chosen = self.merge(names, judge)
        best: tuple[float, str] | None = None
        for entry, delta, cost in chosen:
            found = self.scorer.final(edit(self.start, delta, entry["lambda"]))
            models.append(self.entry(entry["name"], "merge", found))
            if self.recipe.export in ("best", entry["name"]) and (best is None or cost < best[0]):
                best = (cost, entry["name"])
        models += self.baselines()
        for one in models:
            one["gap"] = None if target is None else gap(Scores(**one["scores"]), target)
        report = {
            "title": title, "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "unlearnjax": unlearnjax.__version__, "command": command, "hardware": describe_hardware(),
            "recipe": to_plain(self.recipe), "data": self.described, "rule": self.scorer.describe(judge),
            "weights": dict(zip(("trained", "all"), self.subject.weights(), strict=True)),
            "candidates": self.candidates(), "merges": merges, "models": models, "warnings": self.warnings,
        }  # fmt: skip
        if best is not None and self.subject.net.linear:
            text = "model/ holds weights of the tangent space: the scores are the linearised model's, not its own"
            self.warnings.append(text)
        if best is not None:
            entry, delta, _ = next(c for c in chosen if c[0]["name"] == best[1])
            report["exported"] = best[1]
            self.export(edit(self.start, delta, entry["lambda"]), report)
        with staged_file(self.out / "report.html") as path:
            path.write_text(render_images_html(report), "utf-8")
        write_images_report(self.out, report)
        shutil.rmtree(self.out / CHECKPOINTS, ignore_errors=True)
        return report

    def entry(self, name: str, kind: str, scores: Scores) -> dict[str, Any]:
        """A model's in the report."""
        return {"name": name, "kind": kind, "scores": scores._asdict()}

    def train(self) -> list[str]:
        """Fine-tune the candidates that are not there yet; returns the names of those that did not diverge."""
        training = self.recipe.training
        origin = self.origin
        origins = {c.name: {**origin, "settings": _plain(c)} for c in self.recipe.candidates}
        missing = [c for c in self.recipe.candidates if not self.store.has(c.name, origins[c.name])]
        for candidate in missing:
            shutil.rmtree(self.store.folder / candidate.name, ignore_errors=True)
        if missing:
            mapping = default_mapping(len(missing))
            if training.group is not None:
                mapping = mapping._replace(size=training.group)
            tuned = fine_tune(
                self.subject, labelled(self.splits.train.pixels, self.splits.train.labels), missing,
                optimizer=training.optimizer, batch_size=training.batch_size, batch_norm=training.batch_norm,
                mapping=mapping, progress=self.progress, stop=self.stop,
            )  # fmt: skip
            for one in tuned:
                self.store.save(one.candidate.name, one, origins[one.candidate.name])
        left = []
        for candidate in self.recipe.candidates:
            facts = self.store.facts(candidate.name)
            if facts.diverged_at is None:
                left.append(candidate.name)
            else:
                self.warnings.append(
                    f"candidate {candidate.name} diverged after {facts.diverged_at} updates; it is left out of every "
                    "merge"
                )
        if not left:
            raise UserError("all candidates diverged; lower learning_rate")
        return left

    def merge(self, names: list[str], judge: Judge) -> tuple[list[dict[str, Any]], list[Found]]:
        """(the report's entry of every merge; (entry, direction, cost) of those for which a lambda was found)"""
        entries, found = [], []
        singles: dict[str, tuple[list[Scores], Any]] | None = None
        if any(m.method in ("best_single", "greedy") for m in self.recipe.merges):
            self.searched.expect(len(names))
            singles = {name: self.search(name, self.store.delta(name), judge) for name in names}
        self.searched.expect(sum(m.method != "best_single" for m in self.recipe.merges))
        for wanted in self.recipe.merges:
            of = [name for name in names if wanted.of is None or name in wanted.of]
            entry: dict[str, Any] = {"name": wanted.name, "method": wanted.method, "semantics": wanted.semantics,
                                     "hyperparameters": dict(wanted.hyperparameters), "candidates": of}  # fmt: skip
            try:
                delta, more = self.made(wanted, of, singles or {}, judge)
                known = (singles or {}).get(more["members"][0]) if wanted.method == "best_single" else None
                points, choice = known or self.search(wanted.name, delta, judge)
                entry |= {**more, "sparsity": sparsity(delta, self.subject.weights())._asdict(), **self.curve(points)}
                if isinstance(choice, UserError):
                    raise choice
                entry |= {"lambda": self.recipe.selection.lambdas[choice.place], "cost": choice.cost}
            except UserError as error:
                entry["lambda"] = None
                self.warnings.append(f"merge {wanted.name}: {error}")
            else:
                found.append((entry, delta, choice.cost))
            entries.append(entry)
        self.searched.close()
        return entries, found

    def made(
        self, wanted: ImageMerge, names: list[str], singles: dict[str, tuple[list[Scores], Any]], judge: Judge
    ) -> tuple[Any, dict[str, Any]]:
        """A merge's direction, and what the report adds about it."""
        if wanted.method not in ("best_single", "greedy"):
            return direction(wanted, self.store, names, jax.random.key(self.recipe.selection.seed)), {}
        able = {name: singles[name][1].cost for name in names if not isinstance(singles[name][1], UserError)}
        if not able:
            raise UserError("no candidate alone has a lambda that the rule allows")
        order = sorted(able, key=able.__getitem__)
        if wanted.method == "best_single":
            return self.store.delta(order[0]), {"members": [order[0]]}

        def cost(delta: Any) -> float:
            self.searched.expect(1)
            choice = self.search("a soup", delta, judge)[1]
            return float("inf") if isinstance(choice, UserError) else choice.cost

        soup = greedy_soup(self.store, order, able[order[0]], cost)
        return soup.delta, {"members": soup.members}

    def search(self, name: str, delta: Any, judge: Judge) -> tuple[list[Scores], Any]:
        """All lambdas of a direction on validation data, and the rule's choice (or why there is none)."""
        if self.stop is not None and self.stop.signum:
            raise Interrupted(self.stop.signum, f"while lambda was searched for {name}")
        points = self.searched.points(delta, lambda: self.scorer.sweep(self.start, delta))
        try:
            return points, choose(judge, self.recipe.selection.lambdas, points)
        except UserError as error:
            return points, error

    def curve(self, points: list[Scores]) -> dict[str, Any]:
        """All lambdas' scores, for the report."""
        columns = {key: [getattr(p, key) for p in points] for key in Scores._fields}
        return {"sweep": {"lambda": list(self.recipe.selection.lambdas), **columns}}

    def candidates(self) -> list[dict[str, Any]]:
        """The candidates' part of the report."""
        found = []
        for candidate in self.recipe.candidates:
            facts = self.store.facts(candidate.name)
            found.append({
                "name": candidate.name, "settings": _plain(candidate),
                "status": "finished" if facts.diverged_at is None else "diverged", "diverged_at": facts.diverged_at,
                "curves": {"update": list(range(1, len(facts.losses) + 1)), "loss": facts.losses},
            })  # fmt: skip
        return found

    def baselines(self) -> list[dict[str, Any]]:
        """Each baseline of the recipe, trained (or read back) and scored."""
        if not self.recipe.baselines:
            return []
        from unlearnjax.baselines import BASELINES

        retain, forget = (labelled(x.pixels, x.labels) for x in (self.splits.retain, self.splits.train))
        store = Store(self.out / "baselines", self.start, self.subject.fixed)
        models = []
        for name, settings in self.recipe.baselines.items():
            origin = {**self.origin, "settings": dict(settings)}
            if not store.has(name, origin):
                shutil.rmtree(store.folder / name, ignore_errors=True)
                found = BASELINES[name].run(
                    self.subject, retain, forget, progress=self.progress, stop=self.stop,
                    **{"seed": self.recipe.selection.seed, **settings},
                )  # fmt: skip
                store.save(name, found, origin)
            if store.facts(name).diverged_at is not None:
                self.warnings.append(f"baseline {name} diverged and is left out")
                continue
            weights = edit(self.start, store.delta(name), -1.0)
            scores = self.scorer.final(weights, store.statistics(name))
            models.append({**self.entry(name, "baseline", scores), "data": BASELINES[name].data})
        return models

    def export(self, weights: Any, report: dict[str, Any]) -> None:
        """Write the edited model."""
        model = self.subject.edited(weights, self.scorer.statistics(weights))
        card = model_card(
            title=f"{Path(self.subject.model.source).name} unlearned", base_model=self.subject.model.source, merge=True,
            method=f"Negation of the merge {report['exported']} (NegMerge, 2410.05583).", recipe=report["recipe"],
            images=True,
        )  # fmt: skip
        if isinstance(model, Classifier):
            save_classifier(model, self.out / "model", card=card)
        else:
            save_clip(model, self.out / "model", card=card)


def _plain(candidate: Any) -> dict[str, Any]:
    return {k: v for k, v in vars(candidate).items() if k != "name"}
