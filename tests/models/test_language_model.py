"""load_model and save_model as a user meets them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unlearnjax import UserError, load_model, save_model
from unlearnjax.data.bpe import train_tokenizer
from unlearnjax.io.huggingface import save_folder
from unlearnjax.models.abstract import abstract_params, init_params
from unlearnjax.models.config import ModelConfig

CONFIG = ModelConfig(
    family="olmo", vocab_size=280, hidden_size=16, intermediate_size=24, layers=2, heads=2, kv_heads=2, head_dim=8,
    norm="layer", max_positions=12, eos_token_ids=(279,), pad_token_id=0,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "model"
    params = init_params(abstract_params(CONFIG), jax.random.key(0))
    save_folder(params, CONFIG, path, train_tokenizer(["some words to learn"], 280))
    return path


def test_what_load_model_returns(folder):
    model = load_model(str(folder))
    assert model.config == CONFIG and model.source == str(folder)
    assert "params" not in repr(model)
    ids = np.asarray([model.tokenizer("some words")["input_ids"]])
    logits = model.logits(ids)
    assert isinstance(logits, jax.Array) and logits.shape == (1, ids.shape[1], 280) and logits.dtype == jnp.float32
    assert model.logits(ids.tolist()).shape == logits.shape
    np.testing.assert_array_equal(model.logits(jnp.asarray(ids, jnp.int32), jnp.ones(ids.shape, jnp.int32)), logits)
    narrow = load_model(folder, dtype="bfloat16")
    assert narrow.params["embed"]["weight"].dtype == jnp.bfloat16 and narrow.logits(ids).dtype == jnp.float32


def test_save_and_load_again(folder, tmp_path):
    model = load_model(folder)
    save_model(model, tmp_path / "again")
    again = load_model(tmp_path / "again")
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
    assert again.config == model.config
    card = (tmp_path / "again" / "README.md").read_text()
    assert str(folder) in card and "unlearnjax" in card
    with pytest.raises(UserError, match="already exists and is not empty"):
        save_model(model, tmp_path / "again")


def test_text_needs_a_tokenizer(folder, tmp_path):
    model = load_model(folder)
    assert model.require_tokenizer() is model.tokenizer
    save_folder(model.params, CONFIG, tmp_path / "bare")
    bare = load_model(tmp_path / "bare")
    assert bare.tokenizer is None
    with pytest.raises(UserError, match="bare: has no tokenizer files"):
        bare.require_tokenizer()


@pytest.mark.parametrize(
    ("tokens", "mask", "says"),
    [
        ([[0, 280]], None, "ids must lie in 0..279"),
        ([[-1, 2]], None, "ids must lie in 0..279"),
        ([1, 2], None, r"\[batch, length\]"),
        ([[]], None, r"\[batch, length\]"),
        ([[0.5]], None, "whole numbers"),
        ([[1] * 13], None, "13 is longer than the model's 12 positions"),
        ([[1, 2]], [[1]], r"attention_mask: has shape \[1, 1\], tokens have \[1, 2\]"),
    ],
)
def test_logits_refuses_what_it_cannot_mean(folder, tokens, mask, says):
    with pytest.raises(UserError, match=says):
        load_model(folder).logits(tokens, mask)


@pytest.mark.parametrize("dtype", ["int8", "f32", "float64", None])
def test_dtypes_are_checked_before_anything_is_read(dtype):
    with pytest.raises(UserError, match=f"dtype {dtype!r} is not supported"):
        load_model("nowhere/at-all", dtype=dtype)


def test_no_such_model():
    with pytest.raises(UserError, match="no such folder"):
        load_model("nowhere/at/all")
