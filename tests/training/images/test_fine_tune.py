"""Many fine-tunes of one image model: each is what it would be alone, and comes out while the next ones wait."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unlearnjax.data.labelled import labelled
from unlearnjax.errors import UserError
from unlearnjax.merging import merge, merge_stream
from unlearnjax.models.vision.classifier import new_classifier
from unlearnjax.models.vision.net import classifier_subject
from unlearnjax.models.vision.resnet import ResNetConfig
from unlearnjax.training.images import fine_tune as module
from unlearnjax.training.images.fine_tune import Mapping, batches, fine_tune, shuffled
from unlearnjax.training.images.settings import ImageCandidate
from unlearnjax.training.interrupt import Interrupted, Stop

RNG = np.random.default_rng(0)
PIXELS, LABELS = RNG.integers(0, 256, (10, 8, 8, 3)).astype(np.uint8), RNG.integers(0, 3, 10)
DATA = labelled(PIXELS, LABELS)
PLAIN = ImageCandidate("plain", learning_rate=0.05, epochs=2)
POOL = [
    PLAIN,
    ImageCandidate("augmented", 0.05, 1e-2, epochs=3, flip=0.5, crop_padding=1, schedule="linear", seed=1),
    ImageCandidate("smooth", 0.02, 0.0, epochs=1, momentum=0.5, label_smoothing=0.2, l1=1e-3, max_grad_norm=0.5),
]
UPDATES = [6, 9, 3]  # batches of 4, 4 and 2 rows


@pytest.fixture(scope="module")
def subject():
    config = ResNetConfig(3, stem="cifar", embedding=4, widths=(4,), depths=(1,))
    model = new_classifier("resnet", config, ("a", "b", "c"), 8, jax.random.key(0))
    return classifier_subject(model)


def run(subject, candidates, **options):
    return list(fine_tune(subject, DATA, candidates, **{"batch_size": 4, **options}))


def close(found, expected, tolerance=1e-5):
    """The same losses, weights and statistics."""
    np.testing.assert_allclose(found.losses, expected.losses, rtol=tolerance, atol=tolerance)
    assert found.candidate == expected.candidate and found.diverged_at == expected.diverged_at
    for ours, theirs in ((found.trained, expected.trained), (found.fixed, expected.fixed)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), ours, theirs)


def bits(tree):
    return jax.tree.map(lambda x: np.asarray(x).view(np.uint32), tree)


def equal(found, expected):
    jax.tree.map(np.testing.assert_array_equal, bits(found), bits(expected))


@pytest.fixture(scope="module")
def alone(subject):
    return [run(subject, [candidate], batch_norm="batch")[0] for candidate in POOL]


@pytest.mark.parametrize(
    "mapping",
    [Mapping(3, "vmap", 1), Mapping(2, "vmap", 4), Mapping(1, "unroll", 3)],
    ids=lambda m: f"{m.size} {m.kind} {m.steps}",
)
def test_a_candidate_among_others_equals_itself_alone(subject, alone, mapping):
    """In groups of any size, with several updates a program; they end at different times, and only one is augmented."""
    found = run(subject, POOL, batch_norm="batch", mapping=mapping)
    assert [len(one.losses) for one in found] == UPDATES
    for one, expected in zip(found, alone, strict=True):
        close(one, expected)


def test_the_settings_and_the_seed_matter(subject, alone):
    """Otherwise the comparison above would show little."""
    for change in ({"seed": 7}, {"momentum": 0.0}, {"weight_decay": 0.1}, {"flip": 1.0}, {"l1": 1e-3}, {"epochs": 3}):
        (other,) = run(subject, [dataclasses.replace(PLAIN, **change)], batch_norm="batch")
        gap = jax.tree.map(lambda a, b: np.abs(a - b).max(), other.trained, alone[0].trained)
        assert max(jax.tree.leaves(gap)) > 1e-4, change


def test_training_lowers_the_loss_and_ascending_raises_it(subject):
    longer = dataclasses.replace(PLAIN, epochs=8)
    down, up = run(subject, [longer, dataclasses.replace(longer, ascend=True, learning_rate=0.01)])
    assert np.mean(down.losses[-3:]) < 0.9 * np.mean(down.losses[:3])
    assert np.mean(up.losses[-3:]) > 1.1 * np.mean(up.losses[:3])
    equal(down.fixed, subject.fixed)  # frozen statistics


def test_each_epoch_takes_every_row_once_in_an_order_of_its_own():
    found = list(batches(POOL[1], shuffled(10), 4))
    assert len(found) == 9 and all(rows.shape == weight.shape == (4,) for rows, weight in found)
    epochs = [np.concatenate([rows[weight > 0] for rows, weight in found[i : i + 3]]) for i in (0, 3, 6)]
    assert all(sorted(rows) == list(range(10)) for rows in epochs)
    assert not np.array_equal(epochs[0], epochs[1])
    rows, weight = found[2]
    assert weight.tolist() == [1, 1, 0, 0] and rows[2:].tolist() == epochs[0][:2].tolist()
    longer = batches(dataclasses.replace(POOL[1], epochs=4, learning_rate=1.0), shuffled(10), 4)
    for (a, b), (c, d) in zip(found, longer):  # other settings do not change it
        np.testing.assert_array_equal([a, b], [c, d])
    (rows, weight), *_ = batches(PLAIN, shuffled(2), 5)
    assert sorted(rows[:2]) == [0, 1] and weight.tolist() == [1, 1, 0, 0, 0] and set(rows) == {0, 1}


@pytest.mark.parametrize("method", ["consensus", "uniform"])
def test_streamed_into_a_merge_equals_the_merge_of_all(subject, method):
    pool = [dataclasses.replace(PLAIN, seed=seed, epochs=1 + seed % 2) for seed in range(3)]
    tuned = run(subject, pool)
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *(one.delta(subject.trained) for one in tuned))
    stream = fine_tune(subject, DATA, pool, batch_size=4)
    found = merge_stream((one.delta(subject.trained) for one in stream), method)
    expected = merge(stacked, method)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8), found, expected)
    kept = np.concatenate([np.ravel(x) != 0 for x in jax.tree.leaves(found)]).mean()
    assert 0.1 < kept < 0.9 if method == "consensus" else kept > 0.9


def test_a_group_is_trained_when_it_is_asked_for(subject, monkeypatch):
    calls = []

    def trained(task, data, fixed, states, work, settings, masks):
        calls.append(1)
        return states, np.zeros(work.rows.shape[:2], np.float32)

    monkeypatch.setattr(module, "run_steps", trained)
    stream = fine_tune(subject, DATA, POOL, batch_size=4, mapping=Mapping(2, "unroll", 1))
    assert not calls
    seen = [(one.candidate.name, len(calls)) for one in stream]
    assert seen == [("plain", 9), ("augmented", 9), ("smooth", 12)]


ABSURD = dataclasses.replace(PLAIN, name="absurd", learning_rate=1e15)
BEYOND = dataclasses.replace(PLAIN, name="beyond", learning_rate=1e37, l1=1e3)  # its first step is no float32


@pytest.mark.parametrize(("wild", "taken"), [(ABSURD, None), (BEYOND, 0)], ids=["absurd", "beyond"])
@pytest.mark.parametrize("mapping", [Mapping(2, "vmap", 4), Mapping(2, "unroll", 1)], ids=["vmap", "unroll"])
def test_a_diverging_neighbour_is_frozen_and_reported_and_changes_nothing(subject, wild, taken, mapping):
    mad, sane = run(subject, [wild, PLAIN], mapping=mapping)
    close(sane, run(subject, [PLAIN])[0])
    assert sane.diverged_at is None
    assert mad.diverged_at is not None and mad.diverged_at < 6 and taken in (None, mad.diverged_at)
    assert len(mad.losses) == mad.diverged_at and np.isfinite(mad.losses).all()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((mad.trained, mad.fixed)))
    if taken == 0:
        equal(mad.trained, subject.trained)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_masked_weights_stay_bit_for_bit(subject, optimizer):
    """Also from weight decay, momentum and l1. Each candidate has a mask of its own; one of ones changes nothing."""
    draw = lambda x: jnp.asarray(RNG.integers(0, 2, x.shape), jnp.float32)  # noqa: E731
    masks = [jax.tree.map(draw, subject.trained), jax.tree.map(jnp.ones_like, subject.trained)]
    candidate = dataclasses.replace(PLAIN, weight_decay=0.1, l1=1e-3, learning_rate=0.01)
    masked, whole = run(subject, [candidate] * 2, optimizer=optimizer, masks=masks, mapping=Mapping(2, "vmap", 1))
    for after, before, mask in zip(*map(jax.tree.leaves, (masked.trained, subject.trained, masks[0])), strict=True):
        kept = np.asarray(mask) == 0
        np.testing.assert_array_equal(after[kept].view(np.uint32), np.asarray(before)[kept].view(np.uint32))
        assert (after[~kept] != np.asarray(before)[~kept]).all()
    if optimizer == "sgd":
        close(whole, run(subject, [candidate])[0])


NAN, INF = float("nan"), float("inf")
BAD = {
    "learning_rate": (0.0, -0.1, NAN, INF), "weight_decay": (-1e-4, NAN, INF), "epochs": (0, -1),
    "momentum": (-0.1, 1.0, NAN), "schedule": ("cosin",), "warmup_updates": (-1,), "max_grad_norm": (0.0, -1.0, NAN),
    "label_smoothing": (-0.1, 1.0, NAN), "flip": (-0.1, 1.1, NAN), "crop_padding": (-1, 65),
    "magnitude": (-1.0, 10.5, NAN), "operations": (-1, 4), "l1": (-1e-5, NAN, INF), "seed": (-1, 2**31),
}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_settings_out_of_range_are_named(subject, name, value):
    odd = dataclasses.replace(PLAIN, name="odd", **{name: value})
    with pytest.raises(UserError, match=f"fine_tune: candidate odd: {name} is .* and must be "):
        run(subject, [PLAIN, odd])


def test_every_setting_has_a_range():
    fields = {field.name for field in dataclasses.fields(ImageCandidate)}
    assert fields == {*BAD, "name", "ascend"}


EMPTY = labelled(PIXELS[:0], LABELS[:0])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"candidates": []}, "there are no candidates"),
        ({"optimizer": "adam"}, "optimizer is 'adam'; valid: sgd, adamw"),
        ({"batch_norm": "eval"}, "batch_norm is 'eval'; valid: frozen, batch"),
        ({"mapping": Mapping(1, "loop", 1)}, "mapping is 'loop'; valid: vmap, unroll"),
        ({"mapping": Mapping(0, "vmap", 1)}, "must be 1 or more"),
        ({"mapping": Mapping(1, "vmap", 0)}, "must be 1 or more"),
        ({"batch_size": 0}, "batch_size, and a mapping's size and steps, must be 1 or more"),
        ({"data": EMPTY}, "there are no rows to train on"),
        ({"data": labelled(PIXELS, LABELS + 1)}, "a label is 3, and the model has 3 classes"),
        ({"data": labelled(PIXELS, LABELS - 1)}, "a label is -1, and the model has 3 classes"),
        ({"masks": [{}, {}]}, "2 masks for 1 candidates"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_cannot_be_trained_is_refused(subject, change, words):
    options = {"data": DATA, "candidates": [PLAIN], **change}
    with pytest.raises(UserError, match=words):
        next(fine_tune(subject, options.pop("data"), options.pop("candidates"), **options))


def test_a_stop_interrupts_between_two_programs(subject):
    stop = Stop()
    stream = fine_tune(subject, DATA, [PLAIN] * 3, batch_size=4, stop=stop)
    next(stream)
    assert stop.polled
    stop.signum = 15
    with pytest.raises(Interrupted, match="after 1 of 3 candidates") as error:
        next(stream)
    assert error.value.signum == 15 and not stop.polled


def test_a_stop_without_a_signal_changes_nothing_and_is_given_back(subject):
    stop = Stop()
    close(run(subject, [PLAIN], stop=stop)[0], run(subject, [PLAIN])[0], tolerance=0)
    assert not stop.polled
    stream = fine_tune(subject, DATA, [PLAIN] * 2, batch_size=4, stop=stop)
    next(stream)
    stream.close()
    assert not stop.polled
