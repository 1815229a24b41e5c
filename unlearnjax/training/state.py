"""One candidate's training state, and how an update changes it."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree

from unlearnjax.adapters.protocol import Adapter
from unlearnjax.training.hyperparameters import Hyperparameters, learning_rate


class Best(NamedTuple):
    """A candidate when its loss on a sample of rows was lowest so far: after `updates` updates."""

    trainable: PyTree[Float[Array, "..."]]
    loss: Float[Array, ""]
    updates: Int[Array, ""]


class State(NamedTuple):
    """Arrays only; stacked over candidates, a leading axis N on every leaf."""

    trainable: PyTree[Float[Array, "..."]]
    moments: Any  # optax's Adam state
    gradient: PyTree[Float[Array, "..."]]  # accumulated since the last update
    updates: Int[Array, ""]
    micro_steps: Int[Array, ""]  # steps that held a row of this candidate's; keys the dropout
    alive: Bool[Array, ""]  # False from the first non-finite loss or gradient norm on
    multipliers: dict[str, Float[Array, ""]]  # of the constraints among the terms, by name; none: empty
    violations: dict[str, Float[Array, ""]]  # the constraints' losses, accumulated since the last update
    memory: dict[str, dict[str, Float[Array, ""]]]  # of terms that carry something from step to step; none: empty
    best: Any = ()  # a `Best`, where it is kept


ADAM = optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8)


def init_state(
    adapter: Adapter, params: PyTree, h: Hyperparameters, memory: Mapping[str, Sequence[str]] = MappingProxyType({}),
    keep_best: bool = False,
) -> State:  # fmt: skip
    """A fresh candidate. Its adapter depends on its `init_seed` and on nothing else.

    Args:
      memory: of the terms that remember, the names of what they do.
    """
    trainable = adapter.init(jax.random.fold_in(jax.random.key(0), h.init_seed), params, h)
    with jax.numpy_dtype_promotion("standard"):
        moments = ADAM.init(trainable)
    zeros = jax.tree.map(jnp.zeros_like, trainable)
    zero = jnp.zeros((), jnp.int32)
    multipliers = {t: own["multiplier"] + 0.0 for t, own in h.term_parameters.items() if "multiplier" in own}
    violations = {t: jnp.zeros((), jnp.float32) for t in multipliers}
    kept = {term: {name: jnp.zeros((), jnp.float32) for name in names} for term, names in memory.items()}
    # A buffer of its own: the step takes over the trainable's.
    best = (
        Best(jax.tree.map(lambda x: x + 0.0, trainable), jnp.asarray(jnp.inf, jnp.float32), zero) if keep_best else ()
    )
    return State(trainable, moments, zeros, zero, zero, jnp.ones((), jnp.bool_), multipliers, violations, kept, best)


def choose(condition: Bool[Array, ""], yes: PyTree, no: PyTree) -> PyTree:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)


def global_norm(tree: PyTree) -> Float[Array, ""]:
    return jnp.sqrt(sum((jnp.sum(jnp.square(x)) for x in jax.tree.leaves(tree)), jnp.zeros((), jnp.float32)))


def apply_update(
    state: State, update: Bool[Array, ""], h: Hyperparameters, share: Float[Array, ""] | float = 1.0,
    restart: Bool[Array, ""] | bool = False,
) -> tuple[State, Float[Array, ""]]:  # fmt: skip
    """AdamW (decoupled decay) with the accumulated gradient where `update` holds; returns the gradient norm too.

    The constraints' multipliers take their step of dual ascent with it. The learning rate is multiplied by `share`;
    after an update with `restart` the next one finds the optimizer as new.

    A non-finite norm marks the candidate as diverged and leaves everything else as it was.
    """
    norm = global_norm(state.gradient)
    finite = jnp.isfinite(norm)
    clip = jnp.where(norm > h.max_grad_norm, h.max_grad_norm / jnp.maximum(norm, 1e-12), 1.0)
    gradient = jax.tree.map(lambda g: g * clip, state.gradient)
    with jax.numpy_dtype_promotion("standard"):
        direction, moments = ADAM.update(gradient, state.moments)
    rate = learning_rate(h, state.updates) * share
    trainable = jax.tree.map(lambda p, d: p - rate * (d + h.weight_decay * p), state.trainable, direction)
    took = update & finite & state.alive
    fresh = jax.tree.map(jnp.zeros_like, moments)  # as `ADAM.init` has them
    moments = choose(jnp.asarray(restart), fresh, moments)
    climbed = {
        term: jnp.maximum(0.0, m + h.term_parameters[term]["rate"] * state.violations[term])
        for term, m in state.multipliers.items()
    }
    return State(
        choose(took, trainable, state.trainable),
        choose(took, moments, state.moments),
        jax.tree.map(lambda g: jnp.where(update, 0.0, g), state.gradient),
        state.updates + took.astype(jnp.int32),
        state.micro_steps,
        state.alive & (finite | ~update),
        choose(took, climbed, state.multipliers),
        {term: jnp.where(update, 0.0, v) for term, v in state.violations.items()},
        state.memory,
        state.best,
    ), norm
