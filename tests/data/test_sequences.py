import numpy as np
import pytest

from unlearnjax.data.sequences import Micro, annealed, chunked, lockstep, mixed
from unlearnjax.data.tokens import pack, pooled
from unlearnjax.errors import UserError


def test_mixed_batches_hold_every_row_once_an_epoch():
    found = mixed(7, 6, batch=4, accumulation=3, epochs=2, seed=0)
    for epoch in range(2):
        own = [m for m in found if m.epoch == epoch]
        assert sorted(np.concatenate([m.rows for m in own])) == list(range(13))
        assert [len(m.rows) for m in own] == [4, 4, 4, 1]
        assert [m.update for m in own] == [False, False, True, True]  # the last update of an epoch has one
        assert [m.weight for m in own] == [1 / 3] * 3 + [1.0]
    assert any((m.rows < 7).any() and (m.rows >= 7).any() for m in found)
    assert not np.array_equal(found[0].rows, found[4].rows)


def test_mixed_batches_of_like_length():
    """Every row once an epoch; little is padded, alone and in step with another seed; other neighbours each epoch."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(8, 200, 60)
    rows = [rng.integers(0, 9, n).tolist() for n in lengths]
    pool = pooled(pack(rows[:28], [3] * 28), pack(rows[28:], [3] * 32))
    plain, like = ([mixed(28, 32, batch=5, accumulation=2, epochs=2, seed=s, lengths=x) for s in (1, 2)]
                   for x in (None, pool.length))  # fmt: skip
    for own in like:
        for epoch in range(2):
            assert sorted(r for m in own if m.epoch == epoch for r in m.rows) == list(range(60))
        assert [m.update for m in own] == [m.update for m in plain[0]]
    first, second = ({frozenset(m.rows.tolist()) for m in like[0] if m.epoch == e} for e in range(2))
    assert len(first & second) < 6
    shares = [lockstep(pool, both, 8).padding_share for both in (plain, like)]
    assert shares[0] > 0.4 and shares[1] < 0.2


def test_chunked_as_published():
    """32 forget rows of 1112 at ratio 7: 34 chunks and 24 rows (the spec's count), 7.8k updates at 7 epochs."""
    found = chunked(1112, 1136, chunk=32, ratio=7, epochs=7)
    assert len(found) == 7 * 1112 == 7784
    assert sum(m.restart for m in found) == 35
    assert all((m.rows < 1112).sum() == 1 and (m.rows >= 1112).sum() == 7 for m in found)
    first = found[: 7 * 32]
    assert [m.rows[0] for m in first[:32]] == list(range(32)) == [m.rows[0] for m in first[32:64]]
    np.testing.assert_allclose([m.share for m in first], 1 - np.arange(224) / 224)
    # The retain rows go round: the second chunk takes up where the first one stopped.
    np.testing.assert_array_equal(found[0].rows[1:], 1112 + np.arange(7))
    np.testing.assert_array_equal(found[224].rows[1:], 1112 + np.arange(224, 231))
    np.testing.assert_array_equal(found[5 * 224].rows[1:], 1112 + (np.arange(7) + 5 * 224) % 1136)
    np.testing.assert_array_equal(found[6 * 224].rows[1:], 1112 + (np.arange(7) + 6 * 224) % 1136)


def test_annealed_takes_turns():
    found = annealed(10, 20, chunk=4, batch=2, ascent_epochs=2, anneal_epochs=1, interleaving=0.5, fraction=0.25,
                     finally_all=True, anneal_rate=0.5, seed=0)  # fmt: skip
    kinds = ["forget" if (m.rows < 10).all() else "retain" for m in found]
    assert all((m.rows < 10).all() or (m.rows >= 10).all() for m in found)
    # Chunks of 4, 4 and 2 rows twice; after the second one 5 retain rows; at the end all 20.
    assert kinds == ["forget"] * 8 + ["retain"] * 3 + ["forget"] * 2 + ["retain"] * 10
    assert sum(m.restart for m in found) == 5
    assert sorted(np.concatenate([m.rows for m in found[13:]])) == list(range(10, 30))
    np.testing.assert_allclose([m.share for m in found[8:11]], [0.5, 0.5 * 2 / 3, 0.5 / 3])


def tokens(count, rng):
    texts = [rng.integers(0, 50, rng.integers(4, 20)).tolist() for _ in range(count)]
    return pack(texts, [2] * count)


def test_a_pool_is_both_sides():
    rng = np.random.default_rng(0)
    forget, retain = tokens(5, rng), tokens(4, rng)
    pool = pooled(forget, retain)
    for i in range(9):
        wanted = forget.row(i) if i < 5 else retain.row(i - 5)
        np.testing.assert_array_equal(pool.row(i), wanted)
    assert pool.flat.dtype == pool.start.dtype == np.int32


def test_lockstep_holds_each_candidates_own():
    rng = np.random.default_rng(0)
    pool = pooled(tokens(6, rng), tokens(6, rng))
    sequences = [
        mixed(6, 6, batch=4, accumulation=2, epochs=1, seed=0), chunked(6, 6, chunk=3, ratio=2, epochs=1),
    ]  # fmt: skip
    schedule = lockstep(pool, sequences, buckets=2)
    assert len(schedule.steps) == 6 and schedule.updates.tolist() == [2, 6]
    for k, step in enumerate(schedule.steps):
        for i, own in enumerate(sequences):
            rows = step.rows["pool"][i]
            held = rows[rows >= 0]
            if k >= len(own):
                assert held.size == 0 and not step.update[i]
                continue
            np.testing.assert_array_equal(held, own[k].rows)
            assert step.micro_weight[i, 0] == np.float32(own[k].weight) and not step.micro_weight[i, 1:].any()
            assert step.update[i] == own[k].update and step.restart[i] == own[k].restart
            assert pool.length[held].max() <= step.width
            assert pool.answer_length[held].max() <= step.answers
    assert len({(s.width, s.answers) for s in schedule.steps}) <= 2
    with pytest.raises(UserError, match="no rows"):
        lockstep(pool, [[Micro(np.asarray([0]))], []])
