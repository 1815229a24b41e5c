"""Avg. Gap against the papers' own tables, MIA-efficacy on confidences whose answer is known."""

import numpy as np
import pytest

from unlearnjax.errors import UserError
from unlearnjax.evaluation.forgetting import Forgetting, accuracy, average_gap, confidence, mia_efficacy

RETRAINED = Forgetting(100.00, 94.76, 94.26, 12.88)
ROWS = {  # NegMerge's table for CIFAR-10 and ResNet-18, 10% at random: retain, forget, test, MIA, Avg. Gap
    "random label (all data)": (99.67, 92.39, 92.83, 37.36, 7.15),
    "influence": (99.20, 98.93, 93.20, 2.67, 4.06),
    "SalUn (all data)": (99.62, 97.15, 93.93, 14.39, 1.15),
    "fine-tune": (99.88, 99.37, 94.06, 2.70, 3.78),
    "l1-sparse": (97.74, 95.81, 91.59, 9.84, 2.26),
    "gradient ascent": (99.50, 99.31, 94.01, 1.70, 4.12),
    "boundary shrink": (98.29, 98.22, 92.69, 8.96, 2.67),
    "boundary expand": (99.42, 99.41, 93.85, 7.47, 2.76),
    "random label (forget data)": (99.99, 99.98, 95.04, 2.15, 4.19),
    "SalUn (forget data)": (99.88, 99.89, 94.42, 9.51, 2.20),
    "task arithmetic": (98.36, 94.85, 91.49, 10.91, 1.62),
}


@pytest.mark.parametrize("name", ROWS)
def test_average_gap_of_the_papers_rows(name):
    *scores, gap = ROWS[name]
    assert average_gap(Forgetting(*scores), RETRAINED) == pytest.approx(gap, abs=0.0101)


def test_the_retrained_model_has_no_gap():
    assert average_gap(RETRAINED, RETRAINED) == 0


def test_mia_efficacy_is_the_share_taken_for_unseen():
    rng = np.random.default_rng(0)
    retain, test = 0.99 + 0.01 * rng.random(300), 0.3 * rng.random(100)
    retain[100:] = 0.1  # beyond as many as there are of the test set: not looked at
    assert mia_efficacy(retain, test, np.full(50, 0.995)) == 0
    assert mia_efficacy(retain, test, np.full(50, 0.1)) == 100
    assert mia_efficacy(retain, test, np.repeat([0.995, 0.1], [30, 10])) == pytest.approx(25)


@pytest.mark.parametrize(
    ("sets", "words"),
    [(([], [0.1], [0.1]), "retain set is empty"), (([0.9], [0.1], []), "forget set is empty"),
     (([0.9], [0.1, 0.2], [0.1]), "1 retain samples for 2 of the test set")],
)  # fmt: skip
def test_sets_that_do_not_do(sets, words):
    with pytest.raises(UserError, match=words):
        mia_efficacy(*sets)


def test_confidence_and_accuracy():
    logits = np.array([[1000.0, 0.0], [0.0, np.log(3)], [1.0, 1.0]], np.float32)
    np.testing.assert_allclose(confidence(logits, np.array([0, 1, 1])), [1, 0.75, 0.5], rtol=1e-6)
    assert accuracy(logits, np.array([0, 1, 1])) == pytest.approx(200 / 3)
    with pytest.raises(UserError, match="no rows"):
        accuracy(logits[:0], np.array([], np.int64))
