"""Sampled generation: its distribution, and what a draw does not depend on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unlearnjax.errors import UserError
from unlearnjax.evaluation.generate import Sampling, generate_candidates
from unlearnjax.models.abstract import init_params
from unlearnjax.models.config import ModelConfig
from unlearnjax.models.decoder import build

CONFIG = ModelConfig("llama", 12, 16, 24, 1, 2, 2, 8, "rms", max_positions=64, eos_token_ids=(), pad_token_id=0)
MODEL = build(CONFIG)
PARAMS = init_params(MODEL.abstract(jnp.float32), jax.random.key(3))


def generated(prompts, sampling, limit=1, lora=None, batch_size=64, eos=()):
    return generate_candidates(
        MODEL, PARAMS, lora, prompts, eos_token_ids=eos, pad_token_id=0, max_new_tokens=limit, batch_size=batch_size,
        sampling=sampling,
    )  # fmt: skip


def test_the_first_token_has_the_softmax_distribution():
    """Pearson's chi-square of 4096 draws, 11 degrees of freedom: above 31.3 with probability .001 (one fixed seed)."""
    prompt, draws, temperature = [3, 1, 4, 1, 5], 4096, 0.7
    found = generated([prompt] * draws, Sampling(temperature, 5), batch_size=1024)[0]
    hidden = MODEL.forward(PARAMS, None, jnp.asarray([prompt])).hidden[0, -1]
    expected = draws * np.asarray(jax.nn.softmax(MODEL.head(PARAMS) @ hidden / temperature))
    counts = np.bincount([ids[0] for ids in found], minlength=12)
    assert expected.max() < 0.6 * draws and expected.min() > 5  # a distribution worth the name
    assert ((counts - expected) ** 2 / expected).sum() < 31.3


def test_draws_do_not_depend_on_the_batch_nor_on_the_candidate():
    prompts = [[1, 2], [3], [4, 5, 6, 7], [1, 2], [8, 9, 1]]
    apart = generated(prompts, Sampling(1.0, 7), limit=20, batch_size=1)[0]
    assert generated(prompts, Sampling(1.0, 7), limit=20)[0] == apart
    assert apart[0] != apart[3] and generated(prompts, Sampling(1.0, 8), limit=20)[0] != apart
    none = {"layers": {"mlp": {"up": {"a": jnp.zeros((3, 1, 2, 16)), "b": jnp.zeros((3, 1, 24, 2))}}}}
    assert generated(prompts, Sampling(1.0, 7), limit=20, lora=none) == [apart] * 3


def test_ended_rows_are_dropped_and_the_others_go_on_with_their_draws():
    """Rows end at different times, so the batch shrinks on the way; one row at a time never does."""
    prompts = [[i % 11 + 1] for i in range(32)]
    apart = generated(prompts, Sampling(1.0, 1), limit=60, batch_size=1, eos=(2,))[0]
    lengths = [len(ids) for ids in apart]
    assert sum(n >= 32 for n in lengths) in range(1, 9)  # so that the host drops rows at its first look
    assert generated(prompts, Sampling(1.0, 1), limit=60, batch_size=32, eos=(2,))[0] == apart


def test_a_cold_draw_is_the_greedy_one_and_no_temperature_is_refused():
    prompts = [[1, 2], [3], [4, 5, 6]]
    assert generated(prompts, Sampling(1e-6), limit=8) == generated(prompts, None, limit=8)
    with pytest.raises(UserError, match="temperature must be above 0"):
        generated(prompts, Sampling(0.0))
