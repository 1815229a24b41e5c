"""Sweeps over edited image models against each edited model by itself (re-estimated statistics: tests/parity)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unlearnjax.data.labelled import labelled
from unlearnjax.errors import UserError
from unlearnjax.evaluation import forgetting
from unlearnjax.evaluation.images import Sheet, edit, re_estimated, score, sweep
from unlearnjax.models.vision.classifier import new_classifier
from unlearnjax.models.vision.net import classifier_subject
from unlearnjax.models.vision.resnet import ResNetConfig

RNG = np.random.default_rng(0)
LAMBDAS = (0.0, 0.4, 1.0)
BATCH = 4  # of 11 rows and of 3: a padded last batch, and less than a whole one


def rows_of(count):
    return RNG.integers(0, 256, (count, 8, 8, 3)).astype(np.uint8), RNG.integers(0, 3, count)


ROWS = {"forget": rows_of(11), "test": rows_of(3)}


@pytest.fixture(scope="module")
def subject():
    config = ResNetConfig(3, stem="cifar", embedding=4, widths=(4,), depths=(1,))
    return classifier_subject(new_classifier("resnet", config, ("a", "b", "c"), 8, jax.random.key(0)))


@pytest.fixture(scope="module")
def directions(subject):
    draw = lambda x: jnp.asarray(0.3 * RNG.normal(size=x.shape), jnp.float32)  # noqa: E731
    return [jax.tree.map(draw, subject.trained) for _ in range(2)]


@pytest.fixture(scope="module")
def sheets(subject):
    """What is not edited differs between sheets."""
    other = jax.tree.map(lambda x: x + 0.5, subject.fixed)
    return {"forget": Sheet(labelled(*ROWS["forget"]), subject.fixed), "test": Sheet(labelled(*ROWS["test"]), other)}


def alone(subject, sheet, direction, factor, pixels):
    """The edited model's logits, from the classifier itself."""
    edited = jax.tree.map(lambda w, d: np.asarray(w) - np.float32(factor) * np.asarray(d), subject.trained, direction)
    model = dataclasses.replace(subject.model, params=edited, statistics=sheet.fixed["statistics"])
    return np.asarray(model.logits((pixels / 255 - np.array(model.mean)) / np.array(model.std)))


@pytest.mark.parametrize("one_program", [True, False, None])
def test_every_point_is_the_edited_model_by_itself(subject, directions, sheets, one_program):
    found = sweep(subject.net, subject.trained, directions, LAMBDAS, sheets, one_program=one_program, batch=BATCH)
    assert found.keys() == sheets.keys()
    for name, (pixels, labels) in ROWS.items():
        assert found[name].correct.shape == found[name].confidence.shape == (2, 3, len(labels))
        assert found[name].confidence.dtype == np.float32
        for d, direction in enumerate(directions):
            for k, factor in enumerate(LAMBDAS):
                logits = alone(subject, sheets[name], direction, factor, pixels)
                expected = forgetting.confidence(logits, labels)
                np.testing.assert_allclose(found[name].confidence[d, k], expected, rtol=1e-4, atol=1e-6)
                assert found[name].accuracy()[d, k] == pytest.approx(forgetting.accuracy(logits, labels), rel=1e-6)
    assert np.ptp(found["forget"].accuracy()) > 5  # the points differ
    assert np.ptp(found["forget"].confidence[0], axis=0).min() > 1e-4


@pytest.mark.parametrize("one_program", [True, False])
def test_lambda_zero_is_the_start(subject, directions, sheets, one_program):
    found = sweep(subject.net, subject.trained, directions, LAMBDAS, sheets, one_program=one_program, batch=BATCH)
    for name, sheet in sheets.items():
        for batch in (BATCH, 500):
            start = score(subject.net, subject.trained, sheet, batch)
            for d in range(2):
                np.testing.assert_array_equal(found[name].correct[d, 0], start.correct)
                np.testing.assert_allclose(found[name].confidence[d, 0], start.confidence, rtol=1e-6)


def bits(tree):
    return jax.tree.map(lambda x: np.asarray(x).view(np.uint32), tree)


@pytest.mark.parametrize("compiled", [False, True])
def test_lambda_zero_gives_the_start_and_what_is_untouched_stays_bit_for_bit(subject, directions, compiled):
    """-0 stays -0 as well."""
    start = jax.tree.map(lambda x: x.ravel().at[::3].set(-0.0).reshape(x.shape), subject.trained)
    sparse = jax.tree.map(lambda x: jnp.where(jnp.arange(x.size).reshape(x.shape) % 2 == 0, x, -0.0), directions[0])
    run = jax.jit(edit) if compiled else edit
    jax.tree.map(np.testing.assert_array_equal, bits(run(start, directions[0], 0.0)), bits(start))
    for factor in (0.05, 0.7, 1.0, -2.0):
        after = run(start, sparse, factor)
        for a, b, change in zip(*map(jax.tree.leaves, (after, start, sparse)), strict=True):
            a, b, same = np.asarray(a), np.asarray(b), np.asarray(change) == 0
            np.testing.assert_array_equal(a[same].view(np.uint32), b[same].view(np.uint32))
            np.testing.assert_allclose(a, b - np.float32(factor) * np.asarray(change), rtol=1e-6, atol=1e-7)
            assert (a[~same] != b[~same]).all()


def test_statistics_of_fewer_rows_than_a_batch(subject, sheets):
    """They are one batch; and whatever was known before is not looked at."""
    pixels, _ = ROWS["test"]
    found = re_estimated(subject.net, subject.trained, sheets["test"])["statistics"]["embedder"]["normalization"]
    images = (pixels / 255 - np.array(subject.net.mean)) / np.array(subject.net.std)
    kernel = subject.trained["embedder"]["convolution"]["weight"]
    out = jax.lax.conv_general_dilated(
        jnp.asarray(images, jnp.float32), kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "OIHW", "NHWC")
    )
    np.testing.assert_allclose(found["running_mean"], np.mean(out, axis=(0, 1, 2)), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found["running_var"], np.var(out, axis=(0, 1, 2), ddof=1), rtol=1e-4)


def test_what_cannot_be_scored_is_refused(subject, directions, sheets):
    none = Sheet(labelled(*rows_of(0)), subject.fixed)
    linear = subject.linearised()
    for call, words in (
        (lambda: score(subject.net, subject.trained, none), "no rows to score"),
        (lambda: sweep(subject.net, subject.trained, [], LAMBDAS, sheets), "at least one direction and one lambda"),
        (lambda: sweep(subject.net, subject.trained, directions, [], sheets), "at least one direction and one lambda"),
        (lambda: re_estimated(subject.net, subject.trained, none), "there are no rows"),
        (lambda: re_estimated(linear.net, linear.trained, Sheet(sheets["test"].data, linear.fixed)), "linearised"),
        (lambda: re_estimated(subject.net, subject.trained, Sheet(none.data, {"head": 0})), "only models with Batch"),
    ):
        with pytest.raises(UserError, match=words):
            call()
