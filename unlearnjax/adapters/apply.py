"""Adding a delta to weights."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import PyTree

from unlearnjax.distributed.processes import put


def add_delta(params: PyTree, delta: PyTree) -> PyTree:
    """params + delta at the delta's paths (summed in float32, cast back); other leaves are shared, not copied.

    On several devices each sum lies where its parameter does, wherever the delta lay.
    """
    changes = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(delta)}

    def leaf(path: tuple, p: jax.Array) -> jax.Array:
        d = changes.pop(jax.tree_util.keystr(path), None)
        return p if d is None else _added(p, d)

    out = jax.tree_util.tree_map_with_path(leaf, params)
    if changes:
        raise ValueError(f"the delta has leaves that the parameters lack: {', '.join(sorted(changes))}")
    return out


def _added(p: jax.Array, d: Any) -> jax.Array:
    place = getattr(p, "sharding", None)
    if isinstance(place, NamedSharding) and place.mesh.size > 1 and not isinstance(p, jax.core.Tracer):
        # Left to XLA, the sum may lie whole on every device.
        return _sum_at(place)(p, put(d, place))
    return _sum(p, d)


def _sum(p: jax.Array, d: Any) -> jax.Array:
    return (p.astype(jnp.float32) + d.astype(jnp.float32)).astype(p.dtype)


@functools.lru_cache(maxsize=64)
def _sum_at(place: NamedSharding) -> Any:
    return jax.jit(_sum, out_shardings=place)
