"""Labelled images from parquet files or the Hugging Face hub, and which of them are to be forgotten."""

import io
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from unlearnjax.data.hub import HUB, load_hub
from unlearnjax.errors import UserError, nearest

IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "labels", "fine_label")


class Images(NamedTuple):
    """A data set in memory.

    pixels: uint8 [n, height, width, channels] (1 or 3). labels: int32 [n], places in `names`.
    ids: each row's `id`, or its number from 0 where the data set has none.
    """

    pixels: np.ndarray
    labels: np.ndarray
    names: tuple[str, ...]
    ids: tuple[str, ...]

    def only(self, rows: np.ndarray) -> "Images":
        """These rows (numbers, or a mask) and no others."""
        places = np.arange(len(self.labels))[rows]
        return Images(self.pixels[places], self.labels[places], self.names, tuple(self.ids[i] for i in places))


def load_images(source: str, *, size: int | None = None, channels: int | None = None) -> Images:
    """Read an image-classification data set as the hub keeps them: a column of encoded images and one of labels.

    Args:
      source: a parquet file, or `org/name`, `org/name:split` or `org/name:config:split` on the hub.
      size: bring images to this height and width: the shorter side is resized to it (bicubic, as CLIP's preparation
        does), and the middle is cut out. channels: bring them to 1 (grey) or 3 (RGB). Default: as they are.

    Raises:
      UserError: no such file or data set; no column of images or of labels; an image that cannot be decoded, or of
        another size or mode than the first (the row is named); a label that is no number from 0 on, or has no name.
    """
    path = Path(source).expanduser()
    columns, known = _from_parquet(source, path) if path.exists() else _from_hub(source)
    image = _column(source, columns, IMAGE_COLUMNS, "images")
    label = _column(source, columns, LABEL_COLUMNS, "labels")
    count = len(columns[image])
    if not count:
        raise UserError(f"{source}: holds no rows")
    labels = _labels(source, columns[label])
    names = known.get(label) or tuple(str(i) for i in range(int(labels.max()) + 1))
    if labels.max() >= len(names):
        row = int(np.argmax(labels))
        raise UserError(f"{source}, row {row}: label {labels[row]}, and there are names for {len(names)} classes")
    ids = tuple(map(str, columns["id"])) if "id" in columns else tuple(map(str, range(count)))
    return Images(_decoded(source, columns[image], size, channels), labels, names, ids)


def _column(source: str, columns: dict[str, Any], names: Sequence[str], what: str) -> str:
    for name in names:
        if name in columns:
            return name
    raise UserError(f"{source}: has no column of {what} ({', '.join(names)}), only {', '.join(columns)}")


def _labels(source: str, values: Sequence[Any]) -> np.ndarray:
    for row, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 0:
            raise UserError(f"{source}, row {row}: the label is {value!r}, and must be a number from 0 on")
    return np.asarray(values, np.int32)


def _decoded(source: str, encoded: Sequence[Any], size: int | None, channels: int | None) -> np.ndarray:
    from PIL import Image, UnidentifiedImageError

    def decode(row: int) -> np.ndarray:
        item = encoded[row]
        try:
            raw = item["bytes"] if isinstance(item, dict) else item
            if isinstance(raw, bytes):
                with Image.open(io.BytesIO(raw)) as opened:
                    raw = opened.convert("RGB") if opened.mode in ("P", "RGBA") else opened.copy()
            if raw.mode not in ("L", "RGB"):
                raise UserError(f"{source}, row {row}: the image's mode is {raw.mode}; convert it to RGB or L")
            pixels = np.asarray(_brought_to(raw, size, channels), np.uint8)
        except (UnidentifiedImageError, OSError, TypeError, AttributeError, KeyError) as error:
            raise UserError(f"{source}, row {row}: is no image that can be decoded ({error})") from None
        return pixels if pixels.ndim == 3 else pixels[..., None]

    first = decode(0)
    out = np.empty((len(encoded), *first.shape), np.uint8)

    def place(row: int) -> None:
        found = decode(row)
        if found.shape != first.shape:
            raise UserError(
                f"{source}, row {row}: the image is {list(found.shape)} (height, width, channels) and row 0's is "
                f"{list(first.shape)}; resize them to one size"
            )
        out[row] = found

    with ThreadPoolExecutor() as pool:  # decoding releases the interpreter
        for _ in pool.map(place, range(len(encoded))):
            pass
    return out


def _brought_to(image: Any, size: int | None, channels: int | None) -> Any:
    """A PIL image of that size and so many channels, where they are given."""
    from PIL import Image

    if channels is not None:
        image = image.convert("RGB" if channels == 3 else "L")
    if size is None or image.size == (size, size):
        return image
    shorter = min(image.size)
    width, height = (max(size, round(side * size / shorter)) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    return resized.crop((left, top, left + size, top + size))


def _from_parquet(source: str, path: Path) -> tuple[dict[str, Any], dict[str, tuple[str, ...]]]:
    """(columns, the names of each column of classes)"""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if path.is_dir():
        inside = sorted(p.name for p in path.glob("*.parquet"))
        raise UserError(f"{source}: is a folder; give one of its files" + (f", such as {inside[0]}" if inside else ""))
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{source}: not a readable parquet file ({str(error).splitlines()[0]})") from None
    features: dict[str, Any] = {}
    if b"huggingface" in (table.schema.metadata or {}):
        features = json.loads(table.schema.metadata[b"huggingface"]).get("info", {}).get("features", {})
    names = {
        name: tuple(feature["names"])
        for name, feature in features.items()
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and "names" in feature
    }
    return {name: table.column(name).to_pylist() for name in table.column_names}, names


def _from_hub(source: str) -> tuple[dict[str, Any], dict[str, tuple[str, ...]]]:
    hub = HUB.match(source)
    if hub is None or source.endswith(".parquet"):
        raise UserError(f"{source}: no such file")
    found = load_hub(source, hub)
    names = {name: tuple(f.names) for name, f in found.features.items() if hasattr(f, "names")}
    return {name: list(found[name]) for name in found.column_names}, names


def forget_mask(
    data: Images,
    *,
    label: str | int | None = None,
    fraction: float | None = None,
    ids: Sequence[str] | None = None,
    seed: int = 0,
) -> np.ndarray:
    """Which rows are to be forgotten: bool [n]. Exactly one of the three says so.

    Args:
      label: a class, by its name or number.
      fraction: of each class the same share, at random (stratified, as SalUn's splits are).
      ids: rows by their ids.

    Raises:
      UserError: none or several given; no such class, or one without rows; a fraction outside (0, 1) or that takes no
        row; an id that does not exist.
    """
    if sum(x is not None for x in (label, fraction, ids)) != 1:
        raise UserError("forget: give one of a class, a fraction, or ids")
    mask = np.zeros(len(data.labels), bool)
    if label is not None:
        number = _class(data, label)
        mask |= data.labels == number
        if not mask.any():
            raise UserError(f"forget: class {data.names[number]!r} has no rows")
    elif fraction is not None:
        if not 0 < fraction < 1:
            raise UserError(f"forget: fraction is {fraction:g} and must lie between 0 and 1")
        rng = np.random.default_rng(seed)
        for number in range(len(data.names)):
            rows = np.flatnonzero(data.labels == number)
            mask[rng.permutation(rows)[: round(fraction * rows.size)]] = True
        if not mask.any():
            raise UserError(f"forget: a fraction of {fraction:g} takes no row of any class")
    else:
        places = {name: i for i, name in enumerate(data.ids)}
        for name in ids or ():
            if str(name) not in places:
                raise UserError(f"forget: there is no row with the id {name!r}")
            mask[places[str(name)]] = True
        if not mask.any():
            raise UserError("forget: ids is empty")
    return mask


def _class(data: Images, label: str | int) -> int:
    if isinstance(label, str) and label in data.names:
        return data.names.index(label)
    if str(label).isdigit() and int(label) < len(data.names):
        return int(label)
    raise UserError(f"forget: there is no class {label!r}{nearest(str(label), data.names)}")
