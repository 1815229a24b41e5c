"""Full-rank training of some layers and sub-layers, everything else frozen (Selective Amnesia; last-k layers)."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from unlearnjax.adapters.lora import check_layers, widened
from unlearnjax.adapters.protocol import Adapter
from unlearnjax.distributed.processes import fetch
from unlearnjax.errors import check_known
from unlearnjax.models.config import ModelConfig
from unlearnjax.models.decoder import layer_of
from unlearnjax.models.protocol import Variables
from unlearnjax.training.hyperparameters import Hyperparameters

MODULES: dict[str, tuple[str, ...] | None] = {"mlp": ("mlp",), "self_attn": ("attention",), "all": None}


def change_on_host(params: PyTree[Array], trainable: PyTree[Array], layers: Sequence[int]) -> PyTree[np.ndarray]:
    """`delta` of the adapter that trained `layers`, made leaf by leaf in host memory, float32."""
    chosen = sorted(layers)

    def leaf(path: tuple, trained: Array) -> np.ndarray:
        base = params
        for key in path:
            base = base[key.key]
        whole = np.zeros(base.shape, np.float32)
        for place, layer in enumerate(chosen):
            now, before = fetch((trained[place], base[layer]))
            whole[layer] = now - np.asarray(before, np.float32)
        return whole

    return jax.tree_util.tree_map_with_path(leaf, trainable)


def restricted(config: ModelConfig, layers: Sequence[int], modules: str = "mlp") -> Adapter:
    """Train the parameters of some layers.

    Args:
      config: the decoder's sizes. layers: which, counted from 0. modules: `mlp`, `self_attn` (with its norms of queries
        and keys, and its biases) or `all` of a layer, its norms too.

    The trainable tree is {"layers": {block: ...}}, float32 copies stacked over the chosen layers: optimizer state is
    for these alone. `apply` gives layers taken apart (`Model.apart`), for a model whose layers are unrolled: the frozen
    ones stay the base's own arrays, shared by all candidates, and there is no backward pass below the lowest trained
    one. Embeddings, head and final norm stay frozen.

    Raises:
      UserError: no layer, one that the model does not have, one given twice, or unknown modules.
    """
    check_known([modules], MODULES, "modules", "adapter")
    chosen = check_layers(layers, config.layers)
    place = {layer: j for j, layer in enumerate(chosen)}

    def blocks(own: dict[str, Any]) -> dict[str, Any]:
        wanted = MODULES[modules]
        return {name: tree for name, tree in own.items() if wanted is None or name in wanted}

    def picked(params: PyTree[Array]) -> PyTree[Array]:
        """The base's values of what trains, float32."""
        trees = [blocks(layer_of(params["layers"], layer)) for layer in chosen]
        return {"layers": jax.tree.map(lambda *leaves: jnp.stack(leaves).astype(jnp.float32), *trees)}

    def init(key: Array, params: PyTree, h: Hyperparameters) -> PyTree:
        return picked(params)

    def apply(params: PyTree, trainable: PyTree, h: Hyperparameters) -> Variables:
        def mixed(i: int) -> dict[str, Any]:
            own: dict[str, Any] = layer_of(params["layers"], i)
            if i not in place:
                return own
            mine = jax.tree.map(lambda t, p: t[place[i]].astype(p.dtype), trainable["layers"], blocks(own))
            return {**own, **mine}

        return Variables({**params, "layers": tuple(mixed(i) for i in range(config.layers))})

    def delta(params: PyTree, trainable: PyTree, h: Hyperparameters) -> PyTree:
        changed = jax.tree.map(lambda t, p: t - p, trainable, picked(params))
        return widened(changed, chosen, config.layers)

    return Adapter(f"{modules} of layers {', '.join(map(str, chosen))}", init, apply, delta, trains_head=False)
