"""Adding a delta to weights."""

import jax
import jax.numpy as jnp
from jaxtyping import PyTree


def add_delta(params: PyTree, delta: PyTree) -> PyTree:
    """params + delta at the delta's paths (summed in float32, cast back); other leaves are shared, not copied."""
    changes = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(delta)}

    def leaf(path: tuple, p: jax.Array) -> jax.Array:
        d = changes.pop(jax.tree_util.keystr(path), None)
        return p if d is None else (p.astype(jnp.float32) + d.astype(jnp.float32)).astype(p.dtype)

    out = jax.tree_util.tree_map_with_path(leaf, params)
    if changes:
        raise ValueError(f"the delta has leaves that the parameters lack: {', '.join(sorted(changes))}")
    return out
