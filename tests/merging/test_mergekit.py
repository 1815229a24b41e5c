"""Each method of mergekit's against what mergekit 0.1.4 itself computed (golden/make_mergekit.py), within 2e-6."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from unlearnjax.merging import merge, methods

DATA = json.loads((Path(__file__).parent / "golden" / "mergekit.json").read_text("utf-8"))
CASES = [pytest.param(c, id=f"{c['method']}-{i}") for i, c in enumerate(DATA["cases"])]
WITHOUT_BASE = {"nuslerp", "multislerp", "karcher"}  # on the models themselves: here origin = "zero"


def arrays(tree: dict) -> dict[str, np.ndarray]:
    return {name: np.asarray(x, np.float32) for name, x in tree.items()}


@pytest.mark.parametrize("case", CASES)
def test_equals_mergekit(case):
    base = arrays(DATA["base"])
    models = [arrays(m) for m in DATA["models"][: case["models"]]]
    if case["method"] == "slerp":  # mergekit's goes from the base model
        models = [base, *models]
    deltas = {name: np.stack([m[name] - base[name] for m in models]) for name in base}
    settings = {**case["each"], **case["settings"]}
    if case["method"] in WITHOUT_BASE:
        settings["origin"] = "base" if case["base"] else "zero"
    semantics = "mergekit" if "mergekit" in methods()[case["method"]].semantics else None
    found = merge(deltas, case["method"], semantics=semantics, weights=case["weights"], base=base, **settings)
    for name, expected in arrays(case["outputs"]).items():
        np.testing.assert_allclose(base[name] + np.asarray(found[name]), expected, rtol=2e-6, atol=2e-6)


def test_every_method_of_mergekits_is_here():
    random = {"dare_linear", "dare_ties", "della", "della_linear"}
    named = {case["method"] for case in DATA["cases"]} | random | {"ram", "ramplus_tl"}
    assert len(named) == 20 and named <= set(methods())


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_random_entries_are_rescaled_to_the_l1_norm(method):
    """mergekit's masked tensor times before / after, on this draw's own mask."""
    x = np.random.default_rng(0).normal(size=(1, 40, 30)).astype(np.float32)
    merged = np.asarray(merge({"w": x}, method, semantics="mergekit", density=0.3, key=jax.random.key(1))["w"])
    kept = merged != 0
    assert 0.2 < kept.mean() < 0.4
    np.testing.assert_allclose(merged, x[0] * kept * (np.abs(x).sum() / np.abs(x[0] * kept).sum()), rtol=1e-5)
    plain = merge({"w": x}, method, semantics="mergekit", density=0.3, rescale=False, key=jax.random.key(1))["w"]
    np.testing.assert_array_equal(plain, x[0] * kept)


def test_della_keeps_large_entries_more_often():
    """Per row the chance rises with the rank from density - epsilon to density + epsilon; "paper" divides by it."""
    rows, columns = 4000, 5
    x = np.tile(np.array([0.1, -0.2, 0.3, -0.4, 0.5], np.float32), (1, rows, 1))
    settings = {"density": 0.5, "epsilon": 0.4, "key": jax.random.key(2)}
    merged = np.asarray(merge({"w": x}, "della_linear", **settings)["w"])
    chances = np.linspace(0.1, 0.9, columns)
    error = 5 * np.sqrt(chances * (1 - chances) / rows)
    assert (np.abs((merged != 0).mean(axis=0) - chances) < error).all()
    kept = merged != 0
    np.testing.assert_allclose(merged, np.where(kept, x[0] / chances, 0), rtol=1e-5)
    whole = np.asarray(merge({"w": x}, "della_linear", semantics="mergekit", **settings)["w"])
    np.testing.assert_allclose(whole, x[0] * kept * (np.abs(x).sum() / np.abs(x[0] * kept).sum()), rtol=1e-5)
