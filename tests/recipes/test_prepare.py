"""What a recipe's terms ask for is there before anything is computed: other answers, a layer, term parameters."""

import numpy as np
import pytest

from unlearnjax.data.bpe import train_tokenizer
from unlearnjax.data.idk import ANSWERS
from unlearnjax.data.rows import Row
from unlearnjax.errors import UserError
from unlearnjax.models.config import ModelConfig
from unlearnjax.models.decoder import build
from unlearnjax.models.language_model import LanguageModel
from unlearnjax.recipes.parse import recipe_from
from unlearnjax.recipes.prepare import Data, Sources, prepare

FORGET = [Row(f"f{i}qa0", f"Where was person {i} born?", f"Town {i}", "Task1") for i in range(5)]
RETAIN = [Row(f"r{i}qa0", f"Where was neighbour {i} born?", f"City {i}", "Task1") for i in range(4)]


def prepared(objective, training=None, merges=(), forget=FORGET, **candidate):
    tokenizer = train_tokenizer([f"{r.input} {r.output}" for r in FORGET + RETAIN] + list(ANSWERS), 340)
    config = ModelConfig(
        "olmo", len(tokenizer), 32, 48, 4, 4, 4, 8, "layer", max_positions=64,
        eos_token_ids=(tokenizer.eos_token_id,), pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = LanguageModel(None, config, tokenizer, build(config), "base")
    raw = {
        "name": "x", "candidates": [{"objective": objective, "epochs": 1, **candidate}, {"objective": "npo"}],
        "training": training or {}, "merges": merges, "evaluation": {"max_new_tokens": 16},
    }  # fmt: skip
    data = Data(forget, RETAIN, None, None, None)
    (prepared,) = prepare(recipe_from(raw, "x"), model, data, Sources("f.jsonl", "r.jsonl"))
    return prepared, tokenizer


def answers(ready, tokenizer):
    side = ready.sides["idk"]
    rows = [(side.row(i), int(side.answer_start[i])) for i in range(len(side.length))]
    assert all(ids[-1] == tokenizer.eos_token_id for ids, _ in rows)
    return [tokenizer.decode(ids[start:-1]) for ids, start in rows]


def test_other_answers_are_a_side_of_the_run(tmp_path):
    ready, tokenizer = prepared("dpo")
    assert ready.objective.sides == ("forget", "idk", "retain")
    assert set(answers(ready, tokenizer)) <= set(ANSWERS)
    for step in ready.schedule.steps:
        np.testing.assert_array_equal(step.rows["forget"], step.rows["idk"])
    file = tmp_path / "answers.txt"
    file.write_text("No idea.\n")
    ready, tokenizer = prepared("idk", {"idk": str(file)})
    assert answers(ready, tokenizer) == ["No idea."] * 5
    with pytest.raises(UserError, match=r"none\.txt: cannot be read"):
        prepared("idk", {"idk": str(tmp_path / "none.txt")})


def test_a_layer_and_parameters():
    ready, _ = prepared("rmu", parameters={"rmu": {"scale": 5.0}})
    assert ready.objective.layer == 1
    assert ready.hyperparameters.term_parameters["rmu"]["scale"].tolist() == [5.0, 2.0]
    assert prepared("rmu", {"layer": 3})[0].objective.layer == 3
    with pytest.raises(UserError, match="layer 4 of a model with 4; give one from 1 to 3"):
        prepared("rmu", {"layer": 4})
    ready, _ = prepared("pdu", parameters={"bound": {"rate": 0.5}})
    assert ready.hyperparameters.term_parameters["bound"]["rate"].tolist() == [0.5, 1.0]
    with pytest.raises(UserError, match="unknown parameter of bound 'rat'; did you mean 'rate'"):
        prepared("pdu", parameters={"bound": {"rat": 0.5}})


def test_a_search_needs_rows_that_are_scored():
    rows = [row._replace(id=f"row-{i}") for i, row in enumerate(FORGET)]
    prepared("finetune", forget=rows)
    with pytest.raises(UserError, match=r"f\.jsonl: no row is scored.*a merge with scale: search needs some"):
        prepared("finetune", merges=[{"method": "linear", "scale": "search"}], forget=rows)
