"""One candidate's step, and the same step mapped over all candidates: the one compiled program of a run."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, PyTree

from unlearnjax.adapters.protocol import Adapter
from unlearnjax.data.tokens import Store, gather
from unlearnjax.distributed.mesh import CANDIDATE
from unlearnjax.distributed.rules import along_rows, cut_by, gathered, of_candidates, take_rows, whole
from unlearnjax.models.layers import pick
from unlearnjax.models.protocol import WHERE_IT_IS, Dropout, Model, Spread
from unlearnjax.objectives.objective import Memory, Objective, answer_scores, evaluate, score, unscored
from unlearnjax.training.hyperparameters import Hyperparameters
from unlearnjax.training.state import State, apply_update, choose


class Task(NamedTuple):
    """What is fixed for a run and known when it is compiled.

    `variants`: adapters that candidates have in place of `adapter`, each with their places among the N, all N in one of
    them. Their trainable trees have the same shapes: other layers, as many.
    `mesh`: the devices that share the work, where there are several.
    """

    model: Model
    adapter: Adapter
    objective: Objective
    use_dropout: bool
    tokens_at_once: int | None = None  # see `together`
    variants: tuple[tuple[Adapter, tuple[int, ...]], ...] = ()
    keep_best: bool = False  # see `unlearnjax.training.best`
    mesh: Mesh | None = None


class Work(NamedTuple):
    """One candidate's part of a step (stacked: all candidates'). Rows are -1 where a slot is empty."""

    rows: dict[str, Int[Array, " rows"]]
    micro: Int[Array, " rows"]
    micro_weight: Float[Array, " rows"]
    update: Bool[Array, ""]
    epoch: Int[Array, ""]
    share: Float[Array, ""]  # of the learning rate
    restart: Bool[Array, ""]  # of the optimizer, after the step's update


class Metrics(NamedTuple):
    """This step's share of its update's loss; sum the steps of an update."""

    loss: Float[Array, ""]
    terms: dict[str, Float[Array, ""]]
    gradient_norm: Float[Array, ""]  # of the accumulated gradient; meaningful where the step ends an update


def loss_of(
    task: Task, params: PyTree, trainable: PyTree, stores: dict[str, Store], work: Work, h: Hyperparameters,
    state: State, width: int, answers: int,
) -> tuple[Float[Array, ""], tuple[dict[str, Array], Memory]]:  # fmt: skip
    """The forward pass over both sides' rows at once, the token scores at the answers, the weighted terms."""
    sides = task.objective.sides
    variables = task.adapter.apply(params, trainable, h)
    take = functools.partial(take_rows, task.mesh)
    taken = {s: gather(stores[s], work.rows[s], work.micro, width, answers, take) for s in sides}
    tokens = along_rows(task.mesh, jnp.concatenate([taken[s][0] for s in sides], axis=0))
    at = jnp.concatenate([taken[s][1] for s in sides], axis=0)
    dropout = None
    if task.use_dropout:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(1), h.init_seed), state.micro_steps)
        dropout = Dropout(key, h.dropout)
    everywhere = {s for s in sides if "every" in task.objective.reads(s)}
    # Right padding needs no mask: what is real never looks to its right.
    spread = WHERE_IT_IS
    if task.mesh is not None:
        spread = Spread(functools.partial(along_rows, task.mesh), functools.partial(gathered, task.mesh))
    forward = functools.partial(task.model.forward, variables.params, variables.lora, dropout=dropout, spread=spread)
    split = lambda x: jnp.split(x, len(sides), axis=0)  # noqa: E731
    middles: Sequence[Array | None] = [None] * len(sides)
    last = task.model.config.layers
    layer = task.objective.layer
    entering, layers = tokens, (0, last)
    if layer is not None:
        entering, layers = forward(tokens, layers=(0, layer)).hidden, (layer, last)
        middles = split(entering)
    if task.objective.shallow:
        scores = {s: unscored(taken[s][2], middle) for s, middle in zip(sides, middles, strict=True)}
    else:
        hidden = forward(entering, layers=layers, at=None if everywhere else at).hidden
        picked = along_rows(task.mesh, pick(hidden, at) if everywhere else hidden)
        head = task.model.head(variables.params)
        targets = jnp.concatenate([taken[s][2].targets for s in sides], axis=0)
        answered = answer_scores(picked, head, targets, task.adapter.trains_head)
        scores = {}
        for side, part, likelihood, total, whole, middle in zip(
            sides, split(picked), *map(split, answered), split(hidden), middles, strict=True
        ):
            every = whole if side in everywhere else None
            reads = task.objective.reads(side)
            own = score(part, (likelihood, total), head, taken[side][2], task.adapter.trains_head, every, reads)
            scores[side] = own._replace(layer_hidden=middle)
    return evaluate(
        task.objective, scores, {s: taken[s][2] for s in sides}, work.micro_weight, h, state.multipliers,
        state.memory, work.epoch,
    )  # fmt: skip


def accumulate(
    task: Task, params: PyTree, stores: dict[str, Store], state: State, work: Work, h: Hyperparameters,
    width: int, answers: int,
) -> tuple[State, Metrics]:  # fmt: skip
    """One candidate's gradient of one step, added to what it has accumulated."""
    wrt = lambda t: loss_of(task, params, t, stores, work, h, state, width, answers)  # noqa: E731
    (loss, (terms, memory)), gradient = jax.value_and_grad(wrt, has_aux=True)(state.trainable)
    active = jnp.any(next(iter(work.rows.values())) >= 0)
    alive = state.alive & (jnp.isfinite(loss) | ~active)
    summed = jax.tree.map(lambda a, g: a + g, state.gradient, gradient)
    after = state._replace(
        gradient=choose(active & alive, summed, state.gradient),
        micro_steps=state.micro_steps + active.astype(jnp.int32),
        alive=alive,
        violations={t: v + jnp.where(active & alive, terms[t], 0.0) for t, v in state.violations.items()},
        memory=choose(active & alive, dict(memory), state.memory),
    )
    return after, Metrics(loss, terms, jnp.zeros((), jnp.float32))


# On a CPU a pass is fastest while its activations are near the caches: 8 candidates of 2048 tokens each took a fifth
# less time by twos than all together, and a quarter of the memory. An accelerator is fed by more rows.
CPU_TOKENS_AT_ONCE = 4096


def together(task: Task, candidates: int, tokens: int, devices: int = 1) -> int:
    """How many candidates go through the model at once, in groups of like size.

    Args:
      candidates: N, or those that each of `devices` has; then all groups are of one size.
      tokens: of one candidate in the step. The task's `tokens_at_once` bounds a group's tokens, though a group has one
        candidate at least; None is no bound on accelerators and CPU_TOKENS_AT_ONCE on a CPU.
    """
    most = task.tokens_at_once
    if most is None:
        most = CPU_TOKENS_AT_ONCE if jax.default_backend() == "cpu" else candidates * tokens
    return group_size(candidates, most // tokens, devices)


def group_size(candidates: int, most: int, devices: int = 1) -> int:
    """How many of so many candidates go at once, `most` of them (at least 1), in groups of like size; of one size where
    each of several devices has its own."""
    groups = -(-candidates // max(1, most))
    group = -(-candidates // groups)
    return group if devices == 1 else max(d for d in range(1, group + 1) if candidates % d == 0)


def mapped(task: Task, one: Callable[..., PyTree], stacked: tuple[PyTree[Array], ...], tokens: int) -> PyTree[Array]:
    """`one` of each of a stack of candidates, in groups (`together`) that have as many of every device's candidates."""
    candidates = jax.tree.leaves(stacked)[0].shape[0]
    sizes = {} if task.mesh is None else task.mesh.shape
    devices = math.prod(sizes[axis] for axis in cut_by("candidate", candidates, sizes))
    side_by_side = jax.vmap(one, spmd_axis_name=CANDIDATE if devices > 1 else None)
    own = candidates // devices
    group = together(task, own, tokens, devices)
    if group == own:
        return side_by_side(*stacked)
    if devices == 1:
        return jax.lax.map(lambda x: one(*x), stacked, batch_size=group if group > 1 else None)

    def grouped(x: Array) -> Array:
        x = x.reshape(devices, own // group, group, *x.shape[1:])
        return jnp.swapaxes(x, 0, 1).reshape(own // group, devices * group, *x.shape[3:])

    def back(x: Array) -> Array:
        x = x.reshape(own // group, devices, group, *x.shape[2:])
        return jnp.swapaxes(x, 0, 1).reshape(candidates, *x.shape[3:])

    return jax.tree.map(back, jax.lax.map(lambda x: side_by_side(*x), jax.tree.map(grouped, stacked)))


def by_variant(task: Task, run: Callable[[Task, PyTree], PyTree], stacked: PyTree[Array]) -> PyTree[Array]:
    """`run` of a stack of candidates, for each variant's candidates apart where the task has variants."""
    if not task.variants:
        return run(task, stacked)
    parts = []
    for adapter, places in task.variants:
        chosen = np.asarray(places, np.int32)
        parts.append(run(task._replace(adapter=adapter, variants=()), jax.tree.map(lambda x, c=chosen: x[c], stacked)))
    order = [place for _, own in task.variants for place in own]
    whole = jax.tree.map(lambda *xs: jnp.concatenate(xs), *parts)
    back = np.argsort(order)
    return whole if order == sorted(order) else jax.tree.map(lambda x: x[back], whole)


def step(
    task: Task, params: PyTree, stores: dict[str, Store], states: State, work: Work, h: Hyperparameters,
    width: int, answers: int,
) -> tuple[State, Metrics]:  # fmt: skip
    """All candidates' step: everything with an axis N is mapped, the base and the rows are shared.

    One candidate's code never mentions N. The update is skipped in steps that end no candidate's accumulation.
    """
    tokens = width * sum(x.shape[1] for x in work.rows.values())

    def gradients(own: Task, stacked: tuple[State, Work, Hyperparameters]) -> tuple[State, Metrics]:
        one = lambda s, w, c: accumulate(own, params, stores, s, w, c, width, answers)  # noqa: E731
        return mapped(own, one, stacked, tokens)

    # What a gradient leaves as it is goes around the groups: they would copy it.
    after, metrics = by_variant(task, gradients, (states._replace(moments=(), best=()), work, h))
    states = after._replace(trainable=states.trainable, moments=states.moments, best=states.best)

    def update(states: State) -> tuple[State, Array]:
        return jax.vmap(apply_update)(states, work.update, h, work.share, work.restart)

    def skip(states: State) -> tuple[State, Array]:
        return states, jnp.zeros(work.update.shape, jnp.float32)

    states, norms = jax.lax.cond(jnp.any(work.update), update, skip, states)
    return states, metrics._replace(gradient_norm=norms)


def states_shardings(task: Task, states: State) -> PyTree:
    """Where stacked states (or their shapes) lie on the task's mesh."""
    assert task.mesh is not None
    return of_candidates(task.mesh, task.model.abstract(jnp.float32), states)


def compiled_step(task: Task) -> Any:
    """`step` jitted for a task: (params, stores, states, work, h, width, answers); the states' buffers are donated."""

    def run(params: Any, stores: Any, states: Any, work: Any, h: Any, width: int, answers: int) -> Any:
        states, metrics = step(task, params, stores, states, work, h, width, answers)
        if task.mesh is None:
            return states, metrics
        constrain = jax.lax.with_sharding_constraint
        return constrain(states, states_shardings(task, states)), constrain(metrics, whole(task.mesh))

    return jax.jit(run, static_argnums=(5, 6), donate_argnums=(2,))
