"""The turning point, and the path's angles around it."""

import jax.numpy as jnp
import pytest

from unlearnjax.recipes.trajectory_step import _path, turning_point


def way(*means):
    return {"updates": list(range(len(means))), "forget": {"A": {"knowledge": [m - 0.1 for m in means]}},
            "retain": {"A": {"knowledge": [m + 0.1 for m in means]}}}  # fmt: skip


@pytest.mark.parametrize(("means", "index"), [
    ((0.9, 0.4, 0.2, 0.6), 2), ((0.9, 0.8, 0.7), None), ((0.1, 0.8, 0.7), None), ((0.5, 0.2, 0.2, 0.9), 1),
])  # fmt: skip
def test_the_turning_point_is_the_lowest_inner_waypoint(means, index):
    assert turning_point(way(*means)) == index


def test_angles_around_the_turning_point_by_hand():
    """Rank 1 in the plane: 0 to (1, 0), the turning point, and on to (1, 1)."""
    points = [{"layers": {"mlp": {"up": {"a": jnp.ones((1, 1, 1)), "b": jnp.asarray(b, jnp.float32).reshape(1, 2, 1)}}}}
              for b in ([1, 0], [1, 1])]  # fmt: skip
    found = _path(points, 1)
    expected = {"d1_d2": 90.0, "d1_d3": 45.0, "d2_d3": 45.0}
    assert found["length"] == pytest.approx([0, 1, 2**0.5])
    assert found["angles"]["whole"] == pytest.approx(expected, abs=1e-3)
    assert found["angles"]["by_module"]["mlp.up.0"] == pytest.approx(expected, abs=1e-3)
    assert _path(points, None)["angles"] is None
