"""Labelled images: what would silently become other images is refused."""

import numpy as np
import pytest

from unlearnjax.data.labelled import labelled
from unlearnjax.errors import UserError


def test_dtypes_are_the_devices():
    found = labelled(np.full((2, 4, 4, 3), 255, np.uint8), np.array([0, 7]))
    assert (found.pixels.dtype, found.labels.dtype) == (np.uint8, np.int32)
    assert found.pixels.max() == 255 and found.labels.tolist() == [0, 7]


@pytest.mark.parametrize(
    ("pixels", "labels"),
    [
        (np.ones((2, 4, 4, 3), np.float32), np.zeros(2, np.int64)),  # 0 to 1: all would be black
        (np.full((2, 4, 4, 3), 256), np.zeros(2, np.int64)),
        (np.ones((2, 4, 4), np.uint8), np.zeros(2, np.int64)),
        (np.ones((2, 4, 4, 3), np.uint8), np.zeros(3, np.int64)),
        (np.ones((2, 4, 4, 3), np.uint8), np.full(2, 0.5)),
        (np.ones((2, 4, 4, 3), np.uint8), np.zeros((2, 1), np.int64)),
    ],
    ids=["shares", "int64", "grey", "another number", "floats", "a column"],
)
def test_what_is_no_labelled_images_is_refused(pixels, labels):
    with pytest.raises(UserError, match=r"labelled: .*uint8 \[n, height, width, channels\].*integers \[n\]"):
        labelled(pixels, labels)
