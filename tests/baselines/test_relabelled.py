"""Random labels: which, for which rows, in which order."""

import jax.numpy as jnp
import numpy as np
import pytest

from unlearnjax.baselines.relabelled import epochs_of, random_labels
from unlearnjax.data.labelled import Labelled
from unlearnjax.training.images.fine_tune import batches
from unlearnjax.training.images.settings import ImageCandidate


def test_labels_are_uniform_over_all_classes_and_differ_between_epochs_and_seeds():
    labels = random_labels(7, 10, 4500, 10)
    share = np.bincount(labels.ravel(), minlength=10) / labels.size
    np.testing.assert_allclose(share, 0.1, atol=0.01)  # 7 standard deviations
    # As in SalUn's code a random label may be the true one.
    true = np.random.default_rng(0).integers(10, size=4500)
    assert abs((labels == true).mean() - 0.1) < 0.01
    assert abs((labels[0] == labels[1]).mean() - 0.1) < 0.03
    np.testing.assert_array_equal(labels, random_labels(7, 10, 4500, 10))
    assert (labels != random_labels(8, 10, 4500, 10)).mean() > 0.8


def rows(first, count, label):
    pixels = (first + jnp.arange(count))[:, None, None, None].astype(jnp.uint8)
    return Labelled(pixels, jnp.full(count, label, jnp.int32))


@pytest.mark.parametrize("shuffled", [False, True])
def test_each_epoch_has_its_own_rows_and_all_the_others(shuffled):
    same, own = rows(100, 7, 50), [rows(0, 4, epoch) for epoch in range(3)]
    data, order = epochs_of(same, own, shuffled=shuffled)
    seen = []
    for epoch in range(3):
        found = order(0, epoch)
        pixels, labels = np.asarray(data.pixels[found]).ravel(), np.asarray(data.labels[found])
        assert sorted(pixels) == [0, 1, 2, 3, *range(100, 107)]
        assert set(labels[pixels < 100]) == {epoch} and set(labels[pixels >= 100]) == {50}
        if not shuffled:
            assert max(pixels[:4]) < 100 <= min(pixels[4:])
        seen.append(tuple(pixels))
    assert len(set(seen)) == 3
    assert shuffled == any(max(x[:4]) >= 100 for x in seen)


def test_training_takes_an_order_epoch_by_epoch():
    data, order = epochs_of(rows(100, 3, 9), [rows(0, 4, epoch) for epoch in range(2)], shuffled=False)
    found = list(batches(ImageCandidate("x", epochs=2), order, 5))
    assert len(found) == 4
    for epoch in range(2):
        taken = np.concatenate([r[w > 0] for r, w in found[2 * epoch : 2 * epoch + 2]])
        np.testing.assert_array_equal(taken, order(0, epoch))
    assert set(np.asarray(data.labels)) == {0, 1, 9}
