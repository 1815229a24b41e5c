"""Each definition of TIES against a plain numpy rendering of it, and the corners where they part."""

import numpy as np
import pytest
from unlearnjax_kernels.threshold import api as threshold

from unlearnjax.merging import merge
from unlearnjax.merging.trim import keep_count

RNG = np.random.default_rng(5)


def flat(tree: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([tree[name].reshape(len(tree[name]), -1) for name in sorted(tree)], axis=1)


def unflat(vector: np.ndarray, tree: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    out, at = {}, 0
    for name in sorted(tree):
        size = tree[name][0].size
        out[name] = vector[at : at + size].reshape(tree[name].shape[1:])
        at += size
    return out


def paper_reference(tree: dict[str, np.ndarray], density: float) -> dict[str, np.ndarray]:
    """The authors' code in words: flatten (keys sorted); per row the (d - floor(density d))-th smallest magnitude is
    the threshold; elect the sign of the sum; zeros take the sign of the sum of all signs; average what agrees, and
    where the elected sign is not positive take the negative entries."""
    rows = flat(tree).astype(np.float64)
    d = rows.shape[1]
    position = d - int(density * d)
    kth = np.sort(np.abs(rows), axis=1)[:, max(position, 1) - 1]
    rows = np.where(np.abs(rows) >= kth[:, None], rows, 0.0)
    signs = np.sign(rows.sum(axis=0))
    signs[signs == 0] = np.sign(signs.sum())
    agree = np.where(signs[None] > 0, rows > 0, rows < 0)
    return unflat((rows * agree).sum(axis=0) / np.maximum(agree.sum(axis=0), 1), tree)


def mergekit_reference(x: np.ndarray, weights: np.ndarray, density: float, normalize: bool) -> np.ndarray:
    """Per tensor: keep the int(density size) largest; sign of the weighted sum, 0 is plus; divide by kept weights."""
    rows = x.reshape(len(x), -1).astype(np.float64)
    k = int(density * rows.shape[1])
    mask = np.zeros_like(rows)
    for i, row in enumerate(rows):
        mask[i, np.argsort(-np.abs(row))[:k]] = 1
    weighted = rows * mask * weights[:, None]
    elected = np.where(weighted.sum(axis=0) >= 0, 1, -1)
    agree = np.sign(weighted) == elected[None]
    divisor = (weights[:, None] * agree).sum(axis=0)
    value = (weighted * agree).sum(axis=0)
    return (value / np.where(divisor == 0, 1, divisor) if normalize else value).reshape(x.shape[1:])


def tree_of(n: int) -> dict[str, np.ndarray]:
    b = 0.1 * RNG.normal(size=(n, 40))  # smaller: a global trim cuts it harder
    return {"a": RNG.normal(size=(n, 9, 7)).astype(np.float32), "b": b.astype(np.float32)}


@pytest.mark.parametrize("density", [0.01, 0.2, 0.29, 1.0])
@pytest.mark.parametrize("n", [1, 2, 5])
def test_paper(n, density):
    tree = tree_of(n)
    found, expected = merge(tree, "ties", density=density), paper_reference(tree, density)
    for name in tree:
        np.testing.assert_allclose(found[name], expected[name], rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("majority", [1.0, -1.0])
def test_paper_gives_cancelling_entries_the_majority_sign(majority):
    deltas = {"cancels": np.array([[0.5], [-0.5]], np.float32), "rest": majority * np.ones((2, 3), np.float32)}
    found = merge(deltas, "ties", density=1.0)
    assert found["cancels"].item() == 0.5 * majority
    assert paper_reference(deltas, 1.0)["cancels"].item() == 0.5 * majority
    three = np.array([[0.75], [-0.5], [-0.25]], np.float32)  # default weights of 1/3 must not spoil the cancellation
    found = merge({"cancels": three, "rest": majority * np.ones((3, 3), np.float32)}, "ties", density=1.0)
    np.testing.assert_allclose(found["cancels"], three[0] if majority > 0 else three[1:].mean(axis=0), rtol=1e-6)


def test_paper_takes_the_negative_where_even_the_majority_cancels():
    deltas = np.array([[0.5, -2.0, 2.0], [-0.5, -1.0, 1.0]], np.float32)
    np.testing.assert_allclose(merge(deltas, "ties", density=1.0), [-0.5, -1.5, 1.5])
    np.testing.assert_allclose(paper_reference({"x": deltas}, 1.0)["x"], [-0.5, -1.5, 1.5])


def test_paper_keeps_everything_where_the_threshold_is_zero():
    """As with weights that most fine-tunes left frozen: the (d - floor(density d))-th smallest of one candidate is 0,
    and so all of its entries stay; the others keep theirs alone."""
    deltas = np.zeros((2, 10), np.float32)
    deltas[0, :2], deltas[0, 9] = [1.0, -0.01], 0.5
    deltas[1] = np.arange(10) - 5.5
    found = merge(deltas, "ties", density=0.4)
    np.testing.assert_allclose(found, paper_reference({"x": deltas}, 0.4)["x"], rtol=1e-6)
    # Candidate 1 keeps floor(.4 * 10) + 1 = 5 entries, and one more that ties: all from 2.5 on.
    np.testing.assert_allclose(found, [-5.5, -2.255, -3.5, -2.5, 0, 0, 0, 0, 2.5, 2.0], rtol=1e-6)


def test_paper_trims_the_whole_model_and_the_others_each_tensor():
    deltas = {"large": np.array([[4.0, -3.0]], np.float32), "small": np.array([[0.2, -0.1]], np.float32)}
    paper = merge(deltas, "ties", density=0.25)  # floor(0.25 * 4) + 1 = 2 entries of the model
    np.testing.assert_array_equal(paper["large"], [4.0, -3.0])
    np.testing.assert_array_equal(paper["small"], [0.0, 0.0])
    for semantics in ("peft", "mergekit"):
        each = merge(deltas, "ties", semantics=semantics, density=0.5)
        np.testing.assert_array_equal(each["large"], [4.0, 0.0])
        np.testing.assert_allclose(each["small"], [0.2, 0.0])


def test_paper_weights_are_relative_and_a_negative_one_negates_its_candidate():
    tree = tree_of(3)
    one = merge(tree, "ties", density=0.5, weights=[1.0, 2.0, 0.5])
    ten = merge(tree, "ties", density=0.5, weights=[10.0, 20.0, 5.0])
    negated = {k: v * np.array([1, -1, 1], np.float32).reshape(3, *[1] * (v.ndim - 1)) for k, v in tree.items()}
    minus = merge(negated, "ties", density=0.5, weights=[1.0, -2.0, 0.5])
    for name in tree:
        np.testing.assert_allclose(one[name], ten[name], rtol=1e-6)
        np.testing.assert_allclose(one[name], minus[name], rtol=1e-6)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.3, 1.2, -0.5]])
def test_mergekit(weights, normalize):
    tree = tree_of(3)
    found = merge(tree, "ties", semantics="mergekit", density=0.7, weights=weights, normalize=normalize)
    for name, x in tree.items():
        expected = mergekit_reference(x, np.array(weights), 0.7, normalize)
        np.testing.assert_allclose(found[name], expected, rtol=5e-6, atol=1e-7)


def test_peft_elects_plus_where_the_sum_is_zero_and_weights_do_not_vote():
    deltas = np.array([[0.5, 1.0], [-0.5, -3.0]], np.float32)
    found = merge(deltas, "ties", semantics="peft", density=1.0, weights=[0.0, 1.0])
    np.testing.assert_array_equal(found, [0.0, -3.0])
    np.testing.assert_array_equal(merge(deltas, "ties", semantics="peft", density=1.0), [0.5, -3.0])


def test_peft_trims_everything_when_k_is_zero():
    deltas = np.ones((2, 3), np.float32)
    np.testing.assert_array_equal(merge(deltas, "ties", semantics="peft", density=0.3), np.zeros(3))
    assert np.any(merge(deltas, "ties", density=0.3))  # the paper's code keeps one more


@pytest.mark.parametrize("semantics", ["peft", "mergekit", "paper"])
def test_entries_that_tie_with_the_threshold_are_all_kept(semantics):
    deltas = np.array([[2.0, 1.0, -1.0, 1.0, 0.5, 0.25, 0.1, 0.0]], np.float32)
    found = merge(deltas, "ties", semantics=semantics, density=0.25)
    np.testing.assert_array_equal(found, [2.0, 1.0, -1.0, 1.0, 0.0, 0.0, 0.0, 0.0])


def test_the_number_kept_is_that_of_double_precision():
    # 0.29 * 100 is 28.999999999999996 in double (so PEFT keeps 28), and 29 in float32.
    np.testing.assert_array_equal(keep_count(0.29, 100), threshold.to_limbs(28))
    for density in (0.1, 0.3, 0.7, 0.8, 1.0):
        for size in (10, 65536, 7 * 10**9):
            low, high = np.asarray(keep_count(density, size), np.int64)
            assert low + (high << 16) == int(density * size)
            low, high = np.asarray(keep_count(np.float32(density), size), np.int64)
            assert abs(low + (high << 16) - density * size) <= 1.2e-7 * size + 1
    assert np.asarray(keep_count(1.0, 10, extra=1)).tolist() == [10, 0]


@pytest.mark.parametrize("density", [0.2, 0.8])
@pytest.mark.parametrize("function", ["sum", "mean", "max"])
def test_fusion_bench(function, density):
    """Trim and election are the paper's; agreeing entries are summed by default, and the result is times .3."""
    tree = tree_of(3)
    rows = flat(tree).astype(np.float64)
    kth = np.sort(np.abs(rows), axis=1)[:, rows.shape[1] - int(density * rows.shape[1]) - 1]
    rows = np.where(np.abs(rows) >= kth[:, None], rows, 0.0)
    signs = np.sign(rows.sum(axis=0))
    signs[signs == 0] = np.sign(signs.sum())
    agree = np.where(signs[None] > 0, rows > 0, rows < 0) * rows
    value = {
        "sum": agree.sum(axis=0),
        "mean": agree.sum(axis=0) / np.maximum((agree != 0).sum(axis=0), 1),
        "max": np.abs(agree).max(axis=0) * signs,
    }[function]
    found = merge(tree, "ties", semantics="fusion_bench", density=density, merge_func=function)
    for name, expected in unflat(0.3 * value, tree).items():
        np.testing.assert_allclose(found[name], expected, rtol=2e-6, atol=1e-7)
