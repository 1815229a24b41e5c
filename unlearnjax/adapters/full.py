"""Every weight trains: the candidate's arrays are the parameters themselves."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from unlearnjax.adapters.protocol import Adapter
from unlearnjax.models.protocol import Variables
from unlearnjax.training.hyperparameters import Hyperparameters


def full() -> Adapter:
    """Full fine-tuning. The trainable tree is a float32 copy of the parameters; each candidate holds its own."""

    def init(key: Array, params: PyTree, h: Hyperparameters) -> PyTree:
        return jax.tree.map(lambda p: p.astype(jnp.float32) + 0.0, params)

    def apply(params: PyTree, trainable: PyTree, h: Hyperparameters) -> Variables:
        return Variables(jax.tree.map(lambda p, t: t.astype(p.dtype), params, trainable))

    def delta(params: PyTree, trainable: PyTree, h: Hyperparameters) -> PyTree:
        return jax.tree.map(lambda p, t: t - p.astype(jnp.float32), params, trainable)

    return Adapter("full", init, apply, delta, trains_head=True)
