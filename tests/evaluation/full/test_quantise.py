"""Rounding against torch's fake quantisation and by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from unlearnjax.data.bpe import train_tokenizer
from unlearnjax.data.rows import Row
from unlearnjax.evaluation.full.asked import Asking, knowledge
from unlearnjax.evaluation.full.quantise import changed_share, codes, quantisation, quantised, rounded
from unlearnjax.evaluation.protocol import decode
from unlearnjax.models.abstract import init_params
from unlearnjax.models.config import ModelConfig
from unlearnjax.models.decoder import build

ROWS = [Row("a1sc1", "Once", " upon a time", "Task1"), Row("a1qa0", "Who?", "Ann", "Task1")]


def weight(seed=0, shape=(3, 5, 256)):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def test_int8_is_torchs_per_channel_fake_quantisation():
    for matrix in weight():
        scale = torch.tensor(np.abs(np.asarray(matrix)).max(axis=1) / np.float32(127))
        expected = torch.fake_quantize_per_channel_affine(
            torch.tensor(np.asarray(matrix)), scale, torch.zeros(5, dtype=torch.int32), 0, -127, 127
        )
        np.testing.assert_allclose(rounded(matrix, "int8"), expected.numpy(), atol=1e-6)


def test_int4_is_torchs_per_group_of_128():
    for matrix in weight():
        groups = np.asarray(matrix).reshape(10, 128)
        scale = torch.tensor(np.abs(groups).max(axis=1) / np.float32(7))
        zero = torch.zeros(10, dtype=torch.int32)
        expected = torch.fake_quantize_per_channel_affine(torch.tensor(groups), scale, zero, 0, -7, 7)
        np.testing.assert_allclose(rounded(matrix, "int4"), expected.numpy().reshape(5, 256), atol=1e-6)


def test_codes_by_hand():
    found, scale = codes(jnp.asarray([[7.0, -3.4, 0.6, 0.0], [0.0, 0.0, 0.0, 0.0]]), 4)  # 4 inputs: a group of 4
    assert found.tolist() == [[[7, -3, 1, 0]], [[0, 0, 0, 0]]] and scale.ravel().tolist() == [1.0, 0.0]
    assert codes(jnp.ones((2, 200)), 4)[0].shape == (2, 1, 200)  # no multiple of 128
    assert rounded(jnp.asarray([[1.0 + 2**-9]]), "bfloat16").tolist() == [[1.0]]


@pytest.fixture(scope="module")
def tiny():
    tokenizer = train_tokenizer([r.input + r.output for r in ROWS] * 2, 300)
    config = ModelConfig("llama", len(tokenizer), 16, 24, 1, 2, 2, 8, "rms", max_positions=32, pad_token_id=0)
    model = build(config)
    params = init_params(model.abstract(jnp.float32), jax.random.key(0))
    return model, params, Asking(tokenizer, decode, (tokenizer.eos_token_id,), 4, 8)


def test_an_update_below_the_grid_is_rounded_away(tiny):
    """The adapter moves a weight that lies on the int4 grid by a third of a step: int4 gives the original back."""
    model, params, asking = tiny
    params = quantised(model, params, "int4")
    up = params["layers"]["mlp"]["up"]["weight"]
    step = codes(up, 4)[1][0, 3, 0, 0]
    place = int(jnp.argmin(jnp.abs(up[0, 3])))  # not the largest, which makes the scale
    pair = {
        "a": jnp.zeros((1, 1, 1, 16)).at[0, 0, 0, place].set(1.0),
        "b": jnp.zeros((1, 1, 24, 1)).at[0, 0, 3].set(step / 3),
    }
    (found,) = quantisation(model, params, {"layers": {"mlp": {"up": pair}}}, ROWS, asking, params)
    (original,) = knowledge(model, params, None, ROWS, asking)
    assert found["int4"] == pytest.approx(original, rel=1e-5) and found["changed"]["int4"] == 0.0
    assert found["full"]["nll"] != pytest.approx(original["nll"], rel=1e-6)
    assert found["gap"]["int4"]["nll"] == pytest.approx(original["nll"] - found["full"]["nll"], abs=1e-6)
    weights = sum(np.prod(params["layers"][b][n]["weight"].shape) for n, (b, _, _) in model.config.linears.items())
    assert found["changed"]["int8"] == pytest.approx(1 / weights)


def test_changed_codes_are_counted_by_hand(tiny):
    model, params, _ = tiny
    other = jax.tree.map(lambda x: x, params)
    other["layers"]["mlp"]["up"]["weight"] = -params["layers"]["mlp"]["up"]["weight"]
    before = codes(params["layers"]["mlp"]["up"]["weight"], 8)[0]
    weights = sum(np.prod(params["layers"][b][n]["weight"].shape) for n, (b, _, _) in model.config.linears.items())
    assert changed_share(model, params, other, "int8") == pytest.approx(int((before != 0).sum()) / weights)
    assert changed_share(model, params, params, "int4") == 0.0


def test_an_update_below_bfloat16_is_lost_in_the_merge_alone(tiny):
    """Each weight moves by less than half its last bit. Beside the weights the adapter works; merged into them it is
    gone. So it would be in `full`, and the gap 0, if that were merged in the weights' dtype."""
    model, params, asking = tiny
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    # Inputs of one sign, so that the changes of a row add up while its weights cancel.
    params["embed"]["weight"] = jnp.abs(params["embed"]["weight"])
    up = params["layers"]["mlp"]["up"]["weight"].astype(jnp.float32)
    change = jnp.abs(up) * 2.0**-9
    lora = {"layers": {"mlp": {"up": {"a": jnp.eye(16)[None, None], "b": change[None]}}}}
    (found,) = quantisation(model, params, lora, ROWS, asking, params)
    (trained,) = knowledge(model, params, lora, ROWS, asking)
    (original,) = knowledge(model, params, None, ROWS, asking)
    assert found["full"] == trained and found["bfloat16"] == original
    assert found["gap"]["bfloat16"]["nll"] == original["nll"] - trained["nll"] != 0.0
    # The codes are those of the float32 sum.
    weights = sum(np.prod(params["layers"][b][n]["weight"].shape) for n, (b, _, _) in model.config.linears.items())
    moved = int((codes(up, 8)[0] != codes(up + change, 8)[0]).sum())
    assert moved > 0 and found["changed"]["int8"] == pytest.approx(moved / weights)
