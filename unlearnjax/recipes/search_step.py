"""How far to step along a merge: its scale (NegMerge's lambda, 2410.05583, section 4.1) chosen on a sample of rows.

Each trial is a model of its own, the base with the scaled delta added, and they are scored one after another by one
compiled program: a full delta is no adapter that could stand beside others in a stack, and on a CPU 8 adapters side by
side generate fewer rows per second than one model (the README's generation table). On an accelerator a larger
`evaluation: batch_size` does what a stack would.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from jaxtyping import Array, PyTree

from unlearnjax.adapters.apply import add_delta
from unlearnjax.data.rows import Row
from unlearnjax.evaluation.full.sampled import spread
from unlearnjax.evaluation.journal import Journal
from unlearnjax.evaluation.protocol import Progress, evaluate_candidates
from unlearnjax.merging import search
from unlearnjax.models.language_model import LanguageModel
from unlearnjax.recipes.merge_step import Found, Merged, Trial, at_scale, delta_of
from unlearnjax.recipes.prepare import Data
from unlearnjax.recipes.progress import bars
from unlearnjax.recipes.resume import weights_digest
from unlearnjax.recipes.schema import Recipe
from unlearnjax.report.scores import known
from unlearnjax.training.interrupt import Stop

SPLITS = ("forget", "retain")


def _part(bar: Progress | None, label: str, done_before: int, parts: int) -> Progress | None:
    """The progress of one of `parts` pieces of work, all as long as each other."""
    if bar is None:
        return None
    return lambda _, done, total: bar(label, done_before * total + done, parts * total)


@dataclass(frozen=True)
class Searcher:
    """Chooses the scales of a run's merges. `journal`, `stop`: see `evaluate_all`."""

    model: LanguageModel
    recipe: Recipe
    data: Data
    journal: Journal | None = None
    progress: bool = False
    stop: Stop | None = None

    @functools.cached_property
    def sample(self) -> tuple[list[Row], list[Row]]:
        """The rows that are asked: of the forget set, and of the retain set."""
        most = self.recipe.search.rows
        return spread(self.data.forget, most), spread(self.data.retain, most)

    @functools.cached_property
    def base(self) -> dict[str, float]:
        """The base's scores: what every merge has at scale 0."""
        journal = None if self.journal is None else self.journal.within("search").within("base")
        with bars(self.progress, "searching", self.stop) as bar:
            return self._scores(self.model.params, journal, _part(bar, "base", 0, 1))

    def _scores(self, params: PyTree[Array], journal: Journal | None, progress: Progress | None) -> dict[str, float]:
        """Means of the official terms by split; NaN where there are none."""
        settings = self.recipe.evaluation
        (scores,) = evaluate_candidates(
            self.model.model, params, None, self.model.require_tokenizer(), *self.sample, answers=False,
            max_new_tokens=settings.max_new_tokens, batch_size=settings.batch_size, journal=journal, progress=progress,
            warn=lambda *_: None,
        )  # fmt: skip
        means = {split: known(scores, split) for split in SPLITS}
        return {split: math.nan if mean is None else mean for split, mean in means.items()}

    def choose(self, options: Sequence[Merged]) -> Merged:
        """The one of the merges, at the one of the recipe's scales, that NegMerge's rule chooses.

        Args:
          options: what one entry of the recipe can be, at scale 1: one merge, or each candidate's. Of equal trials the
            smaller scale is chosen, then the earlier option.

        Raises:
          UserError: no trial keeps enough of the base's retain score; the message names the best.
          Interrupted: `stop` asked for it.
        """
        keep, base = self.recipe.search.keep, self.base["retain"]
        trials = [(option, trial) for place, option in enumerate(options) for trial in self._trials(option, place)]
        every = [trial for _, trial in trials]
        best = search.choose(every, forget="forget", retain="retain", base_retain=base, share=keep)
        chosen = next(option for option, trial in trials if trial is best)
        found = [Trial(option.candidates, trial.point.lambda_, **trial.scores) for option, trial in trials]
        return at_scale(chosen, best.point.lambda_)._replace(search=Found(keep * base, found))

    def _trials(self, option: Merged, place: int) -> Iterator[search.Trial]:
        """A merge at each of the recipe's scales; `place` tells it from its entry's other options."""
        wanted, scales = option.merge, self.recipe.search.scales
        journal = None
        if self.journal is not None:
            delta = weights_digest(delta_of(option))
            journal = self.journal.within("search").within(wanted.name).within(str(place), delta=delta)
        label = f"{wanted.name} {place + 1}" if place else wanted.name
        with bars(self.progress, "searching", self.stop) as bar:
            for n, scale in enumerate(scales):
                scores = self.base
                if scale > 0:
                    own = None if journal is None else journal.within(str(scale), scale=scale, negated=wanted.negate)
                    params = add_delta(self.model.params, delta_of(at_scale(option, scale)))
                    scores = self._scores(params, own, _part(bar, label, n, len(scales)))
                yield search.Trial(search.Point(wanted.method, option.semantics, (), None, scale), scores)
