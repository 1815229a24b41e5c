"""What a baseline is: settings as plain data, the data it may see, and one way to run it."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Array, PyTree

from unlearnjax.data.labelled import Labelled
from unlearnjax.errors import UserError, check_known
from unlearnjax.models.vision.net import Subject
from unlearnjax.training.images.fine_tune import Order, fine_tune
from unlearnjax.training.images.settings import ImageCandidate, check
from unlearnjax.training.interrupt import Interrupted, Stop

ORDERS = ("forget first", "shuffled")
OF_TRAINING = ("learning_rate", "epochs", "momentum", "weight_decay", "flip", "crop_padding", "l1")

T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """What can be set; None: this baseline has no such setting.

    The defaults that all share are those of SalUn's code (Unlearn-Saliency, Classification/arg_parser.py, dataset.py).

    Attributes:
      learning_rate: of SGD, constant (above 0). epochs: 1 or more, over the rows that the baseline sees.
      batch_size: rows, 1 or more. momentum: [0, 1). weight_decay: 0 or more.
      flip: probability of a horizontal flip. crop_padding: pixels of zeros around, before a random crop.
      order: of an epoch's rows: "forget first", then retain rows, each shuffled; or all "shuffled" together.
      mask: share of the weights that may change, (0, 1].
      l1: weight of the sum of all weights' magnitudes at the start, 0 or more; falls linearly to 0.
      bound: FGSM's step, in units of the pixels' range, (0, 1].
      alpha: what the influence of the forget rows is multiplied by; finite.
      damping: WoodFisher's N, and two less than the largest number of retain rows it takes; 1 or more.
    """

    learning_rate: float | None = None
    epochs: int | None = None
    batch_size: int = 256
    momentum: float | None = 0.9
    weight_decay: float | None = 5e-4
    flip: float = 0.5
    crop_padding: int = 4
    order: str | None = None
    mask: float | None = None
    l1: float | None = None
    bound: float | None = None
    alpha: float | None = None
    damping: int | None = None

    def known(self) -> list[str]:
        """The names of what can be set."""
        return [f.name for f in dataclasses.fields(self) if getattr(self, f.name) is not None]


class Unlearned(NamedTuple):
    """A model after unlearning: what is edited, and the rest (BatchNorm's statistics), as numpy arrays.

    losses: of each update, before it. diverged_at: how many updates were taken until something was not finite, if so.
    """

    trained: PyTree[np.ndarray]
    fixed: PyTree[np.ndarray]
    losses: list[float]
    diverged_at: int | None


class Job(NamedTuple):
    """One run of a baseline."""

    name: str
    subject: Subject
    retain: Labelled
    forget: Labelled
    settings: Settings
    seed: int
    stop: Stop | None
    progress: bool

    def candidate(self) -> ImageCandidate:
        """Its settings as training takes them."""
        given: dict[str, Any] = {n: getattr(self.settings, n) for n in OF_TRAINING if n in self.settings.known()}
        return ImageCandidate(self.name, schedule="constant", seed=self.seed, **given)

    def tune(
        self,
        data: Labelled,
        *,
        order: Order | None = None,
        mask: PyTree[Array] | None = None,
        **changes: Any,
    ) -> Unlearned:
        """Fine-tune the subject on `data` as the baselines' codes do: SGD, BatchNorm in its training mode.

        Args:
          order, mask: see `fine_tune`. changes: of the candidate.
        """
        (found,) = fine_tune(
            self.subject, data, [dataclasses.replace(self.candidate(), **changes)], batch_norm="batch", order=order,
            batch_size=self.settings.batch_size, masks=None if mask is None else [mask], progress=self.progress,
            label=self.name, stop=self.stop,
        )  # fmt: skip
        return Unlearned(found.trained, found.fixed, found.losses, found.diverged_at)

    def watched(self, items: Iterable[T], total: int, unit: str) -> Iterator[T]:
        """The same items, with a progress bar and an ear for `stop`."""
        from tqdm import tqdm

        with self.stop.polling() if self.stop is not None else contextlib.nullcontext():
            for item in tqdm(items, self.name, total, unit=unit, disable=not self.progress, dynamic_ncols=True):
                if self.stop is not None and self.stop.signum:
                    raise Interrupted(self.stop.signum)
                yield item


@dataclass(frozen=True)
class Baseline:
    """One way to unlearn by a single run.

    Attributes:
      data: what it sees of the training set. settings: its defaults.
      search: ranges in which SalUn's authors say they searched (the paper, or issues of its repository).
      source: the paper, and the code that its definition was read from.
    """

    name: str
    data: Literal["retain", "forget", "all"]
    method: Callable[[Job], Unlearned] = field(repr=False)
    settings: Settings
    source: str
    search: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def run(
        self,
        subject: Subject,
        retain: Labelled,
        forget: Labelled,
        *,
        seed: int,
        stop: Stop | None = None,
        progress: bool = False,
        **settings: Any,
    ) -> Unlearned:
        """Unlearn `forget`.

        Args:
          subject: the model, trained on both. It is not changed.
          retain, forget: the rows to keep and to forget, with their true labels.
          seed: of everything random, 0 to 2^31 - 1.
          stop: looked at between two programs.
          settings: other values than the defaults (None: the default); see `Settings`.

        Raises:
          UserError: a setting that this baseline does not have, or out of range; no rows; images of two sizes; labels
            that the model has no class for.
          Interrupted: `stop` asked for it.
        """
        check_known(settings, self.settings.known(), "setting", self.name)
        given = {name: value for name, value in settings.items() if value is not None}
        chosen = dataclasses.replace(self.settings, **given)
        job = Job(self.name, subject, retain, forget, chosen, seed, stop, progress)
        _check(job, self.data)
        return self.method(job)


def _check(job: Job, seen: str) -> None:
    s = job.settings
    rules: list[tuple[str, bool, str]] = [
        ("batch_size", s.batch_size >= 1, "1 or more"),
        ("order", s.order is None or s.order in ORDERS, f"one of {', '.join(ORDERS)}"),
        ("mask", s.mask is None or 0 < s.mask <= 1, "above 0 and at most 1"),
        ("bound", s.bound is None or 0 < s.bound <= 1, "above 0 and at most 1"),
        ("alpha", s.alpha is None or bool(np.isfinite(s.alpha)), "finite"),
        ("damping", s.damping is None or s.damping >= 1, "1 or more"),
    ]
    for name, good, allowed in rules:
        if not good:
            raise UserError(f"{job.name}: {name} is {getattr(s, name)!r} and must be {allowed}")
    check(job.candidate(), job.name)
    classes = len(job.subject.labels)
    for what, data in (("retain", job.retain), ("forget", job.forget)):
        if seen not in (what, "all"):
            continue
        if not data.labels.shape[0]:
            raise UserError(f"{job.name}: there are no {what} rows")
        if int(data.labels.max()) >= classes:
            raise UserError(f"{job.name}: a {what} label is {int(data.labels.max())}; the model has {classes} classes")
    if seen == "all" and job.retain.pixels.shape[1:] != job.forget.pixels.shape[1:]:
        raise UserError(
            f"{job.name}: retain images are {list(job.retain.pixels.shape[1:])} (height, width, channels), forget "
            f"images {list(job.forget.pixels.shape[1:])}; resize them to one size"
        )
