"""What all baselines promise: the data they see, settings that are checked, a subject that stays as it is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unlearnjax.baselines import BASELINES
from unlearnjax.data.labelled import Labelled
from unlearnjax.errors import UserError
from unlearnjax.training.interrupt import Interrupted, Stop

# Settings that tests share, so that they share programs.
SHORT = {"epochs": 1, "batch_size": 20, "flip": 0.0, "crop_padding": 0}
SEES = {
    "retain": {"finetune", "l1_sparse"},
    "forget": {"gradient_ascent", "boundary_shrink", "boundary_expand", "random_label_forget", "salun_forget"},
    "all": {"random_label", "salun", "influence"},
}


def short(name):
    return {key: value for key, value in SHORT.items() if key in BASELINES[name].settings.known()}


def equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_the_table():
    assert {seen: {n for n, b in BASELINES.items() if b.data == seen} for seen in SEES} == SEES
    assert all(set(b.search) <= set(b.settings.known()) for b in BASELINES.values())


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_sees_what_it_may_and_repeats_itself(subject, retain, forget, name):
    before = jax.tree.map(np.array, subject.trained)
    baseline = BASELINES[name]
    found = baseline.run(subject, retain, forget, seed=3, **short(name))
    assert found.diverged_at is None and all(np.isfinite(found.losses))
    assert equal(before, subject.trained) and not equal(found.trained, subject.trained)
    assert jax.tree.map(np.shape, found.trained) == jax.tree.map(np.shape, subject.trained)
    given = {"retain": retain, "forget": forget}
    for side, data in given.items():
        noise = np.random.default_rng(0).integers(256, size=data.pixels.shape, dtype=np.uint8)
        other = {**given, side: Labelled(jnp.asarray(noise), data.labels)}
        again = baseline.run(subject, **other, seed=3, **short(name))
        seen = baseline.data in (side, "all")
        assert equal(found[:2], again[:2]) != seen


def test_bad_arguments_are_refused(subject, retain, forget):
    def refused(name, match, retain=retain, forget=forget, **settings):
        with pytest.raises(UserError, match=match):
            BASELINES[name].run(subject, retain, forget, **{"seed": 0, **settings})

    refused("salun", "salun: unknown setting 'masks'; did you mean 'mask'", masks=0.5)
    refused("finetune", "finetune: unknown setting 'alpha'", alpha=0.5)
    refused("influence", "influence: unknown setting 'learning_rate'", learning_rate=0.5)
    refused("salun", "mask is 0 and must be above 0", mask=0)
    refused("random_label", "order is 'retain first' and must be one of", order="retain first")
    refused("boundary_shrink", "bound is 2", bound=2)
    refused("boundary_shrink", "epochs is 0", epochs=0)
    refused("influence", "alpha is nan", alpha=float("nan"))
    refused("influence", "damping is 0", damping=0)
    refused("l1_sparse", "l1 is -1", l1=-1)
    refused("gradient_ascent", "batch_size is 0", batch_size=0)
    refused("gradient_ascent", "seed is -1", seed=-1)
    refused("finetune", "there are no retain rows", retain=Labelled(*(x[:0] for x in retain)))
    refused("salun", "a forget label is 9; the model has 4", forget=Labelled(forget.pixels, forget.labels * 0 + 9))
    refused("salun", r"retain images are \[8, 8, 3\]", forget=Labelled(forget.pixels[:, :4], forget.labels))


@pytest.mark.parametrize("name", ["influence", "salun", "finetune"])
def test_stop_is_heard(subject, retain, forget, name):
    with pytest.raises(Interrupted):
        BASELINES[name].run(subject, retain, forget, seed=0, stop=Stop(signum=15), **short(name))
