"""A candidate is kept as it was when its loss on the sample was lowest, alone or among others, stopped or not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unlearnjax.adapters.lora import lora
from unlearnjax.data.schedule import Pace, plan
from unlearnjax.data.tokens import pack, pooled
from unlearnjax.models.abstract import init_params
from unlearnjax.models.config import ModelConfig
from unlearnjax.models.decoder import build
from unlearnjax.objectives.objective import objective
from unlearnjax.training.best import Assessor, sampled
from unlearnjax.training.hyperparameters import index, stack
from unlearnjax.training.interrupt import Interrupted, Stop
from unlearnjax.training.keeper import open_keeper
from unlearnjax.training.loop import fresh_states, train
from unlearnjax.training.reference import stores_for
from unlearnjax.training.step import Task, Work, loss_of

CONFIG = ModelConfig("olmo", 67, 32, 48, 2, 4, 4, 8, "layer")
BASE = {
    "learning_rate": 0.3, "weight_decay": 0.0, "warmup_updates": 0, "total_updates": 40, "schedule": 0,
    "max_grad_norm": float("inf"), "term_weights": {"forget_ce": 1.0, "gdr": 1.0}, "beta": 0.1,
    "lora_alpha": 8, "lora_rank": 8, "dropout": 0.3, "init_seed": 3,
}  # fmt: skip
EVERY = 2


@pytest.fixture(scope="module")
def job():
    rng = np.random.default_rng(0)
    sides = {}
    for name, count in (("forget", 9), ("retain", 7)):
        texts = [rng.integers(0, 67, rng.integers(6, 20)).tolist() for _ in range(count)]
        sides[name] = pack(texts, [int(rng.integers(1, len(t) - 2)) for t in texts])
    model, wanted = build(CONFIG), objective(("forget_ce", "gdr"))
    params = init_params(model.abstract(jnp.float32), jax.random.key(1))
    # So large a rate makes the loss go up and down: the last is not the best.
    h = stack([BASE, {**BASE, "learning_rate": 1e-3}, {**BASE, "init_seed": 5}])
    schedule = plan(sides, [Pace(2, 1, 3, seed) for seed in range(3)], buckets=1)
    task = Task(model, lora(CONFIG, ("q", "down"), 8), wanted, True, keep_best=True)
    assessor = Assessor(EVERY, sampled(sides, 5, 2))
    return task, params, stores_for(model, params, sides, wanted), schedule, h, assessor


def run(job, **more):
    *arguments, assessor = job
    return train(*arguments, assessor=assessor, **more)


def same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.slow
def test_the_best_is_the_lowest_of_those_looked_at(job):
    """Against the loss of each state that training passed, computed here."""
    task, params, stores, schedule, h, assessor = job
    states = []
    result = run(job, after_step=lambda done, s: states.append(jax.tree.map(np.array, s)))
    batches = assessor.batches
    for i in range(3):
        found = {}
        for state in states:
            own = index(state, i)
            updates, total = int(own.updates), int(schedule.updates[i])
            if updates == 0 or (updates % EVERY and updates != total):
                continue
            losses = []
            for number in range(len(batches.rows["forget"])):
                rows = {side: jnp.asarray(r[number]) for side, r in batches.rows.items()}
                work = Work(rows, jnp.zeros(2, jnp.int32), jnp.asarray([1.0, 0.0]), jnp.asarray(False), jnp.asarray(0),
                            jnp.asarray(1.0), jnp.asarray(False))  # fmt: skip
                quiet = task._replace(use_dropout=False)
                losses.append(loss_of(quiet, params, own.trainable, stores, work, index(h, i), own, batches.width,
                                      batches.answers)[0])  # fmt: skip
            found[updates] = (float(np.mean(losses)), own.trainable)
        best = min(found, key=lambda u: found[u][0])
        kept = index(result.states.best, i)
        assert int(kept.updates) == best and len(found) > 3
        np.testing.assert_allclose(kept.loss, found[best][0], rtol=1e-5)
        same(kept.trainable, found[best][1])
    lasts = [int(n) for n in schedule.updates]
    assert any(int(u) != last for u, last in zip(result.states.best.updates, lasts, strict=True))


def test_looking_changes_nothing(job):
    plain = train(job[0]._replace(keep_best=False), *job[1:5])
    same(run(job).states.trainable, plain.states.trainable)


def test_stopped_and_gone_on_with(job, tmp_path):
    whole, total = run(job), len(job[3].steps)
    for at in (3, total - 1, None):
        stop = Stop()

        def after(done, states, at=at, stop=stop):
            stop.signum = 15 if done == at else 0

        keep = open_keeper(tmp_path / "checkpoints", {"run": 1}, every=1e9, say=lambda _: None, resume=True)
        start = keep.restore(jax.eval_shape(lambda: fresh_states(job[0], job[1], job[4])))
        try:
            if at is None:
                same(run(job, start=start, keeper=keep).states, whole.states)
            else:
                with pytest.raises(Interrupted):
                    run(job, start=start, keeper=keep, stop=stop, after_step=after)
        finally:
            keep.close()


def test_the_sample_of_a_pool_has_both_sets_in_every_batch():
    rows = lambda n: pack([[1, 2, 3, 4]] * n, [2] * n)  # noqa: E731
    found = sampled({"pool": pooled(rows(40), rows(20))}, 10, 4).rows["pool"]
    assert found.shape == (5, 4) and len(set(found.ravel().tolist())) == 20
    assert ((found < 40).sum(axis=1) == 2).all()
    few = sampled({"pool": pooled(rows(3), rows(20))}, 10, 5).rows["pool"]
    assert (few[few >= 0] < 3).sum() == 3 and (few == -1).sum() == 2
