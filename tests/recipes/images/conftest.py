"""A data set of three kinds of stripes, and a classifier that has learnt most of it."""

import io
import json
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from unlearnjax.data.labelled import labelled
from unlearnjax.models.vision.classifier import new_classifier, save_classifier
from unlearnjax.models.vision.net import classifier_subject
from unlearnjax.models.vision.resnet import ResNetConfig
from unlearnjax.training.images.fine_tune import fine_tune
from unlearnjax.training.images.settings import ImageCandidate

NAMES = ("across", "upright", "checked")
SIZE = 8


def stripes(n, seed, names=NAMES):
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % len(names)
    rows, columns = np.mgrid[:SIZE, :SIZE]
    kinds = {"across": rows % 2, "upright": columns % 2, "checked": (rows + columns) % 2}
    pixels = np.stack([kinds[names[i]] for i in labels])[..., None] * rng.integers(40, 160, (n, 1, 1, 3))
    return np.clip(pixels + rng.integers(0, 96, pixels.shape), 0, 255).astype(np.uint8), labels


def write(path, pixels, labels, names=NAMES, **more):
    def png(image):
        out = io.BytesIO()
        Image.fromarray(image if image.shape[-1] == 3 else image[..., 0]).save(out, "PNG")
        return {"bytes": out.getvalue(), "path": None}

    table = pa.table({"img": [png(x) for x in pixels], "label": list(map(int, labels)), **more})
    features = {"img": {"_type": "Image"}, "label": {"names": list(names), "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(table.replace_schema_metadata(metadata), path)
    return str(path)


@pytest.fixture(scope="package")
def made(tmp_path_factory) -> Path:
    """A folder with train, test, model (all training rows) and gold (without the first tenth of each class's)."""
    folder = tmp_path_factory.mktemp("stripes")
    pixels, labels = stripes(90, 0)
    write(folder / "train.parquet", pixels, labels)
    write(folder / "test.parquet", *stripes(60, 1))
    config = ResNetConfig(3, stem="cifar", embedding=4, widths=(4,), depths=(1,))
    subject = classifier_subject(new_classifier("resnet", config, NAMES, SIZE, jax.random.key(0)))
    for name, rows in (("model", slice(None)), ("gold", slice(30, None))):
        settings = ImageCandidate(name, learning_rate=0.1, epochs=4)
        (out,) = fine_tune(subject, labelled(pixels[rows], labels[rows]), [settings], batch_size=15, batch_norm="batch")
        save_classifier(subject.edited(out.trained, out.fixed["statistics"]), folder / name)
    return folder
