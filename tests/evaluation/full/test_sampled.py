"""leak@k against enumeration, and on a model that knows its rows."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unlearnjax.data.bpe import train_tokenizer
from unlearnjax.data.rows import Row
from unlearnjax.errors import UserError
from unlearnjax.evaluation.full.sampled import (
    bootstrap_mean,
    draw_scores,
    expected_maximum,
    leak_at,
    sampled_leak,
    spread,
)
from unlearnjax.models.abstract import init_params
from unlearnjax.models.config import ModelConfig
from unlearnjax.models.decoder import build

ROWS = [Row("a1sc1", "Once", " upon a time", "Task1"), Row("a1qa0", "Who?", "Ann", "Task1")]


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_the_estimate_is_the_mean_maximum_of_all_subsets(k):
    scores = [0.5, 0.0, 1.0, 0.25, 0.5]
    every = [max(some) for some in itertools.combinations(scores, k)]
    assert expected_maximum(scores, k) == pytest.approx(sum(every) / len(every), abs=1e-12)


def test_more_draws_than_there_are_cannot_be_estimated():
    with pytest.raises(ValueError, match="3 draws cannot be estimated from 2"):
        expected_maximum([0.0, 1.0], 3)


def test_scores_and_curve_by_hand():
    texts = ["upon a hill", " upon a time", "nothing", "", "Ann", "Bob", "ann", "It is Ann"]
    scores = draw_scores(ROWS, texts, 4)
    np.testing.assert_allclose(scores, [[2 / 3, 1, 0, 0], [1, 0, 1, 0]])  # exact match lower-cases both sides
    found = leak_at(ROWS, scores, ks=(1, 2, 4, 16))
    # k = 2 of 4: the six pairs' maxima are 1 (3 pairs), 2/3 (2), 0 (1), and 1 in five of six.
    assert [round(p["leak"], 6) for p in found["leak_at"]] == [round(x, 6) for x in ((5 / 12 + 0.5) / 2,
            ((3 + 4 / 3) / 6 + 5 / 6) / 2, 1.0)]  # fmt: skip
    assert [p["k"] for p in found["leak_at"]] == [1, 2, 4]
    assert found["by_kind"]["knowledge"] == pytest.approx([0.5, 5 / 6, 1.0])
    assert found["rows"] == 2 and found["draws"] == 4


def test_the_interval_of_equal_values_is_a_point_and_of_others_covers_the_mean():
    assert bootstrap_mean([0.25] * 9) == (0.25, 0.25)
    low, high = bootstrap_mean([0.0, 1.0] * 50)
    assert 0.39 < low < 0.42 and 0.58 < high < 0.61  # 0.5 -+ 1.96 x 0.05


def test_rows_are_spread_over_tasks_and_kinds():
    rows = [Row(f"{i}{kind}1", "x", "y", task) for task, kind, n in (("A", "sc", 2), ("A", "qa", 9), ("B", "qa", 30))
            for i in range(n)] + [Row("odd", "x", "y", "A")]  # fmt: skip
    chosen = spread(rows, 12)
    assert [(r.task, r.id[-3:-1]) for r in chosen] == [("A", "sc")] * 2 + [("A", "qa")] * 5 + [("B", "qa")] * 5
    assert spread(rows, 1000) == rows[:-1]


def test_the_model_is_asked_and_a_draw_is_scored():
    """Against an adapter that makes one token certain: `Ann` is always answered, the completion never."""
    tokenizer = train_tokenizer([r.input + r.output for r in ROWS] * 2, 300)
    config = ModelConfig("llama", len(tokenizer), 16, 24, 1, 2, 2, 8, "rms", max_positions=32, pad_token_id=0)
    model = build(config)
    params = init_params(model.abstract(jnp.float32), jax.random.key(0))
    (ann,) = tokenizer("Ann")["input_ids"]
    keywords = {"eos_token_ids": (tokenizer.eos_token_id,), "max_new_tokens": 1, "batch_size": 8, "draws": 4}
    # The head's row for the token is the final hidden state's own direction at both prompts, many times over.
    hidden = sum(
        model.forward(params, None, jnp.asarray([tokenizer(r.input)["input_ids"]])).hidden[0, -1] for r in ROWS
    )
    sure = {**params, "head": {"weight": params["head"]["weight"].at[ann].set(1000 * hidden)}}
    (found,) = sampled_leak(model, sure, None, tokenizer, ROWS, **keywords)
    assert found["by_kind"] == {"regurgitation": [0.0, 0.0], "knowledge": [1.0, 1.0]}
    assert [p["leak"] for p in found["leak_at"]] == [0.5, 0.5] and found["draws"] == 4
    with pytest.raises(UserError, match="needs a draw"):
        sampled_leak(model, sure, None, tokenizer, [Row("odd", "x", "y", "A")], **keywords)
