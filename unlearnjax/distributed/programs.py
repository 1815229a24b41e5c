"""The programs of a job as shapes on a mesh: what `plan` compiles for machines that are not there."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import PyTree

from unlearnjax.adapters.lora import lora
from unlearnjax.data.tokens import Reference, Store
from unlearnjax.distributed.rules import (
    cut_for_merging,
    filled_number,
    of_candidates,
    of_params,
    of_store,
    of_work,
    sharding,
    whole,
)
from unlearnjax.evaluation.generate import places, programs
from unlearnjax.merging.api import find_rule
from unlearnjax.merging.lora_space import merge_lora
from unlearnjax.models.abstract import shapes
from unlearnjax.models.config import ModelConfig, Remat
from unlearnjax.models.decoder import build
from unlearnjax.models.protocol import Model
from unlearnjax.objectives.objective import objective
from unlearnjax.training.hyperparameters import SCHEDULES, stack
from unlearnjax.training.state import init_state
from unlearnjax.training.step import Task, Work, compiled_step

ALL_AT_ONCE = 2**62  # of tokens or scores: no bound


class Workload(NamedTuple):
    """How much there is to do.

    micro_batch: rows of each side in a step, per candidate. length: tokens of a row; half of them are its answer's.
    set_tokens: of each of the two sets that stay on the devices. batch: rows that are generated at once, per candidate.
    slots: tokens of their prompts and answers. tokens_at_once: see `unlearnjax.training.step.together`; None: no bound.
    remat: what the backward pass recomputes; None: what `unlearnjax.models.decoder.build` does by default.
    copies: float32 numbers kept for each weight of an adapter: itself, its gradient, two moments, the best if that is
    kept. models: of the base's size that stay on the devices: itself, and a gold model.
    """

    candidates: int
    micro_batch: int = 4
    length: int = 256
    rank: int = 32
    terms: tuple[str, ...] = ("npo", "gdr", "klr")
    dtype: str = "bfloat16"
    set_tokens: int = 100_000
    batch: int = 8
    slots: int = 512
    tokens_at_once: int | None = None
    remat: Remat | None = None
    copies: int = 4
    models: int = 1


class Program(NamedTuple):
    """`lower()` gives what compiles. `held`: the arguments by kind, as shapes with their shardings. `beside`: what is
    on the devices meanwhile and no argument."""

    name: str
    lower: Any
    held: dict[str, PyTree[jax.ShapeDtypeStruct]]
    beside: dict[str, PyTree[jax.ShapeDtypeStruct]] = {}  # noqa: RUF012 (never written to)


def laid(tree: PyTree[Any], places: PyTree[Any]) -> Any:
    """Shapes with their shardings."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, places)


def bytes_on_a_device(tree: PyTree[jax.ShapeDtypeStruct]) -> int:
    """What a tree's shards take, without what a device's tiles pad."""

    def leaf(x: jax.ShapeDtypeStruct) -> int:
        shape = x.sharding.shard_shape(x.shape) if x.sharding is not None else x.shape
        size = x.dtype.itemsize if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else 8
        for n in shape:
            size *= n
        return size

    return sum(leaf(x) for x in jax.tree.leaves(tree))


def _hyperparameters(w: Workload) -> Any:
    own = {
        "learning_rate": 1e-4, "weight_decay": 0.01, "warmup_updates": 0, "total_updates": 1000,
        "schedule": SCHEDULES.index("linear"), "max_grad_norm": 1.0, "term_weights": dict.fromkeys(w.terms, 1.0),
        "beta": 0.1, "lora_alpha": w.rank, "lora_rank": w.rank, "dropout": 0.05, "init_seed": 0,
    }  # fmt: skip
    return jax.eval_shape(lambda: stack([own] * w.candidates))


def _model(config: ModelConfig, remat: Remat | None = None) -> Model:
    return build(config, remat=remat, scores_at_once=ALL_AT_ONCE)


def _base(model: Model, mesh: Mesh, dtype: str) -> PyTree[jax.ShapeDtypeStruct]:
    abstract = model.abstract(jnp.dtype(dtype))
    return laid(shapes(abstract), of_params(mesh, abstract))


def _store(mesh: Mesh, w: Workload, needs: frozenset[str], hidden: int) -> Store:
    rows, answers = max(1, w.set_tokens * 4 // w.length), w.set_tokens // 2

    def ints(n: int) -> Any:
        return jax.ShapeDtypeStruct((n,), jnp.int32)

    def floats(*n: int) -> Any:
        return jax.ShapeDtypeStruct(n, jnp.float32)

    said = Reference(nll=floats(rows) if "nll" in needs else None)
    if "distribution" in needs:
        said = said._replace(
            answer_offset=ints(rows), expectation=floats(answers, hidden), negative_entropy=floats(answers)
        )
    store = Store(ints(w.set_tokens), ints(rows), ints(rows), ints(rows), said)
    return laid(store, of_store(mesh, store))


def training_step(config: ModelConfig, mesh: Mesh, w: Workload) -> Program:
    """One step of all candidates' LoRAs on all linears, which ends an update."""
    model, wanted = _model(config, w.remat), objective(w.terms, config.layers)
    adapter = lora(config, tuple(config.linears), w.rank)
    at_once = ALL_AT_ONCE if w.tokens_at_once is None else w.tokens_at_once
    task = Task(model, adapter, wanted, True, at_once, mesh=mesh)
    params, h = _base(model, mesh, w.dtype), _hyperparameters(w)
    states = jax.eval_shape(lambda p, h: jax.vmap(lambda c: init_state(adapter, p, c))(h), params, h)
    states = laid(states, of_candidates(mesh, model.abstract(jnp.float32), states))
    h = laid(h, of_candidates(mesh, {}, h))
    stores = {s: _store(mesh, w, wanted.needs(s), config.hidden_size) for s in wanted.sides}
    n, rows = w.candidates, w.micro_batch

    def shape(dtype: Any, *size: int) -> Any:
        return jax.ShapeDtypeStruct((n, *size), dtype)

    work = Work(
        {s: shape(jnp.int32, rows) for s in wanted.sides}, shape(jnp.int32, rows), shape(jnp.float32, rows),
        shape(jnp.bool_), shape(jnp.int32), shape(jnp.float32), shape(jnp.bool_),
    )  # fmt: skip
    work = laid(work, of_work(mesh, work))
    held = {
        "base weights": params, "adapters": states.trainable, "optimizer": states.moments, "gradients": states.gradient,
        "data": (stores, work, h, states._replace(trainable=(), moments=(), gradient=())),
    }  # fmt: skip
    lower = lambda: compiled_step(task).lower(params, stores, states, work, h, w.length, w.length // 2)  # noqa: E731
    return Program("training step", lower, held)


def _adapters(model: Model, mesh: Mesh, w: Workload) -> PyTree[jax.ShapeDtypeStruct]:
    c = model.config
    tree: dict[str, Any] = {}
    for name, (block, out, inner) in c.linears.items():
        a, b = (w.candidates, c.layers, w.rank, inner), (w.candidates, c.layers, out, w.rank)
        pair = {"a": jax.ShapeDtypeStruct(a, jnp.float32), "b": jax.ShapeDtypeStruct(b, jnp.float32)}
        tree.setdefault(block, {})[name] = pair
    own = {"layers": tree}
    return laid(own, of_candidates(mesh, model.abstract(jnp.float32), own))


def generation_step(config: ModelConfig, mesh: Mesh, w: Workload) -> Program:
    """One new token of every row of every candidate, with their caches."""
    model = _model(config)
    w = w._replace(candidates=filled_number(mesh, w.candidates))
    params, adapters = _base(model, mesh, w.dtype), _adapters(model, mesh, w)
    run = programs(model, mesh)
    rows = lambda dtype, *size: jax.ShapeDtypeStruct((w.batch, *size), dtype)  # noqa: E731
    ends = jax.ShapeDtypeStruct((4,), jnp.int32, sharding=whole(mesh))
    state = jax.eval_shape(
        lambda *x: run.start(*x, None, count=w.candidates), params, adapters, rows(jnp.int32, w.slots),
        rows(jnp.int32, w.slots), rows(jnp.int32), ends,
    )  # fmt: skip
    state = laid(state, places(mesh, state))
    steps = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole(mesh))
    lower = lambda: run.run.lower(params, adapters, state, steps, ends, None, size=64)  # type: ignore[attr-defined]  # noqa: E731
    return Program("generation step", lower, {"base weights": params, "adapters": adapters, "cache": state})


def merge_step(config: ModelConfig, mesh: Mesh, w: Workload, method: str, settings: Mapping[str, Any]) -> Program:
    """The merge of all candidates in delta space: of the largest linear, or of all linears at once where the method's
    statistics are of the whole model.

    The base, the adapters as training laid them out, and the other linears' merged deltas stay on the devices beside.
    """
    _, rule = find_rule(method, settings.get("semantics"))
    largest = max(config.linears, key=lambda name: _size(config, name))
    names = list(config.linears) if rule.scope == "tree" else [largest]
    tree: dict[str, Any] = {}
    for name in names:
        block, out, inner = config.linears[name]
        sizes = {"a": (w.rank, inner), "b": (out, w.rank)}
        pair = {n: jax.ShapeDtypeStruct((w.candidates, config.layers, *s), jnp.float32) for n, s in sizes.items()}
        tree.setdefault(block, {})[name] = laid(pair, cut_for_merging(mesh, pair))
    tree = {"layers": tree}
    scale = jax.ShapeDtypeStruct((w.candidates,), jnp.float32, sharding=whole(mesh))

    def run(tree: PyTree[Any], scale: Any) -> PyTree[Any]:
        return merge_lora(tree, scale, method, "delta", mesh=mesh, **settings)

    model = _model(config)
    done = [_merged(config, mesh, name) for name in config.linears if name not in names]
    beside = {
        "base weights": _base(model, mesh, w.dtype), "candidates": _adapters(model, mesh, w), "other deltas": done,
    }  # fmt: skip
    what = "all linears" if rule.scope == "tree" else "one linear"
    return Program(f"{method} of {what}", lambda: jax.jit(run).lower(tree, scale), {"adapters": tree}, beside)


def _merged(config: ModelConfig, mesh: Mesh, linear: str) -> jax.ShapeDtypeStruct:
    """A linear's merged delta where a merge leaves it (see `cut_for_merging`)."""
    _, out, inner = config.linears[linear]
    shape = (config.layers, out, inner)
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding(mesh, (None, "merged", None), shape))


def _size(config: ModelConfig, linear: str) -> int:
    _, out, inner = config.linears[linear]
    return out * inner
