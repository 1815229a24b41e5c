"""The objective's bookkeeping: micro-batch means, weights per candidate, names."""

import jax.numpy as jnp
import numpy as np
import pytest

from unlearnjax.data.tokens import Side
from unlearnjax.errors import UserError
from unlearnjax.objectives.objective import SHORTHANDS, TERMS, evaluate, expand, objective
from unlearnjax.objectives.protocol import Scores, row_mean, token_mean
from unlearnjax.training.hyperparameters import Hyperparameters, index, learning_rate, stack

VALUES = {
    "learning_rate": 1.0, "weight_decay": 0.0, "warmup_updates": 4, "total_updates": 20, "schedule": 1,
    "max_grad_norm": 1.0, "term_weights": {"npo": 1.0}, "beta": 0.1, "lora_alpha": 1, "lora_rank": 1,
    "dropout": 0.0, "init_seed": 0,
}  # fmt: skip


def side(micro, mask):
    mask = jnp.asarray(mask, jnp.bool_)
    micro = np.asarray(micro)
    assign = (np.arange(len(micro))[:, None] == micro[None]).astype(np.float32)
    nll = jnp.zeros(len(micro), jnp.float32)
    return Side(jnp.zeros(mask.shape, jnp.int32), mask, jnp.asarray(assign), nll, None, None)


def test_means_are_over_the_micro_batch_and_ignore_padding():
    s = side([0, 0, 1], [[1, 1, 0], [1, 0, 0], [1, 1, 1]])
    values = jnp.asarray([[1.0, 2.0, 99.0], [6.0, 99.0, 99.0], [1.0, 2.0, 3.0]], jnp.float32)
    np.testing.assert_allclose(token_mean(values, s), [3.0, 2.0, 0.0])
    np.testing.assert_allclose(row_mean(jnp.asarray([1.0, 3.0, 5.0], jnp.float32), s), [2.0, 5.0, 0.0])


def test_a_term_of_weight_zero_cannot_poison_a_candidate():
    h = index(stack([{**VALUES, "term_weights": {"ga": 0.0, "gdr": 1.0}}]), 0)
    s = side([0, 0], [[1, 1], [1, 0]])
    scores = {
        "forget": Scores(jnp.zeros((2, 2, 3)), jnp.full((2, 2), -jnp.inf), jnp.zeros((2, 2))),
        "retain": Scores(jnp.zeros((2, 2, 3)), jnp.full((2, 2), -2.0), jnp.zeros((2, 2))),
    }
    weight = jnp.asarray([1.0, 0.0], jnp.float32)
    loss, (parts, _) = evaluate(objective(["ga", "gdr"]), scores, {"forget": s, "retain": s}, weight, h)
    assert float(loss) == 2.0
    assert float(parts["gdr"]) == 2.0


def test_npo_is_zero_memory_at_the_start():
    """At p = p_base NPO is (2 / beta) log 2 whatever the likelihood (2404.05868, eq. 3)."""
    h: Hyperparameters = index(stack([VALUES]), 0)
    s = side([0, 0], [[1, 1], [1, 0]])
    logp = jnp.asarray([[-1.0, -2.0], [-5.0, -9.0]], jnp.float32)
    s = s._replace(nll=jnp.asarray([3.0, 5.0], jnp.float32))
    loss = TERMS["npo"].loss(Scores(jnp.zeros((2, 2, 3)), logp, jnp.zeros((2, 2))), s, h)
    np.testing.assert_allclose(loss[0], 20 * np.log(2), rtol=1e-6)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_learning_rates_equal_those_of_transformers(schedule):
    import torch
    from transformers import get_scheduler

    from unlearnjax.training.hyperparameters import SCHEDULES

    name = "constant_with_warmup" if schedule == "constant" else schedule
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    theirs = get_scheduler(name, optimizer, num_warmup_steps=4, num_training_steps=20)
    h = index(stack([{**VALUES, "learning_rate": 0.5, "schedule": SCHEDULES.index(schedule)}]), 0)
    for update in range(20):
        ours = float(learning_rate(h, jnp.asarray(update, jnp.int32)))
        assert ours == pytest.approx(theirs.get_last_lr()[0], abs=1e-6)
        optimizer.step()
        theirs.step()


def test_names():
    assert expand("graddiff", "x") == {"ga": 1.0, "gdr": 1.0}
    assert expand({"npo": 2}, "x") == {"npo": 2.0}
    for weights in SHORTHANDS.values():
        assert set(weights) <= set(TERMS)
    with pytest.raises(UserError, match="x: unknown objective term 'nop'; did you mean 'npo'"):
        expand({"nop": 1.0}, "x")
    with pytest.raises(UserError, match="did you mean 'graddiff'"):
        expand("gradiff", "x")
    assert objective(["klr", "npo"]).sides == ("forget", "retain")
    assert objective(["ga"]).sides == objective(expand("finetune", "x")).sides == ("forget",)
