"""Token statistics against transformers' logits, in double precision, for a base and an adapter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from unlearnjax import load_model
from unlearnjax.errors import UserError
from unlearnjax.evaluation.full import token_stats
from unlearnjax.evaluation.full.token_stats import token_stats_candidates

VOCAB, CONTEXT, WIDTH = 61, 40, 16


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=CONTEXT, initializer_range=0.6, bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        model = LlamaForCausalLM(config).eval()
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return model, load_model(folder)


@torch.no_grad()
def reference(model, row):
    """The numbers of min-k%++'s published code, whose variance is E[x^2] - E[x]^2: in float64."""
    log_p = torch.log_softmax(model(torch.tensor([row])).logits[0, :-1].double(), dim=-1)
    p = log_p.exp()
    mean = (p * log_p).sum(-1)
    variance = (p * log_p.square()).sum(-1) - mean.square()
    chosen = log_p.gather(-1, torch.tensor(row[1:])[:, None])[:, 0]
    return chosen.numpy(), mean.numpy(), variance.numpy()


def rows():
    rng = np.random.RandomState(1)
    return [rng.randint(0, VOCAB, n).tolist() for n in (3, CONTEXT, 1, 17, 30)]


def adapters():
    rng = np.random.default_rng(0)
    pair = {"a": rng.normal(size=(1, 2, WIDTH)), "b": rng.normal(size=(1, WIDTH, 2))}
    return {"layers": {"attention": {"o": {k: jnp.asarray(v, jnp.float32) for k, v in pair.items()}}}}


@pytest.mark.parametrize("at_once", [1 << 24, 1])
def test_equals_transformers_and_the_adapter_is_its_own(models, monkeypatch, at_once):
    model, ours = models
    monkeypatch.setattr(token_stats, "LOGITS_AT_ONCE", at_once)  # 1: chunks of 16 positions, the last one filled up
    token_stats.program.cache_clear()
    one = adapters()
    stack = jax.tree.map(lambda x: jnp.stack([0 * x, x]), one)
    done = []
    base, changed = token_stats_candidates(ours.model, ours.params, stack, rows(), batch_size=2, progress=done.append)
    assert sum(done) == 2 * len(rows())
    weight = model.model.layers[0].self_attn.o_proj.weight
    pair = one["layers"]["attention"]["o"]
    delta = torch.tensor(np.asarray(pair["b"][0]) @ np.asarray(pair["a"][0]))
    for found, add in ((base, 0.0), (changed, delta)):
        before = weight.data.clone()
        weight.data += add
        expected = [reference(model, row) for row in rows()]
        weight.data = before
        for ours_, theirs in zip(found, expected):
            for x, y in zip(ours_, theirs):
                assert x.dtype == np.float32
                np.testing.assert_allclose(x, y, atol=2e-4, rtol=1e-4)
    assert base[2].mean.shape == (0,)
    assert np.abs(base[1].variance - changed[1].variance).max() > 0.1


def test_a_sharp_distribution_keeps_its_variance(models):
    """One logit far above the rest: E[x^2] - E[x]^2 would be rounding noise, of either sign, in float32."""
    high, vocab = 12.0, 5

    class Hidden:
        hidden = jnp.ones((1, 2, 1))

    weights = jnp.zeros((vocab, 1)).at[0].set(high)
    model = models[1].model._replace(forward=lambda *_, **__: Hidden, head=lambda params: weights)
    tokens = jnp.zeros((1, 2), jnp.int32)
    chosen, mean, variance = (
        float(x[0, 0]) for x in token_stats.batch_stats(model, None, None, tokens, tokens + 1, 16)
    )
    rest = np.exp(-high)
    p = np.array([1.0] + [rest] * (vocab - 1)) / (1 + (vocab - 1) * rest)
    expected = np.sum(p * np.log(p) ** 2) - np.sum(p * np.log(p)) ** 2
    assert expected == pytest.approx(0.00354, rel=0.01)
    assert variance == pytest.approx(expected, rel=1e-3)
    assert mean == pytest.approx(np.sum(p * np.log(p)), rel=1e-2)
    assert chosen == pytest.approx(np.log(p[0]), abs=1e-6)


def test_bad_rows_are_named(models):
    _, ours = models
    with pytest.raises(UserError, match="outside the model's vocabulary"):
        token_stats_candidates(ours.model, ours.params, None, [[1], [VOCAB]], batch_size=2)
    with pytest.raises(UserError, match="mine: row longer than the context"):
        token_stats_candidates(ours.model, ours.params, None, [[1] * 41], batch_size=2, names=["mine"])
