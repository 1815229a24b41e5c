"""Scoring a run's models: on validation data for every lambda, and once on test data."""

import functools
from typing import Any

import jax
from jaxtyping import PyTree

from unlearnjax.data.images import Images
from unlearnjax.data.labelled import labelled
from unlearnjax.evaluation.images import Scored, Sheet, edit, re_estimated, score, sweep
from unlearnjax.models.vision.net import Net, Subject
from unlearnjax.recipes.images.data import Rows, Splits
from unlearnjax.recipes.images.schema import Selection
from unlearnjax.recipes.images.select import MIA_ROWS, Judge, Scores, scores_of
from unlearnjax.recipes.images.subjects import Subjects


class Scorer:
    """What is fixed while a run is scored: models, images on the device, and the recipe's selection."""

    def __init__(self, selection: Selection, subjects: Subjects, splits: Splits) -> None:
        self.selection, self.subjects = selection, subjects
        self.net = subjects.forget.net
        self._validation = self._sheets(splits.validation)
        self._final_rows = splits.final

    @functools.cached_property
    def _final(self) -> dict[str, Sheet]:
        return self._sheets(self._final_rows)

    def _sheets(self, rows: Rows) -> dict[str, Sheet]:
        """Of each set of rows; the retain classes are the test's too."""
        found = {}
        for name, images in rows._asdict().items():
            if images is not None:
                subject = self.subjects.forget if name == "forget" else self.subjects.retain
                found[name] = _sheet(images, subject)
        return found

    def statistics(self, weights: PyTree[Any]) -> PyTree[Any] | None:
        """BatchNorm's for edited weights: None where they stay, else measured on retain images for choosing."""
        if self.selection.statistics == "kept":
            return None
        return re_estimated(self.net, weights, self._validation["retain"])["statistics"]

    def sweep(self, start: PyTree[Any], delta: PyTree[Any]) -> list[Scores]:
        """The validation scores of start - lambda * delta for each lambda."""
        lambdas = self.selection.lambdas
        if self.selection.statistics == "kept":
            found = sweep(self.net, start, [delta], lambdas, self._validation)
            return [self._numbers(found, (0, i), MIA_ROWS) for i in range(len(lambdas))]
        return [self.of(edit(start, delta, factor), self._validation, mia_rows=MIA_ROWS) for factor in lambdas]

    def final(self, weights: PyTree[Any], statistics: PyTree[Any] | None = None) -> Scores:
        """The test scores. Statistics: BatchNorm's, where they are not the recipe's to choose."""
        return self.of(weights, self._final, statistics)

    def of(
        self, weights: PyTree[Any], sheets: dict[str, Sheet], statistics: PyTree[Any] | None = None,
        mia_rows: int | None = None,
    ) -> Scores:  # fmt: skip
        """The scores of one model."""
        own = self.statistics(weights) if statistics is None else statistics
        if own is not None:
            sheets = {name: s._replace(fixed={**s.fixed, "statistics": own}) for name, s in sheets.items()}
        return self._measured(self.net, weights, sheets, mia_rows)

    def final_of(self, other: Subject) -> Scores:
        """The test scores of another model (the retrained one)."""
        return self._measured(other.net, other.trained, _under(self._final, other), None)

    def judge(self, start: PyTree[Any], gold: Subject | None) -> Judge:
        """The rule, with what it compares to: on validation data."""
        rule = self.selection.rule
        if rule == "closest" or (rule == "auto" and gold is not None):
            assert gold is not None  # `load_subjects` saw to it
            target = self._measured(gold.net, gold.trained, _under(self._validation, gold), MIA_ROWS)
            return Judge(self.selection.keep, None, target)
        base = self._measured(self.net, start, self._validation, MIA_ROWS)
        return Judge(self.selection.keep, base.retain, None)

    def _measured(self, net: Net, weights: PyTree[Any], sheets: dict[str, Sheet], mia_rows: int | None) -> Scores:
        weights = jax.device_put(weights)
        return self._numbers({name: score(net, weights, sheet) for name, sheet in sheets.items()}, (), mia_rows)

    def describe(self, judge: Judge) -> dict[str, Any]:
        """For the report."""
        target = None if judge.target is None else judge.target._asdict()
        return {"name": "keep" if target is None else "closest", "floor": judge.floor, "target": target}

    @staticmethod
    def _numbers(found: dict[str, Scored], place: tuple[int, ...], mia_rows: int | None) -> Scores:
        return scores_of(found["retain"], found["forget"], found.get("test"), place, mia_rows)


def _sheet(images: Images, subject: Subject) -> Sheet:
    return Sheet(labelled(images.pixels, images.labels), subject.fixed)


def _under(sheets: dict[str, Sheet], subject: Subject) -> dict[str, Sheet]:
    """The same images for another model."""
    return {name: sheet._replace(fixed=subject.fixed) for name, sheet in sheets.items()}
