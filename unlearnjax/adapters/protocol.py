"""What is trainable, as functions of the frozen base parameters and one candidate's own arrays."""

from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Array, PyTree

from unlearnjax.models.protocol import Variables
from unlearnjax.training.hyperparameters import Hyperparameters


class Adapter(NamedTuple):
    """One candidate's trainable part; mapping over candidates is the caller's.

    `init(key, params, h) -> trainable`: float32 arrays.
    `apply(params, trainable, h) -> Variables`: what the model's forward takes.
    `delta(params, trainable, h) -> pytree`: the change of the weights, float32, at the base's paths and shapes; only
      the leaves that change.
    `trains_head`: the output embedding changes, so it needs a gradient and the base's E_q[w] does not serve for the KL.
    """

    name: str
    init: Callable[[Array, PyTree, Hyperparameters], PyTree]
    apply: Callable[[PyTree, PyTree, Hyperparameters], Variables]
    delta: Callable[[PyTree, PyTree, Hyperparameters], PyTree]
    trains_head: bool
