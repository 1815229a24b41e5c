import numpy as np
import pytest

from unlearnjax.errors import UserError
from unlearnjax.tracing.effects import doubt, effects, recommend
from unlearnjax.tracing.trace import Traced, traced

TOKENS, LAYERS = 8, 6


def made(subject="Ann", begin=2, end=5, corrupted=0.1, scores=None, count=TOKENS):
    scores = np.arange(count * LAYERS, dtype=np.float32).reshape(count, LAYERS) / 100 if scores is None else scores
    return Traced("f", subject, ["t"] * count, begin, end, "x", 0.9, corrupted, {"mlp": scores})


def test_places_are_romes():
    t = made()
    found = effects([t])["kinds"]["mlp"]
    rows = t.restored["mlp"].astype(np.float64) - 0.1
    wanted = {"before the subject": rows[:2].mean(0), "subject's first": rows[2], "subject's middle": rows[3],
              "subject's last": rows[4], "first after": rows[5], "further": rows[6], "last": rows[7]}  # fmt: skip
    for place, row in wanted.items():
        np.testing.assert_allclose(found[place]["mean"], row, atol=1e-6)
    np.testing.assert_allclose(effects([t])["total"]["mean"], 0.8)


def test_sha256_shows_raw_scores_at_the_places_its_code_takes():
    t = made()
    found = effects([t], "sha256")["kinds"]["mlp"]
    rows = t.restored["mlp"]
    np.testing.assert_allclose(found["subject's last"]["mean"], rows[2], atol=1e-6)
    np.testing.assert_allclose(found["subject's middle"]["mean"], rows[3:5].mean(0), atol=1e-6)
    np.testing.assert_allclose(found["first after"]["mean"], rows[6], atol=1e-6)


def test_a_place_that_no_fact_has():
    found = effects([made(begin=0, end=1, count=1)])["kinds"]["mlp"]
    assert found["before the subject"] == {"mean": [], "low": [], "high": [], "facts": 0}
    assert found["first after"]["facts"] == 0
    assert found["subject's last"]["facts"] == found["last"]["facts"] == 1


def test_intervals_draw_subjects_not_facts():
    """Ten facts about one subject and their copies say no more than one about it."""
    scores = [np.full((TOKENS, LAYERS), x, np.float32) for x in (0.2, 0.4, 0.6)]
    once = [made(s, scores=x) for s, x in zip("abc", scores, strict=True)]
    many = [t for t in once for _ in range(10)]
    a, b = (effects(x)["kinds"]["mlp"]["last"] for x in (once, many))
    np.testing.assert_allclose([*a["low"], *a["high"]], [*b["low"], *b["high"]], atol=1e-9)
    assert a["low"][0] < a["mean"][0] < a["high"][0]


def test_the_recommended_layers_hold_the_most():
    scores = np.full((TOKENS, LAYERS), 0.1, np.float32)
    scores[4, 2:4] += [0.3, 0.2]  # the subject's last token
    scores[7, 5] = 0.9  # elsewhere: does not count
    best = recommend([made(scores=scores), made("Bob", scores=scores)], "mlp", 2)
    assert best["layers"] == [2, 3] and best["stability"] == 1.0
    assert best["share"] == pytest.approx(1.0, abs=1e-5)
    assert recommend([made(scores=scores)], "mlp", 6)["layers"] == [0, 5]
    with pytest.raises(UserError, match="range of 7 layers in a model with 6"):
        recommend([made()], "mlp", 7)
    with pytest.raises(UserError, match="attention was not traced"):
        recommend([made()], "attention", 2)
    with pytest.raises(UserError, match="no fact is left"):
        recommend([], "mlp", 2)
    with pytest.raises(UserError, match="no fact is left"):
        effects([])


def test_what_speaks_against_a_recommendation():
    some = np.full((TOKENS, LAYERS), 0.1, np.float32)
    none = some / 2
    some[4, 2] += 0.3

    def of(*traces):
        best = recommend(traces, "mlp", 2)
        return best, doubt(effects(traces), best)

    best, against = of(made("a", scores=none), made("b", scores=none))
    assert best["layers"] == [0, 1] and best["share"] == 0 and "merely the least bad" in against
    mixed = np.full((TOKENS, LAYERS), -0.4, np.float32)
    mixed[4, 2] = 0.3  # beside layers that do harm: no range of two gives anything back
    assert "merely the least bad" in of(made("a", scores=mixed), made("b", scores=mixed))[1]
    best, against = of(made(scores=some))
    assert best["stability"] is None and "about one subject" in against
    found = effects([made(scores=some)])
    assert set(found["total"]) == {"mean"} and found["kinds"]["mlp"]["last"]["low"] == []
    harmless = [made(name, corrupted=p, scores=some + 1) for name, p in (("a", 0.95), ("b", 0.8))]
    assert "does not reliably lower" in of(*harmless)[1]
    assert of(made("a", scores=some), made("b", scores=some))[1] is None


def test_traces_read_back_as_they_were():
    t = made()
    back = traced(t.plain())
    np.testing.assert_array_equal(back.restored["mlp"], t.restored["mlp"])
    assert back._replace(restored={}) == t._replace(restored={})
