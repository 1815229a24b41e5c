"""Which images are trained on, which choose lambda, and which are scored once at the end."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from unlearnjax.data.images import Images, forget_mask, load_images
from unlearnjax.errors import UserError, nearest
from unlearnjax.models.vision.net import Subject

SELECTORS = ("class", "fraction", "ids")
HELD_OUT, MOST_HELD_OUT = 0.1, 5000  # of training data, as the paper's splits for CLIP


class ImageSources(NamedTuple):
    """Where images come from (see `load_images`).

    data: what the model was trained on, or what it is to keep. forget: `class:NAME`, `fraction:F` or `ids:FILE` of
    `data` (FILE: one id per line), or a data set of its own. test: never used but at the end; forget_test: the forget
    set's, where that is a data set of its own with classes of its own. validation: for choosing; None: for a classifier
    half of `test`, for CLIP held-out rows of `data`. resize: bring images to the model's size and channels.
    """

    data: str
    forget: str
    test: str
    validation: str | None = None
    forget_test: str | None = None
    resize: bool = False


class Rows(NamedTuple):
    """What is scored together. `test`: rows that are neither forgotten nor retained, where a classifier is judged."""

    forget: Images
    retain: Images
    test: Images | None


class Splits(NamedTuple):
    """train: what candidates are fine-tuned on. retain: what a method with retain data may see. validation, final: what
    is scored to choose, and at the end. forget_labels: the classes of the forget rows."""

    train: Images
    retain: Images
    validation: Rows
    final: Rows
    forget_labels: tuple[str, ...]
    labels: tuple[str, ...]


def load(source: str, like: "Wanted", resize: bool) -> Images:
    """Images of the size and channels that the model takes.

    Raises:
      UserError: as `load_images`; another size or mode than the model's, without `resize`.
    """
    if resize:
        return load_images(source, size=like.size, channels=like.channels)
    found = load_images(source)
    height, width, channels = found.pixels.shape[1:]
    if (height, width) != (like.size, like.size) or channels != like.channels:
        kind = lambda c: "RGB" if c == 3 else "L" if c == 1 else f"{c} channels"  # noqa: E731
        raise UserError(
            f"{source}: images are {width}x{height} ({kind(channels)}) and the model takes {like.size}x{like.size} "
            f"({kind(like.channels)}); add --resize to bring them to that"
        )
    return found


class Wanted(NamedTuple):
    """What the model takes."""

    size: int
    channels: int


def aligned(data: Images, labels: Sequence[str], source: str) -> Images:
    """The same rows with labels numbered as the model's classes are.

    Raises:
      UserError: a class that the model does not have.
    """
    if data.names == tuple(labels):
        return data
    if all(name.isdigit() for name in data.names):  # a data set without names
        if data.labels.max() >= len(labels):
            raise UserError(f"{source}: label {data.labels.max()}, and the model has {len(labels)} classes")
        return data._replace(names=tuple(labels))
    places = {name: i for i, name in enumerate(labels)}
    for name in data.names:
        if name not in places:
            hint = nearest(name, labels)
            raise UserError(f"{source}: its class {name!r} is none of the model's {len(labels)} classes{hint}")
    moved = np.array([places[name] for name in data.names], np.int32)[data.labels]
    return data._replace(labels=moved, names=tuple(labels))


def selected(data: Images, forget: str, seed: int) -> np.ndarray | None:
    """The rows that `class:`, `fraction:` or `ids:` names: bool [n]; None for a data set of its own.

    Raises:
      UserError: see `forget_mask`; a fraction that is no number, or a file of ids that cannot be read.
    """
    kind, _, value = forget.partition(":")
    if kind not in SELECTORS or not value:
        return None
    if kind == "class":
        return forget_mask(data, label=value)
    if kind == "fraction":
        try:
            return forget_mask(data, fraction=float(value), seed=seed)
        except ValueError:
            raise UserError(f"--forget {forget}: {value!r} is no number") from None
    try:
        ids = Path(value).expanduser().read_text("utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--forget {forget}: cannot be read ({error})") from None
    return forget_mask(data, ids=ids)


def some(data: Images, rows: int, seed: int) -> Images:
    """At most `rows` rows at random, in their order."""
    if len(data.labels) <= rows:
        return data
    chosen = np.random.default_rng(seed).permutation(len(data.labels))[:rows]
    return data.only(np.sort(chosen))


def _halves(data: Images, seed: int) -> tuple[Images, Images]:
    order = np.random.default_rng(seed).permutation(len(data.labels))
    middle = len(order) // 2
    return data.only(np.sort(order[:middle])), data.only(np.sort(order[middle:]))


def _held_out(data: Images, seed: int) -> tuple[Images, Images]:
    """(the rest, what is held out)"""
    count = min(max(1, int(HELD_OUT * len(data.labels))), MOST_HELD_OUT)
    out = np.zeros(len(data.labels), bool)
    out[np.random.default_rng(seed).permutation(len(data.labels))[:count]] = True
    return data.only(~out), data.only(out)


def classifier_splits(sources: ImageSources, subject: Subject, rows: int, seed: int) -> Splits:
    """SalUn's and NegMerge's protocol for classifiers: scored are the forget rows, the retain rows and a test set.

    Args:
      rows: of each set for choosing. seed: of what is drawn at random.

    Raises:
      UserError: see `load`, `aligned`, `selected`; nothing is left to retain.
    """
    like = Wanted(subject.image_size, subject.channels)
    read = lambda source: aligned(load(source, like, sources.resize), subject.labels, source)  # noqa: E731
    data = read(sources.data)
    mask = selected(data, sources.forget, seed)
    if mask is None:
        forget, retain = read(sources.forget), data
    else:
        forget, retain = data.only(mask), data.only(~mask)
    _not_empty(forget, retain, sources)
    test = read(sources.test)
    validation, test = (read(sources.validation), test) if sources.validation else _halves(test, seed)
    for_choosing = Rows(*(some(x, rows, seed) for x in (forget, retain, validation)))
    final = Rows(forget, retain, test)
    return Splits(forget, retain, for_choosing, final, subject.labels, subject.labels)


def clip_splits(sources: ImageSources, size: int, channels: int, rows: int, seed: int) -> Splits:
    """NegMerge's protocol for CLIP: scored are test images of what is forgotten and of what is kept; lambda is chosen
    on rows held out of their training data.

    Raises:
      UserError: see `load_images`, `selected`; a forget data set without --forget-test.
    """
    read = lambda source: load_images(source, size=size, channels=channels)  # noqa: E731
    data, test = read(sources.data), read(sources.test)
    _same_names(data, test, sources.data, sources.test)
    mask = selected(data, sources.forget, seed)
    if mask is None:
        if sources.forget_test is None:
            raise UserError("--forget is a data set of its own: give its test images as --forget-test")
        forget, retain, forget_test = read(sources.forget), data, read(sources.forget_test)
        _same_names(forget, forget_test, sources.forget, sources.forget_test)
    else:
        if not sources.forget.startswith("class:"):
            raise UserError("--forget: a CLIP model forgets a class of --data, or a data set of its own")
        forget, retain = data.only(mask), data.only(~mask)
        hit = selected(test, sources.forget, seed)
        assert hit is not None
        forget_test, test = test.only(hit), test.only(~hit)
    _not_empty(forget, retain, sources)
    train, forget_validation = _held_out(forget, seed)
    if sources.validation:
        retain_validation = read(sources.validation)
        _same_names(data, retain_validation, sources.data, sources.validation)
    else:
        retain, retain_validation = _held_out(retain, seed)
    for_choosing = Rows(some(forget_validation, rows, seed), some(retain_validation, rows, seed), None)
    return Splits(train, retain, for_choosing, Rows(forget_test, test, None), forget.names, data.names)


def _same_names(one: Images, other: Images, source: str, other_source: str) -> None:
    if one.names != other.names:
        raise UserError(f"{other_source}: its classes differ from those of {source}; they must be the same")


def _not_empty(forget: Images, retain: Images, sources: ImageSources) -> None:
    for name, found in (("forget", forget), ("retain", retain)):
        if not len(found.labels):
            raise UserError(f"--forget {sources.forget}: leaves nothing to {name}")
    if len(forget.labels) < 2:
        raise UserError(f"--forget {sources.forget}: one image only; give two or more")


def describe(splits: Splits) -> dict[str, Any]:
    """Rows and fingerprints, for the report."""
    found: dict[str, Any] = {}
    sets = {"train": splits.train, "retain": splits.retain}
    for phase, rows in (("validation", splits.validation), ("test", splits.final)):
        sets |= {f"{phase} {name}": x for name, x in rows._asdict().items() if x is not None}
    for name, images in sets.items():
        found[name] = {"rows": len(images.labels), "sha256": fingerprint(images)}
    return found


def fingerprint(images: Images) -> str:
    """SHA-256 of pixels and labels."""
    digest = hashlib.sha256(str(images.pixels.shape).encode())
    digest.update(images.pixels.tobytes())
    digest.update(images.labels.tobytes())
    return digest.hexdigest()
