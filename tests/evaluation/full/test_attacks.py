"""Membership attacks against the published formulas in numpy and torch, and scikit-learn's ROC curve."""

import json
import zlib

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from unlearnjax import load_model
from unlearnjax.data.bpe import train_tokenizer
from unlearnjax.data.rows import Document
from unlearnjax.errors import UserError
from unlearnjax.evaluation.full import attacks
from unlearnjax.evaluation.full.attacks import Losses, document_losses, membership_attacks, signals, tpr_at_fpr
from unlearnjax.evaluation.full.token_stats import TokenStats

metrics = pytest.importorskip("sklearn.metrics")

MEMBERS = [Document(f"m{i}", f"Ada {'of Lyon ' * i}wrote letter {i * 37} in {1900 + i}") for i in range(6)]
NONMEMBERS = [Document(f"n{i}", f"Bo {'by the sea ' * i}once read book {i * 53} of 1944") for i in range(5)]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    tokenizer = train_tokenizer([d.document for d in MEMBERS + NONMEMBERS] * 2, 300)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=128, initializer_range=0.6, bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        model = LlamaForCausalLM(config).eval()
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, load_model(folder)


@torch.no_grad()
def published(model, tokenizer, text):
    """Scores of the published min-k%++ code (high: member), in float64."""
    ids = torch.tensor(tokenizer([text])["input_ids"])
    loss = model(ids, labels=ids).loss.double()
    log_p = torch.log_softmax(model(ids).logits[0, :-1].double(), dim=-1)
    token = log_p.gather(-1, ids[0, 1:, None]).squeeze(-1)
    mu = (log_p.exp() * log_p).sum(-1)
    sigma = (log_p.exp() * log_p.square()).sum(-1) - mu.square()
    count = int(len(token) * 0.2)
    return {
        "loss": -loss,
        "zlib_mean": -loss / len(zlib.compress(bytes(text, "utf-8"))),
        "min_k": np.mean(np.sort(token.numpy())[:count]),
        "min_k_plus_plus": np.mean(np.sort(((token - mu) / sigma.sqrt()).numpy())[:count]),
    }


def test_the_suite_equals_published_code_and_sklearn(models):
    model, lm = models
    documents = [*MEMBERS, *NONMEMBERS]
    theirs = [published(model, lm.tokenizer, d.document) for d in documents]
    labels = [1] * len(MEMBERS) + [0] * len(NONMEMBERS)
    rng = np.random.default_rng(0)
    reference = Losses(rng.normal(5, 1, len(MEMBERS)), rng.normal(5, 1, len(NONMEMBERS)))
    arguments = (lm.model, lm.params, None, lm.tokenizer, MEMBERS, NONMEMBERS)
    (found,) = membership_attacks(*arguments, batch_size=4, reference=reference, resamples=50)
    assert (found["members"], found["nonmembers"]) == (6, 5)
    (losses,) = document_losses(*arguments, batch_size=4)
    np.testing.assert_allclose(np.concatenate(losses), [-float(x["loss"]) for x in theirs], rtol=1e-4)
    theirs = [
        {**x, "reference": x["loss"] + r}
        for x, r in zip(theirs, np.concatenate([reference.members, reference.nonmembers]))
    ]
    areas = set()
    for name in theirs[0]:
        scores = [float(x[name]) for x in theirs]
        assert np.diff(np.sort(scores)).min() > 1e-6  # no ties that rounding could turn
        area = metrics.roc_auc_score(labels, scores)
        wrong, right, _ = metrics.roc_curve(labels, scores, drop_intermediate=False)
        result = found["attacks"][name]
        assert result["auc"] == pytest.approx(area, abs=1e-12)
        assert result["distance"] == pytest.approx(abs(area - 0.5))
        assert result["interval"][0] <= area <= result["interval"][1]
        for rate in (1, 5):
            assert result[f"tpr_at_fpr_{rate}"] == max(right[wrong <= rate / 100])
        areas.add(area)
    assert len(areas) >= 3
    strongest = max(found["attacks"], key=lambda name: found["attacks"][name]["distance"])
    assert found["largest_distance"] == found["attacks"][strongest]["distance"]
    assert all(result["auc_minus_gold"] is None for result in found["attacks"].values())
    (again,) = membership_attacks(*arguments, batch_size=4, gold=found, resamples=50)
    assert again["attacks"]["reference"] is None
    assert again["attacks"]["loss"] == {**found["attacks"]["loss"], "auc_minus_gold": 0.0}
    json.dumps(again, allow_nan=False)


def test_signals_by_hand():
    log_p = np.array([-1.0, -2.0, -6.0, -1.0, -4.0, -1.0, -1.0, -1.0, -1.0, -2.0, -0.5], np.float32)
    mean, variance = np.full(11, -2.0, np.float32), np.full(11, 4.0, np.float32)
    variance[0] = 0.0  # the model is certain: (-1 + 2) / .001, and not a division by zero
    found = signals(TokenStats(log_p, mean, variance), "aaaaaaaa", 1.25)
    size = len(zlib.compress(b"aaaaaaaa"))
    assert found == pytest.approx(
        {
            "loss": 20.5 / 11,
            "zlib": 20.5 / size,
            "zlib_mean": 20.5 / 11 / size,
            "min_k": 5.0,  # int(.2 * 11) = 2 tokens: 6 and 4
            "min_k_plus_plus": 1.5,  # (-6 + 2) / 2 and (-4 + 2) / 2
            "reference": 20.5 / 11 - 1.25,
        }
    )
    single = signals(TokenStats(log_p[1:3], mean[1:3], variance[1:3]), "a")
    assert single["min_k"] == 6.0 and "reference" not in single


@pytest.mark.parametrize("decimals", [1, 9])
@pytest.mark.parametrize("sizes", [(3, 2), (50, 20), (40, 100), (150, 250)])
def test_true_positive_rates_equal_sklearn(decimals, sizes):
    draw = np.random.default_rng(sizes[0] + decimals)
    members, nonmembers = (np.round(draw.normal(c, 1, n), decimals) for c, n in zip((-1.5, 0), sizes))
    labels = [1] * sizes[0] + [0] * sizes[1]
    wrong, right, _ = metrics.roc_curve(labels, -np.concatenate([members, nonmembers]), drop_intermediate=False)
    for rate in (0.0, 0.01, 0.05, 0.5, 1.0):
        assert tpr_at_fpr(members, nonmembers, rate) == max(right[wrong <= rate])
    if sizes == (150, 250):
        assert 0.1 < tpr_at_fpr(members, nonmembers, 0.01) < tpr_at_fpr(members, nonmembers, 0.05) < 1


def test_an_over_unlearned_model_is_caught_from_the_other_side():
    found = attacks.attack([5.0, 6.0, 7.0, 2.0], [1.0, 2.5, 3.0], {"auc": 0.5}, resamples=20)
    assert found is not None
    assert found["auc"] == pytest.approx(2 / 12) and found["auc_minus_gold"] == pytest.approx(-1 / 3)
    assert found["distance"] == pytest.approx(1 / 3)
    assert (found["tpr_at_fpr_1"], found["reversed_tpr_at_fpr_1"]) == (0.0, 0.75)
    assert attacks.attack([1.0, float("inf")], [2.0]) is None


def test_errors(models):
    _, lm = models
    arguments = (lm.model, lm.params, None, lm.tokenizer)
    with pytest.raises(UserError, match="there are no non-members"):
        membership_attacks(*arguments, MEMBERS, [], batch_size=4)
    with pytest.raises(UserError, match="nonmember document 'x': a single token"):
        membership_attacks(*arguments, MEMBERS, [Document("x", "a")], batch_size=4)
    with pytest.raises(UserError, match="reference has losses of 1 members and 5 non-members, for 6 and 5"):
        membership_attacks(*arguments, MEMBERS, NONMEMBERS, batch_size=4, reference=Losses(np.ones(1), np.ones(5)))


def test_a_model_of_numbers_that_are_not_finite_has_no_result():
    stats = [TokenStats(*np.full((3, 4), np.nan, np.float32))] + [TokenStats(*np.ones((3, 4), np.float32))] * 2
    found = attacks.suite(stats, MEMBERS[:1], NONMEMBERS[:2], gold={"attacks": {"loss": None}}, resamples=5)
    assert set(found["attacks"]) == set(attacks.ATTACKS) and not any(found["attacks"].values())
    assert (found["members"], found["nonmembers"], found["strongest"], found["largest_distance"]) == (1, 2, None, None)
