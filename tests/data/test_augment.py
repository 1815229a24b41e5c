"""Augmentation of a batch: what is drawn, how often, and that candidates, rows and batch sizes do not mix."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unlearnjax.data.augment import FILL, Strength, augment
from unlearnjax.data.randaugment import OPERATIONS, apply_operation, operation_argument

ROWS = 24  # in most tests, which then share their compiled programs
augment_jitted = jax.jit(augment, static_argnames=("most_operations", "crops", "fill"))


def strength(flip=0.0, crop_padding=0, magnitude=0.0, operations=0, magnitude_std=0.0):
    return Strength(
        jnp.float32(flip), jnp.int32(crop_padding), jnp.float32(magnitude), jnp.int32(operations),
        jnp.float32(magnitude_std),
    )  # fmt: skip


def pixels(rows, height=12, width=9, channels=3):
    return jnp.asarray(np.random.default_rng(0).integers(0, 256, (rows, height, width, channels)), jnp.float32)


def repeated(image, rows):
    return jnp.broadcast_to(image, (rows, *image.shape))


STRONG = strength(flip=0.5, crop_padding=4, magnitude=7, operations=2, magnitude_std=0.5)


@pytest.mark.parametrize("channels", [1, 3])
def test_no_strength_leaves_every_bit(key, channels):
    images = pixels(16, channels=channels)
    found = augment_jitted(key, images, strength(), most_operations=3)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, images)


@pytest.mark.parametrize("crops", [False, True])
@pytest.mark.parametrize("probability", [0.0, 0.5, 1.0])
def test_flips_as_often_as_asked(key, probability, crops):
    images = pixels(2000, 3, 4)
    found = np.asarray(augment_jitted(key, images, strength(flip=probability), most_operations=0, crops=crops))
    flipped = (found == np.asarray(images)[:, :, ::-1]).all((1, 2, 3))
    np.testing.assert_array_equal(found[~flipped], images[~flipped])
    assert abs(flipped.mean() - probability) <= 4 * np.sqrt(probability * (1 - probability) / 2000)


@pytest.mark.parametrize("padding", [1, 2])
def test_crops_are_windows_of_the_padded_image_each_as_often(key, padding):
    image = np.asarray(pixels(1)[0])
    height, width, _ = image.shape
    padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)))
    places = range(2 * padding + 1)
    windows = np.stack([padded[y : y + height, x : x + width] for y in places for x in places])
    rows = 100 * len(windows)
    found = np.asarray(
        augment_jitted(key, repeated(jnp.asarray(image), rows), strength(crop_padding=padding), most_operations=0)
    )
    counts = np.array([(found == window).all((1, 2, 3)).sum() for window in windows])
    assert counts.sum() == rows
    assert np.abs(counts - 100).max() <= 45  # 4.5 standard deviations


def test_randaugment_draws_every_operation_alike_and_applies_half(key):
    image, rows, level = pixels(1, 20, 20)[0], 3000, jnp.float32(3.3)
    one = jax.jit(apply_operation)
    outcomes = {"none": np.asarray(image)}
    for place, name in enumerate(OPERATIONS):
        for negative in (False, True):
            argument = operation_argument(jnp.int32(place), level, jnp.bool_(negative))
            outcome = np.asarray(one(image, jnp.int32(place), argument, jnp.asarray(FILL[3])))
            if not any((outcome == other).all() for other in outcomes.values()):
                outcomes[f"{name} {'-' if negative else '+'}"] = outcome
    assert len(outcomes) == 1 + len(OPERATIONS) + 5
    found = np.asarray(
        augment_jitted(key, repeated(image, rows), strength(magnitude=level, operations=1), most_operations=1)
    )
    # Two programs may round a pixel differently, and no two outcomes are that close.
    counts = {name: int((np.abs(found - x).max((1, 2, 3)) <= 1).sum()) for name, x in outcomes.items()}
    assert sum(counts.values()) == rows
    assert abs(counts.pop("none") - rows / 2) <= 110  # 4 standard deviations
    for name in OPERATIONS:
        sides = [count for outcome, count in counts.items() if outcome.split()[0] == name]
        assert abs(sum(sides) - rows / 30) <= 45, name  # 4.5 standard deviations
        assert min(sides) >= 0.25 * sum(sides), name


def test_operations_are_drawn_independently(key):
    images = pixels(1000, 20, 20)
    given = strength(magnitude=3.3, operations=3)
    untouched = (augment_jitted(key, images, given, most_operations=3) == images).all((1, 2, 3)).mean()
    assert abs(untouched - 1 / 8) < 0.042  # 4 standard deviations


def test_the_level_is_normal_about_the_magnitude_and_clipped(key):
    """On a constant image with fill of its colour, Brightness alone gives values that tell its level; what the other
    operations give is left out."""
    images = jnp.full((6000, 4, 4, 1), 130.0)

    def values(magnitude):
        given = strength(magnitude=magnitude, operations=1, magnitude_std=0.5)
        return np.asarray(augment_jitted(key, images, given, most_operations=1, fill=(130.0,)))[:, 0, 0, 0]

    near_five = values(5)
    near_five = near_five[~np.isin(near_five, [0, 125, 128, 130])]  # Posterize 0 and 128, Invert and Solarize 125
    levels = 5 + ((near_five + 0.5) / 130 - 1) / 0.18
    assert len(levels) > 120
    assert abs(levels.mean() - 5) < 0.15 and 0.4 < levels.std() < 0.6
    bright = values(10)
    bright = bright[bright > 130]
    assert bright.max() == 247  # 130 times 1.9
    assert 0.38 < (bright == 247).mean() < 0.62


@pytest.mark.parametrize("channels", [1, 3])
def test_strong_augmentation_gives_whole_numbers_in_range(key, channels):
    images = pixels(64, 8, 15, channels)
    found = np.asarray(augment_jitted(key, images, STRONG._replace(operations=jnp.int32(3)), most_operations=3))
    assert found.shape == images.shape and found.min() >= 0 and found.max() <= 255
    np.testing.assert_array_equal(found, np.round(found))
    assert (found != np.asarray(images)).any((1, 2, 3)).mean() > 0.9


def close(found, want):
    """Equal but for roundings, which differ between programs and which a later operation may enlarge in a few rows."""
    found, want = np.asarray(found), np.asarray(want)
    assert (np.abs(found - want).max((-3, -2, -1)) <= 1).mean() >= 0.95


@pytest.mark.parametrize("shared", [True, False])
def test_each_candidate_alone(key, shared):
    candidates = [
        strength(flip=0.5, crop_padding=4),
        strength(magnitude=9, operations=1, magnitude_std=0.5),
        strength(),
        STRONG,
    ]
    keys = jax.random.split(key, 4)
    images = pixels(ROWS) if shared else pixels(4 * ROWS).reshape(4, ROWS, 12, 9, 3)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *candidates)
    mapped = jax.jit(jax.vmap(partial(augment, most_operations=2), in_axes=(0, None if shared else 0, 0)))
    found = mapped(keys, images, stacked)
    for i, candidate in enumerate(candidates):
        given = images if shared else images[i]
        close(found[i], augment_jitted(keys[i], given, candidate, most_operations=2))
    np.testing.assert_array_equal(found[2], images if shared else images[2])


def test_deterministic_and_each_key_another(key):
    images = pixels(ROWS)
    first, again, other = (augment_jitted(k, images, STRONG, most_operations=2) for k in (key, key, jax.random.key(1)))
    np.testing.assert_array_equal(first, again)
    assert (np.asarray(first) != np.asarray(other)).any((1, 2, 3)).mean() > 0.8


def test_a_row_does_not_depend_on_the_batch_or_on_the_bound(key):
    images = pixels(ROWS)
    found = augment_jitted(key, images, STRONG, most_operations=2)
    close(augment_jitted(key, images[:9], STRONG, most_operations=2), found[:9])
    close(augment_jitted(key, images, STRONG, most_operations=3), found)


def test_rows_differ(key):
    found = np.asarray(augment_jitted(key, repeated(pixels(1)[0], ROWS), STRONG, most_operations=2))
    assert len(np.unique(found.reshape(ROWS, -1), axis=0)) > 20


def test_compiled_or_not(key):
    images = pixels(ROWS)
    close(augment(key, images, STRONG, most_operations=2), augment_jitted(key, images, STRONG, most_operations=2))


def test_no_operations_compile_none():
    def program(most):
        return augment_jitted.lower(jax.random.key(0), pixels(2), STRONG, most_operations=most).as_text()

    assert "scatter" in program(1) and "scatter" not in program(0)  # the histogram
