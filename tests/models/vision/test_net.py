"""What is edited of an image model, and its tangent space: against derivatives taken by hand (torch's are in
tests/parity/test_image_training.py)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unlearnjax.data.labelled import labelled
from unlearnjax.errors import UserError
from unlearnjax.evaluation.images import edit
from unlearnjax.models.vision.classifier import load_classifier, new_classifier, save_classifier
from unlearnjax.models.vision.clip import CLIPConfig, Tower
from unlearnjax.models.vision.clip_model import ClipModel, abstract
from unlearnjax.models.vision.net import classifier_subject, clip_subject
from unlearnjax.models.vision.resnet import ResNetConfig
from unlearnjax.training.images.fine_tune import fine_tune
from unlearnjax.training.images.settings import ImageCandidate

RNG = np.random.default_rng(0)
PIXELS = jnp.asarray(RNG.integers(0, 256, (6, 8, 8, 3)), jnp.uint8)
LABELS = jnp.asarray([0, 2, 1, 1, 0, 2], jnp.int32)
IMAGES = PIXELS.astype(jnp.float32)


def randomly(tree, scale):
    return jax.tree.map(lambda x: jnp.asarray(scale * RNG.normal(size=x.shape), jnp.float32), tree)


@pytest.fixture(scope="module")
def subject():
    config = ResNetConfig(3, stem="cifar", embedding=4, widths=(8,), depths=(1,))
    model = new_classifier("resnet", config, ("a", "b", "c"), 8, jax.random.key(0))
    params = jax.tree.map(jnp.add, model.params, randomly(model.params, 0.1))
    return classifier_subject(dataclasses.replace(model, params=params, mean=(0.5,) * 3, std=(0.25,) * 3))


@pytest.fixture(scope="module")
def direction(subject):
    return randomly(subject.trained, 0.1)


@pytest.fixture(scope="module")
def clip():
    tower = Tower(8, 12, 1, 2, "quick_gelu", 1e-5)
    config = CLIPConfig(tower, tower, 6, 8, 4, 3, 50, 10, 49)
    return ClipModel(randomly(abstract(config), 0.3), config)


def tokens(texts, padding, return_tensors):
    return {"input_ids": np.array([[3 + len(text) % 40, 3 + ord(text[0]) % 40, 49] for text in texts])}


@pytest.fixture(scope="module")
def f(subject):
    return jax.jit(lambda weights: subject.net.logits(weights, subject.fixed, IMAGES)[0])


@pytest.fixture(scope="module")
def tangent(subject):
    linear = subject.linearised()
    return jax.jit(lambda weights: linear.net.logits(weights, linear.fixed, IMAGES)[0])


def moved(subject, direction, factor):
    return jax.tree.map(lambda w, d: w + factor * d, subject.trained, direction)


def test_logits_are_the_models_on_prepared_images(subject, f):
    prepared = (np.asarray(IMAGES) / 255 - 0.5) / 0.25
    np.testing.assert_allclose(f(subject.trained), subject.model.logits(prepared), rtol=1e-5, atol=1e-5)


def test_at_the_start_the_tangent_is_the_model(subject, f, tangent):
    np.testing.assert_allclose(tangent(subject.trained), f(subject.trained), rtol=1e-6, atol=1e-6)


def test_the_tangent_is_linear_in_the_weights_and_the_model_is_not(subject, direction, f, tangent):
    for factor in (-2.5, 0.3, 4.0):
        unit, scaled = moved(subject, direction, 1.0), moved(subject, direction, factor)
        changes = [[g(w) - g(subject.trained) for w in (unit, scaled)] for g in (tangent, f)]
        np.testing.assert_allclose(changes[0][1], factor * changes[0][0], rtol=1e-4, atol=1e-4)
        assert np.abs(changes[1][1] - factor * changes[1][0]).max() > 0.02


def test_the_tangent_is_what_a_small_step_tends_to(subject, direction, f, tangent):
    change = tangent(moved(subject, direction, 1.0)) - tangent(subject.trained)
    difference = [(f(moved(subject, direction, e)) - f(moved(subject, direction, -e))) / (2 * e) for e in (1e-3, 0.5)]
    np.testing.assert_allclose(change, difference[0], rtol=1e-2, atol=1e-2)
    assert np.abs(change - difference[1]).max() > 0.02  # a large one does not do


def test_gradients_in_the_tangent_space_are_the_starts_jacobian_transposed(subject, direction, f, tangent):
    """d loss(f(s) + J d) / d d = J' loss'(f(s) + J d)."""

    def loss(logits):
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), LABELS[:, None], axis=1))

    at = moved(subject, direction, 1.0)
    found = jax.grad(lambda w: loss(tangent(w)))(at)
    (expected,) = jax.vjp(f, subject.trained)[1](jax.grad(loss)(tangent(at)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected)
    elsewhere = jax.vjp(f, at)[1](jax.grad(loss)(tangent(at)))[0]
    gap = jax.tree.map(lambda a, b: np.abs(a - b).max(), found, elsewhere)
    assert max(jax.tree.leaves(gap)) > 0.01


def test_training_in_the_tangent_space_lowers_its_loss(subject):
    candidate = ImageCandidate("a", learning_rate=0.05, epochs=20, schedule="constant")
    linear = subject.linearised()
    (found,) = fine_tune(linear, labelled(np.asarray(PIXELS), np.asarray(LABELS)), [candidate])
    assert found.losses[-1] < 0.8 * found.losses[0]
    jax.tree.map(np.testing.assert_array_equal, found.fixed["start"], subject.trained)  # not trained along
    with pytest.raises(UserError, match="linearised already"):
        linear.linearised()


def test_the_tangent_space_has_batch_statistics_too(subject):
    """Those of the start, and the running ones move towards them."""
    linear = subject.linearised()
    run = jax.jit(lambda s, w, fixed: s.net.logits(w, fixed, IMAGES, True), static_argnums=0)
    (plain, moved_plain), (found, moved_linear) = (run(s, subject.trained, s.fixed) for s in (subject, linear))
    np.testing.assert_allclose(found, plain, rtol=1e-5, atol=1e-5)
    pairs = (moved_linear["statistics"], moved_plain["statistics"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), *pairs)
    assert moved_linear.keys() == linear.fixed.keys()


def test_neither_statistics_nor_counts_of_batches_are_edited(subject, direction, tmp_path):
    """They would drift alike in all fine-tunes, agree in every consensus, and be negated."""
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(subject.trained)[0]]
    assert paths and not any("running" in path or "num_batches" in path for path in paths)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(subject.trained))
    save_classifier(subject.edited(edit(subject.trained, direction, 0.7)), tmp_path / "edited")
    again = load_classifier(tmp_path / "edited")
    jax.tree.map(np.testing.assert_array_equal, again.statistics, subject.model.statistics)
    jax.tree.map(np.testing.assert_array_equal, again.params, edit(subject.trained, direction, 0.7))
    other = jax.tree.map(lambda x: x + 1, subject.model.statistics)
    jax.tree.map(np.testing.assert_array_equal, subject.edited(subject.trained, other).statistics, other)


def test_of_clip_the_image_side_is_edited(clip):
    ours = clip_subject(dataclasses.replace(clip, tokenizer=tokens), ("cat", "dog"))
    edited = ours.edited(jax.tree.map(lambda x: x + 1, ours.trained)).params
    for name, part in clip.params.items():
        shift = 1 if name in ("vision", "visual_projection") else 0
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b + shift), edited[name], part)  # noqa: B023
    trained, whole = ours.weights()
    assert 0 < trained < whole == sum(x.size for x in jax.tree.leaves(clip.params))


@pytest.mark.parametrize(
    ("labels", "templates", "tokenizer", "words"),
    [
        ((), ("a {}",), tokens, "at least one class and one template"),
        (("cat",), (), tokens, "at least one class and one template"),
        (("cat",), ("a {}", "photo"), tokens, "template 'photo' has no {}"),
        (("cat",), ("a {}",), None, "has no tokenizer"),
    ],
)
def test_what_makes_no_head_is_refused(clip, labels, templates, tokenizer, words):
    with pytest.raises(UserError, match=words):
        clip_subject(dataclasses.replace(clip, tokenizer=tokenizer), labels, templates)
