"""Image data sets: what is read is what was encoded, and every kind of broken row is named."""

import io
import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from unlearnjax.data.images import forget_mask, load_images
from unlearnjax.errors import UserError


def png(pixels):
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return {"bytes": out.getvalue(), "path": None}


def pixels(n=6, shape=(5, 4, 3)):
    return np.random.default_rng(0).integers(0, 256, (n, *shape), np.uint8)


def write(path, images, labels, names=("cat", "dog", "owl"), image="img", label="label", **more):
    table = pa.table({image: images, label: labels, **more})
    features = {image: {"_type": "Image"}, label: {"names": list(names), "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(table.replace_schema_metadata(metadata), path)
    return str(path)


LABELS = [0, 1, 2, 0, 1, 0]


@pytest.fixture
def data(tmp_path):
    return load_images(write(tmp_path / "x.parquet", [png(x) for x in pixels()], LABELS))


def test_what_is_read_is_what_was_encoded(data):
    np.testing.assert_array_equal(data.pixels, pixels())
    assert data.labels.tolist() == LABELS and data.names == ("cat", "dog", "owl") and data.ids[5] == "5"
    few = data.only(np.array([4, 1]))
    np.testing.assert_array_equal(few.pixels, pixels()[[4, 1]])
    assert few.ids == ("4", "1") and few.labels.tolist() == [1, 1]


def test_grey_images_other_columns_and_ids(tmp_path):
    grey = pixels(2, (3, 3))
    found = load_images(write(tmp_path / "x.parquet", [png(x) for x in grey], [1, 0], image="image", id=["a", "b"]))
    np.testing.assert_array_equal(found.pixels[..., 0], grey)
    assert found.ids == ("a", "b")


def test_forget_masks(data):
    assert forget_mask(data, label="dog").tolist() == [False, True, False, False, True, False]
    assert (forget_mask(data, label=1) == forget_mask(data, label="dog")).all()
    assert np.flatnonzero(forget_mask(data, ids=["3", "0"])).tolist() == [0, 3]
    third = forget_mask(data, fraction=0.34, seed=1)
    assert [int(third[np.array(LABELS) == c].sum()) for c in range(3)] == [1, 1, 0]
    assert (third == forget_mask(data, fraction=0.34, seed=1)).all()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "give one of"), ({"label": 1, "fraction": 0.5}, "give one of"), ({"label": "dgo"}, "did you mean 'dog'"),
        ({"label": 7}, "no class 7"), ({"fraction": 1.5}, "between 0 and 1"), ({"fraction": 0.01}, "takes no row"),
        ({"ids": ["0", "nine"]}, "no row with the id 'nine'"), ({"ids": []}, "ids is empty"),
    ],
)  # fmt: skip
def test_what_cannot_be_forgotten(data, given, words):
    with pytest.raises(UserError, match=words):
        forget_mask(data, **given)


def test_a_class_without_rows(tmp_path):
    found = load_images(write(tmp_path / "x.parquet", [png(x) for x in pixels(2)], [0, 1]))
    with pytest.raises(UserError, match="class 'owl' has no rows"):
        forget_mask(found, label="owl")


BROKEN = {
    "size": (lambda i: [*i[:3], png(pixels(1, (5, 5, 3))[0]), *i[4:]], LABELS, r"row 3: the image is \[5, 5, 3\]"),
    "mode": (lambda i: [*i[:2], png(pixels(1, (5, 4))[0]), *i[3:]], LABELS, r"row 2: the image is \[5, 4, 1\]"),
    "deep": (lambda i: [png(np.zeros((5, 4), np.uint16)), *i[1:]], LABELS, "row 0: the image's mode is I;16"),
    "bytes": (lambda i: [*i[:5], {"bytes": b"no", "path": None}], LABELS, "row 5: is no image"),
    "nothing": (lambda i: [*i[:5], None], LABELS, "row 5: is no image"),
    "label": (lambda i: i, [0, 1, 2, -1, 1, 0], "row 3: the label is -1"),
    "unnamed": (lambda i: i, [0, 1, 2, 3, 1, 0], "row 3: label 3, and there are names for 3 classes"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_rows_are_named(tmp_path, kind):
    change, labels, words = BROKEN[kind]
    source = write(tmp_path / "x.parquet", change([png(x) for x in pixels()]), labels)
    with pytest.raises(UserError, match=words):
        load_images(source)


def test_bad_files(tmp_path):
    source = write(tmp_path / "x.parquet", [png(pixels()[0])], [0], image="photo")
    for given, words in (
        (source, "no column of images"), (str(tmp_path), "is a folder; give one of its files, such as x.parquet"),
        (str(tmp_path / "y.parquet"), "no such file"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=words):
            load_images(given)
    (tmp_path / "z.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="not a readable parquet file"):
        load_images(str(tmp_path / "z.parquet"))


@pytest.mark.skipif(
    "UNLEARNJAX_IMAGES" not in os.environ, reason="UNLEARNJAX_IMAGES names a folder with cifar10, mnist"
)
def test_real_data_sets():
    folder = Path(os.environ["UNLEARNJAX_IMAGES"])
    cifar, mnist = (load_images(str(folder / name / "test.parquet")) for name in ("cifar10", "mnist"))
    assert cifar.pixels.shape == (10_000, 32, 32, 3) and mnist.pixels.shape == (10_000, 28, 28, 1)
    assert cifar.names[:2] == ("airplane", "automobile") and np.bincount(cifar.labels).tolist() == [1000] * 10
