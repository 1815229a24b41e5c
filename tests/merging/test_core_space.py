"""Core space against the paper's construction in numpy (float64), and truncation against a full SVD."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unlearnjax.errors import UserError
from unlearnjax.merging import core_space, lora_delta, merge, merge_core, merge_lora, to_lora, truncate_lora

DRAW = np.random.default_rng(11)
LAYERS, IN, OUT, RANK, N = 2, 13, 9, 3, 3
SCALE = np.array([0.5, 2.0, 1.0], np.float32)


def stack(n=N, shared=0.0):
    """Adapters of two linears; `shared`: how much of A is the same in all."""

    def pair(inner, outer):
        a = DRAW.normal(size=(n, LAYERS, RANK, inner)) + shared * DRAW.normal(size=(1, LAYERS, RANK, inner))
        return {"a": a.astype(np.float32), "b": DRAW.normal(size=(n, LAYERS, outer, RANK)).astype(np.float32)}

    return {"layers": {"attention": {"q": pair(IN, OUT)}, "mlp": {"up": pair(IN, 6)}}}  # 6 < N * RANK


def deltas_of(tree, scale=SCALE):
    return jax.tree.map(np.asarray, lora_delta(tree, scale))


def one(tree):
    return jax.tree.map(np.asarray, lora_delta(tree, 1.0))


def close(found, expected, tolerance=1e-4):
    jax.tree.map(lambda f, e: np.testing.assert_allclose(f, e, atol=tolerance, rtol=tolerance), found, expected)


def reference(pair, layer, rule):
    """U_ref M V_ref with M_i = U_ref^T scale_i B_i A_i V_ref, as in the paper's figure 2, merged by `rule`."""
    a, b = (pair[name].astype(np.float64)[:, layer] for name in ("a", "b"))
    u = np.linalg.svd(np.concatenate(list(b), axis=1), full_matrices=False)[0]
    v = np.linalg.svd(np.concatenate(list(a), axis=0), full_matrices=False)[2]
    cores = np.stack([SCALE[i] * u.T @ b[i] @ a[i] @ v.T for i in range(N)])
    return u @ np.asarray(rule(cores.astype(np.float32)), np.float64) @ v


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("ties", {"density": 0.4, "semantics": "peft"}),
        ("ties", {"density": 0.4, "semantics": "mergekit"}),
        ("magnitude_prune", {"density": 0.3}),
        ("consensus", {}),
        ("magmax", {"lambda_": 0.5}),
    ],
)
def test_equals_the_papers_construction(method, options):
    tree = stack()
    found = one(merge_core(tree, SCALE, method, **options))
    for block, name in (("attention", "q"), ("mlp", "up")):
        for layer in range(LAYERS):
            expected = reference(tree["layers"][block][name], layer, lambda x: merge({"w": x}, method, **options)["w"])
            gap = np.linalg.norm(found["layers"][block][name]["weight"][layer] - expected)
            # Bases in float32 turn by their rounding over the gaps between singular values.
            assert gap < 2e-3 * np.linalg.norm(expected)


def test_nothing_is_lost():
    tree = stack()
    whole = deltas_of(tree)
    for path, core in core_space(tree, SCALE).items():
        block, name = path.split("/")[1:]
        again = np.einsum("lok,nlkj,lji->nloi", core.left, core.cores, core.right)
        np.testing.assert_allclose(again, whole["layers"][block][name]["weight"], atol=1e-4)
        for basis in (np.swapaxes(core.left, 1, 2), core.right):
            np.testing.assert_allclose(basis @ np.swapaxes(basis, 1, 2), [np.eye(basis.shape[1])] * LAYERS, atol=1e-5)


@pytest.mark.parametrize("weights", [None, [1.0, -0.5, 0.25]])
def test_a_weighted_sum_is_the_deltas(weights):
    tree = stack()
    found = one(merge_lora(tree, SCALE, "linear", "core", weights=weights))
    close(found, merge_lora(tree, SCALE, "linear", "delta", weights=weights))


def test_padding_is_no_direction():
    """Ranks 1, 3 and 2: the bases have 6 directions, and density counts no entries of the padding."""
    tree, ranks = stack(), (1, 3, 2)
    for pair in (tree["layers"]["attention"]["q"], tree["layers"]["mlp"]["up"]):
        for i, r in enumerate(ranks):
            pair["a"][i, :, r:], pair["b"][i, :, :, r:] = 0, 0
    found = core_space(tree, SCALE, ranks)
    assert found["layers/attention/q"].cores.shape == (N, LAYERS, 6, 6)
    assert core_space(tree, SCALE)["layers/attention/q"].cores.shape == (N, LAYERS, 9, 9)
    close(one(merge_core(tree, SCALE, "linear", ranks=ranks)), merge_lora(tree, SCALE, "linear", "delta"))


@pytest.mark.parametrize("rank", [1, 2, 4, 7])
def test_truncation_is_a_full_svds(rank):
    tree = jax.tree.map(lambda x: x[0], stack())
    found = truncate_lora(tree, rank)
    expected = to_lora(one(tree), rank)
    assert found["layers"]["attention"]["q"]["a"].shape == (LAYERS, rank, IN)
    assert found["layers"]["mlp"]["up"]["b"].shape == (LAYERS, 6, rank)
    close(one(found), one(expected.lora))


def test_compressed_bases_of_one_candidate_are_its_best_approximation():
    tree = stack(1)
    found = one(merge_core(tree, SCALE[:1], "linear", compress=2))
    close(found, one(to_lora(jax.tree.map(lambda x: x[0], deltas_of(tree, SCALE[:1])), 2).lora))


def test_compression_keeps_more_than_separate_bases_and_gives_its_rank():
    """Of all candidates together, at least what the leading directions of each side alone keep."""
    tree = stack(shared=2.0)
    merged = merge_core(tree, SCALE, "ties", density=0.5, compress=2)
    assert merged["layers"]["attention"]["q"]["a"].shape == (LAYERS, 2, IN)
    whole, small = core_space(tree, SCALE), core_space(tree, SCALE, compress=2)
    for path, core in whole.items():
        m = np.swapaxes(np.asarray(core.cores, np.float64), 0, 1)
        for layer in range(LAYERS):
            left = np.linalg.eigh(sum(x @ x.T for x in m[layer]))[1][:, -2:]
            right = np.linalg.eigh(sum(x.T @ x for x in m[layer]))[1][:, -2:]
            separate = sum(np.sum((left.T @ x @ right) ** 2) for x in m[layer])
            kept = float(jnp.sum(small[path].cores[:, layer] ** 2))
            assert kept >= separate * (1 - 1e-5) and kept <= np.sum(m[layer] ** 2)


def test_errors():
    tree = stack()
    with pytest.raises(UserError, match=r"ranks \[1, 2\] do not fit 3 candidates"):
        core_space(tree, SCALE, (1, 2))
    with pytest.raises(UserError, match="rank up to 3"):
        core_space(tree, SCALE, (1, 2, 4))
    with pytest.raises(UserError, match="compress is 0"):
        core_space(tree, SCALE, compress=0)
    with pytest.raises(UserError, match="ranks and compress are for space 'core', not 'delta'"):
        merge_lora(tree, SCALE, "linear", "delta", compress=2)
    with pytest.raises(UserError, match="does not work in space 'core'"):
        merge_lora(tree, SCALE, "arcee_fusion", "core")
    with pytest.raises(UserError, match="rank is 0"):
        truncate_lora(jax.tree.map(lambda x: x[0], tree), 0)
