"""NegMerge's mask and mean by hand, MagMax's ties, and RAM's numbers."""

import jax.numpy as jnp
import numpy as np
import pytest

from unlearnjax.errors import UserError
from unlearnjax.merging import merge

DRAW = np.random.default_rng(3)


def negmerge(x: np.ndarray) -> np.ndarray:
    """The official code's accumulators: a sum of signs that must reach the number of models, and a sum over all."""
    signs, values = np.zeros(x.shape[1:]), np.zeros(x.shape[1:])
    for tau in x.astype(np.float64):
        signs += np.sign(tau)
        values += tau
    return np.where(np.abs(signs) == len(x), values / len(x), 0.0)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_unanimity_is_the_official_codes(n):
    x = DRAW.normal(size=(n, 9, 7)).astype(np.float32)
    x[0, 0, :3] = [0.0, -0.0, 0.5]
    found = np.asarray(merge({"w": x}, "consensus")["w"])
    np.testing.assert_allclose(found, negmerge(x), rtol=1e-6, atol=1e-7)
    assert (found[0, :2] == 0).all()


def test_the_order_does_not_change_the_mask_and_the_kept_share_falls_by_half_per_candidate():
    x = DRAW.normal(size=(6, 200, 200)).astype(np.float32)
    found = np.asarray(merge({"w": x}, "consensus")["w"]) != 0
    np.testing.assert_array_equal(found, np.asarray(merge({"w": x[::-1]}, "consensus")["w"]) != 0)
    share = 2.0 ** (1 - 6)
    assert abs(found.mean() - share) < 5 * np.sqrt(share * (1 - share) / found.size)


def test_signs_are_formed_in_float32():
    """Of bfloat16 weights whose difference is below their resolution the sign is lost; of float32 deltas it is not."""
    tiny = np.full((2, 4), 1e-30, np.float32)
    np.testing.assert_allclose(merge({"w": jnp.asarray(tiny, jnp.bfloat16)}, "consensus")["w"], tiny[0], rtol=1e-2)


def test_relaxed_consensus_by_hand():
    """Rows: 3 of 3, 2 of 3 with the mean on their side, 2 of 3 overruled by a large third, a zero among three."""
    x = np.array([[1, 1, 1, 1], [2, 1, 1, 1], [3, -0.5, -8, 0]], np.float32)
    assert merge({"w": x}, "consensus")["w"].tolist() == [2, 0, 0, 0]
    third = np.float32(1) / 3
    found = merge({"w": x}, "consensus", rho=2 / 3)["w"]
    np.testing.assert_allclose(found, [2, 1.5 * third, 0, 2 * third], rtol=1e-6)
    found = merge({"w": x}, "consensus", rho=2 / 3, average="agreeing")["w"]
    np.testing.assert_allclose(found, [2, 1, 1, 1], rtol=1e-6)
    np.testing.assert_allclose(merge({"w": x}, "conflict_only")["w"], [0, 0.5, -2, 2 * third], rtol=1e-6)


@pytest.mark.parametrize(("n", "rho", "needed"), [(10, 0.7, 7), (5, 0.6, 3), (30, 0.9, 27), (3, 0.67, 3), (7, 1.0, 7)])
def test_how_many_must_agree(n, rho, needed):
    """ceil(rho n), also where the product is an integer that floats miss."""
    for ups in (needed - 1, needed):
        x = np.concatenate([np.ones((ups, 1)), np.full((n - ups, 1), -1e-3)]).astype(np.float32)
        assert (merge({"w": x}, "consensus", rho=rho)["w"].item() != 0) == (ups == needed)


def test_weights_are_relative_and_negative_ones_negate():
    x = np.array([[1.0, 1.0], [-3.0, 3.0]], np.float32)
    np.testing.assert_allclose(merge({"w": x}, "consensus", weights=[2.0, -2.0])["w"], [2.0, 0.0])
    np.testing.assert_allclose(merge({"w": x}, "consensus", weights=[3.0, 1.0])["w"], [0.0, 1.5])
    with pytest.raises(UserError, match="all of them are 0"):
        merge({"w": x}, "consensus", weights=[0.0, 0.0])


def test_magmax_takes_the_later_of_equals():
    x = np.array([[1.0, -2.0, 0.0], [-1.0, 1.0, 0.0]], np.float32)
    assert merge({"w": x}, "magmax")["w"].tolist() == [-1.0, -2.0, 0.0]
    assert merge({"w": x}, "magmax", weights=[1.0, 0.0])["w"].tolist() == [1.0, -2.0, 0.0]
    assert merge({"w": x}, "magmax", lambda_=0.5)["w"].tolist() == [-0.5, -1.0, 0.0]


def test_ram_keeps_what_is_alone_and_averages_what_is_shared():
    x = np.array([[1, 1, 0, 1e-6, 2], [0, 3, -2, 0, 1e-6]], np.float32)
    np.testing.assert_allclose(merge({"w": x}, "ram")["w"], [1, 2, -2, 0, 2], rtol=1e-6)
    # Candidate 0 has 1 shared and 2 of its own: 1 + .1 * min(.5, .2); candidate 1 has 1 and 1: 1 + .1 * .2.
    np.testing.assert_allclose(merge({"w": x}, "ramplus_tl")["w"], [1.02, 2, -2.04, 0, 2.04], rtol=1e-6)
    found = merge({"w": x}, "ramplus_tl", r=0.5, alpha=0.75)["w"]
    np.testing.assert_allclose(found, [1.25, 2, -2.75, 0, 2.5], rtol=1e-6)
