"""Model cards as the hub reads them."""

import pytest
import yaml

from unlearnjax.io.card import LIMITS, model_card

RECIPE = {"name": "default", "candidates": [{"learning_rate": 1e-4}], "note": "ends: ``` and\n```yaml"}


def split(text):
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


def test_everything_is_said():
    front, body = split(
        model_card(
            title="out: a #model", base_model="org/base", merge=True, method="TIES in space delta.",
            forget="forget.jsonl (254 rows, sha256 0f3a)", retain="retain.jsonl (278 rows, sha256 77aa)",
            scores="| model | aggregate |\n|---|---|\n| merged | 0.9 |", recipe=RECIPE,
        )
    )  # fmt: skip
    assert front == {
        "base_model": ["org/base"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["unlearnjax", "machine-unlearning", "merge"],
    }
    for part in ("# out: a #model", "TIES in space", "sha256 0f3a", "sha256 77aa", "| merged | 0.9 |", *LIMITS):
        assert part in body
    fenced = body.split("````````yaml\n")[1].split("\n````````")[0]
    assert yaml.safe_load(fenced) == RECIPE


@pytest.mark.parametrize("base", ["a: b # c", "/folder/with space", "- x", "名前/モデル"])
def test_any_name_survives_the_front_matter(base):
    front, _ = split(model_card(title="x", base_model=[base, "other"], library="peft"))
    assert front["base_model"] == [base, "other"] and front["library_name"] == "peft"
    assert "merge" not in front["tags"] and "lora" in front["tags"]


def test_what_is_unknown_is_left_out():
    _, body = split(model_card(title="x", base_model="y"))
    assert not any(heading in body for heading in ("## Method", "## Data", "## Scores", "## Recipe"))
