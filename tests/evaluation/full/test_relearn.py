"""Relearning: shares by hand, and an attack on a tiny model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unlearnjax.adapters.lora import lora_weights
from unlearnjax.data.bpe import train_tokenizer
from unlearnjax.data.rows import Row
from unlearnjax.errors import UserError
from unlearnjax.evaluation.full.asked import Asking, knowledge
from unlearnjax.evaluation.full.relearn import Attack, join, original_knowledge, recovery, relearn, split_rows
from unlearnjax.evaluation.protocol import decode
from unlearnjax.models.abstract import init_params
from unlearnjax.models.config import ModelConfig
from unlearnjax.models.decoder import build

pytestmark = pytest.mark.slow

ROWS = [Row(f"d{i}{kind}", f"Where is {name}?", f" in {town}", "Task1")
        for i, (name, town) in enumerate([("Ann", "Rome"), ("Bob", "Oslo"), ("Cy", "Bern"), ("Di", "Lima")])
        for kind in ("sc1", "qa0")]  # fmt: skip
ATTACK = Attack(rows=4, batch=2, steps=(0, 1, 6), learning_rate=2e-2, rank=4)


@pytest.fixture(scope="module")
def tiny():
    tokenizer = train_tokenizer([r.input + r.output for r in ROWS] * 2, 300)
    config = ModelConfig(
        "llama", len(tokenizer), 16, 24, 2, 2, 2, 8, "rms", max_positions=32, pad_token_id=0,
        eos_token_ids=(tokenizer.eos_token_id,),
    )  # fmt: skip
    model = build(config)
    params = init_params(model.abstract(jnp.float32), jax.random.key(0))
    rng = np.random.default_rng(0)
    pair = {"a": rng.normal(size=(2, 2, 3, 16)), "b": rng.normal(size=(2, 2, 24, 3))}
    pair = {k: jnp.asarray(v, jnp.float32).at[0].set(0) for k, v in pair.items()}  # the first candidate is the base
    return model, params, {"layers": {"mlp": {"up": pair}}}, Asking(tokenizer, decode, config.eos_token_ids, 4, 8)


def test_shares_area_and_half_by_hand():
    curve = [{"leak": x, "nll": y} for x, y in ((0.2, 4.0), (0.3, 3.0), (0.6, None), (0.8, 1.0))]
    found = recovery(curve, {"leak": 1.0, "nll": 0.0}, (0, 1, 2, 4))
    assert found["recovery"]["leak"] == pytest.approx([0, 0.125, 0.5, 0.75])
    assert found["recovery"]["nll"] == [0, 0.25, None, 0.75]
    assert found["half"] == 2 and found["area"] == pytest.approx((0.0625 + 0.3125 + 1.25) / 4)
    kept = recovery(curve, {"leak": 0.2, "nll": 0.0}, (0, 1, 2, 4))  # nothing had been forgotten
    assert kept["recovery"]["leak"] is None and kept["area"] is None and kept["half"] is None
    # Nor where more leaks than of the original, or the NLL is the same up to rounding.
    worse = recovery(curve, {"leak": 0.1, "nll": 3.995}, (0, 1, 2, 4))
    assert worse["recovery"] == {"leak": None, "nll": None} and worse["area"] is None and worse["half"] is None


def test_rows_that_are_asked_are_of_other_documents():
    attacked, others = split_rows(ROWS, 4, 100)
    assert [r.id for r in attacked] == ["d1sc1", "d1qa0", "d3sc1", "d3qa0"]
    assert [r.id for r in others] == ["d0sc1", "d0qa0", "d2sc1", "d2qa0"]
    attacked, others = split_rows(ROWS, 100, 3)  # never more than half of the documents
    assert len(attacked) == 4 and len(others) == 3
    with pytest.raises(UserError, match="several documents"):
        split_rows(ROWS[:2], 2, 10)


def test_joined_adapters_add_up(tiny):
    below = jax.tree.map(lambda x: x[1], tiny[2])
    half = {"a": 2 * below["layers"]["mlp"]["up"]["a"][:, :2], "b": below["layers"]["mlp"]["up"]["b"][..., :2]}
    other = {"a": jnp.ones((2, 1, 16)), "b": jnp.ones((2, 16, 1))}
    fresh = {"layers": {"mlp": {"up": half}, "attention": {"q": other}}}
    both = lora_weights(join(below, fresh))["layers"]
    one, two = (lora_weights(tree)["layers"] for tree in (below, fresh))
    np.testing.assert_allclose(
        both["mlp"]["up"]["weight"], one["mlp"]["up"]["weight"] + two["mlp"]["up"]["weight"], atol=1e-5
    )
    np.testing.assert_array_equal(both["attention"]["q"]["weight"], two["attention"]["q"]["weight"])


def test_an_attack_teaches_each_candidate_on_top_of_what_it_is(tiny):
    model, params, lora, asking = tiny
    found = relearn(model, params, lora, ROWS, asking, ATTACK)
    attacked, others = split_rows(ROWS, 4, 32)
    for part, rows in (("attacked", attacked), ("others", others)):
        before = knowledge(model, params, lora, rows, asking)
        assert [f[part]["nll"][0] for f in found] == pytest.approx([b["nll"] for b in before], rel=1e-6)
        assert found[0][part]["recovery"] == {"leak": None, "nll": None}  # the original has forgotten nothing
    for one in found:
        assert one["steps"] == [0, 1, 6] and one["attacked"]["nll"][2] < 0.8 * one["attacked"]["nll"][0]
    # One candidate alone, against the original's scores given, is the same attack.
    goal = [{"leak": 1.0, "nll": 0.5}, {"leak": 1.0, "nll": 0.25}]  # it knows more than the random original does
    (alone,) = relearn(model, params, jax.tree.map(lambda x: x[1:], lora), ROWS, asking, ATTACK, before=goal)
    for part, known in zip(("attacked", "others"), goal):
        nll = found[1][part]["nll"]
        assert alone[part]["nll"] == pytest.approx(nll, rel=1e-4)
        shares = [(x - nll[0]) / (known["nll"] - nll[0]) for x in nll]
        assert alone[part]["recovery"]["nll"] == pytest.approx(shares, abs=1e-3)
    goal = original_knowledge(model, params, ROWS, asking, ATTACK)
    assert [g["nll"] for g in goal] == pytest.approx([found[0][p]["nll"][0] for p in ("attacked", "others")], rel=1e-5)
    # The base weights alone are the candidate whose adapter is zero.
    (base,) = relearn(model, params, None, ROWS, asking, ATTACK)
    assert base["attacked"]["nll"] == pytest.approx(found[0]["attacked"]["nll"], rel=1e-4)


def test_steps_must_rise_from_zero(tiny):
    model, params, lora, asking = tiny
    with pytest.raises(UserError, match="rise from 0"):
        relearn(model, params, lora, ROWS, asking, ATTACK._replace(steps=(1, 2)))
