"""One candidate's update of an image model, and the same for a group of candidates, over one or several steps."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from unlearnjax.data.augment import augment
from unlearnjax.data.labelled import Labelled
from unlearnjax.models.vision.net import Net
from unlearnjax.training.hyperparameters import index, learning_rate
from unlearnjax.training.images.settings import Settings
from unlearnjax.training.state import ADAM, choose, global_norm


class Task(NamedTuple):
    """What is fixed for a run and known when it is compiled.

    crops, operations: whether any candidate crops, and RandAugment's largest N among them; augments: whether any does.
    masked: whether gradients are multiplied by a mask. sparse: whether any candidate has an l1 weight.
    """

    net: Net
    optimizer: str
    by_batch: bool
    augments: bool
    crops: bool
    operations: int
    masked: bool
    sparse: bool
    mapping: str


class State(NamedTuple):
    """One candidate between two updates (stacked: a group's)."""

    trained: PyTree[Array]
    moments: Any
    statistics: PyTree[Array]  # BatchNorm's; empty where there are none
    updates: Int[Array, ""]
    alive: Bool[Array, ""]  # False from the first update on whose loss, gradient or result was not finite


class Work(NamedTuple):
    """One candidate's batch: rows of the data, and what each counts (all 0: no update)."""

    rows: Int[Array, " batch"]
    weight: Float[Array, " batch"]


def init_state(optimizer: str, trained: PyTree[Array], statistics: PyTree[Array]) -> State:
    """A candidate before its first update."""
    with jax.numpy_dtype_promotion("standard"):
        moments = ADAM.init(trained) if optimizer == "adamw" else jax.tree.map(jnp.zeros_like, trained)
    return State(trained, moments, statistics, jnp.zeros((), jnp.int32), jnp.ones((), jnp.bool_))


def cross_entropy(
    logits: Float[Array, "batch classes"], labels: Int[Array, " batch"], smoothing: Float[Array, ""]
) -> Float[Array, " batch"]:
    """Each row's cross-entropy to its label, a share `smoothing` of it spread evenly over all classes (torch's)."""
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    own = jnp.take_along_axis(log_p, labels[:, None], axis=-1)[:, 0]
    return -(1.0 - smoothing) * own - smoothing * jnp.mean(log_p, axis=-1)


def update(
    task: Task, data: Labelled, fixed: PyTree[Array], state: State, work: Work, h: Settings, mask: PyTree[Array] | None
) -> tuple[State, Float[Array, ""]]:
    """One candidate's update, and its loss before it (nan where it took none)."""
    fixed = {**fixed, "statistics": state.statistics}
    pixels = data.pixels[work.rows].astype(jnp.float32)
    if task.augments:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(2), h.seed), state.updates)
        fill = tuple(float(round(255 * mean)) for mean in task.net.mean)  # as timm takes its own
        pixels = augment(key, pixels, h.strength, most_operations=task.operations, crops=task.crops, fill=fill)
    counted = jnp.sum(work.weight)
    active = counted > 0

    def objective(trained: PyTree[Array]) -> tuple[Float[Array, ""], tuple[Float[Array, ""], PyTree[Array]]]:
        logits, moved = task.net.logits(trained, fixed, pixels, task.by_batch)
        rows = cross_entropy(logits, data.labels[work.rows], h.label_smoothing)
        loss = jnp.sum(rows * work.weight) / jnp.maximum(counted, 1.0)
        value = h.sign * loss
        if task.sparse:
            magnitudes = sum((jnp.sum(jnp.abs(x)) for x in jax.tree.leaves(trained)), jnp.zeros((), jnp.float32))
            value = value + h.l1 * (1.0 - state.updates.astype(jnp.float32) / h.total_updates) * magnitudes
        return value, (loss, moved["statistics"])

    (value, (loss, moved)), gradient = jax.value_and_grad(objective, has_aux=True)(state.trained)
    if task.masked:
        gradient = jax.tree.map(jnp.multiply, gradient, mask)
    norm = global_norm(gradient)
    scale = jnp.where(norm > h.max_grad_norm, h.max_grad_norm / jnp.maximum(norm, 1e-12), 1.0)
    gradient = jax.tree.map(lambda g: g * scale, gradient)
    rate = learning_rate(h, state.updates)
    if task.optimizer == "adamw":  # torch's AdamW: decoupled decay
        with jax.numpy_dtype_promotion("standard"):
            direction, moments = ADAM.update(gradient, state.moments)
        step = jax.tree.map(lambda d, p: d + h.weight_decay * p, direction, state.trained)
    else:  # torch's SGD: the decay is part of the gradient, and so of the momentum
        decayed = jax.tree.map(lambda g, p: g + h.weight_decay * p, gradient, state.trained)
        moments = step = jax.tree.map(lambda m, g: h.momentum * m + g, state.moments, decayed)
    if task.masked:
        step = jax.tree.map(jnp.multiply, step, mask)
    trained = jax.tree.map(lambda p, s: p - rate * s, state.trained, step)
    # What a step leads to counts too: the next one would find it too late. (Moments are finite where these are.)
    results = (norm, value, trained, moved if task.by_batch else ())
    finite = functools.reduce(jnp.logical_and, [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(results)])
    took = active & finite & state.alive
    after = State(
        choose(took, trained, state.trained), choose(took, moments, state.moments),
        choose(took, moved, state.statistics), state.updates + took.astype(jnp.int32), state.alive & (finite | ~active),
    )  # fmt: skip
    return after, jnp.where(active & state.alive, loss, jnp.nan)


def group_update(
    task: Task,
    data: Labelled,
    fixed: PyTree[Array],
    states: State,
    work: Work,
    h: Settings,
    masks: PyTree[Array] | None,
) -> tuple[State, Float[Array, " N"]]:
    """`update` for a group: a leading axis N on states, work, settings, masks. One candidate's code never mentions N.

    Convolutions of several kernels at once become grouped ones under vmap, which a CPU does many times slower than one
    after another ("unroll").
    """
    one = functools.partial(update, task, data, fixed)
    if task.mapping == "vmap":
        return jax.vmap(one)(states, work, h, masks)
    each = [one(*(index(x, i) for x in (states, work, h, masks))) for i in range(work.rows.shape[0])]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def run_steps(
    task: Task,
    data: Labelled,
    fixed: PyTree[Array],
    states: State,
    work: Work,
    h: Settings,
    masks: PyTree[Array] | None,
) -> tuple[State, Float[Array, "steps N"]]:
    """As many updates as `work` has on its leading axis (rows are [steps, N, batch]); one is no loop, as CPUs want it.

    The states' buffers are written over.
    """
    if work.rows.shape[0] == 1:
        states, losses = group_update(task, data, fixed, states, index(work, 0), h, masks)
        return states, losses[None]
    return jax.lax.scan(lambda s, w: group_update(task, data, fixed, s, w, h, masks), states, work)
