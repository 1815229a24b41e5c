"""What the frozen base says of the rows, computed once before training: no second model, no reference forward later."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, PyTree
from unlearnjax_kernels.vocab_logsumexp import vocab_logsumexp_and_mean

from unlearnjax.data.buckets import choose_widths, fit, round_up
from unlearnjax.data.tokens import Reference, Store, Tokens, gather, to_device
from unlearnjax.distributed.mesh import TENSOR, mesh_of
from unlearnjax.distributed.processes import fetch
from unlearnjax.distributed.rules import along_rows, spread_of
from unlearnjax.models.layers import pick
from unlearnjax.models.protocol import Model
from unlearnjax.objectives.objective import Objective, answer_scores


def _distribution(hidden: Array, head: Array) -> tuple[Array, Array]:
    """E_q[w] and sum_v q_v log q_v = h . E_q[w] - Z at each position."""
    total, mean = vocab_logsumexp_and_mean(hidden, head)
    return mean, jnp.sum(hidden.astype(jnp.float32) * mean, axis=-1) - total


def _base_scores(
    model: Model,
    params: PyTree,
    store: Store,
    rows: Array,
    width: int,
    answers: int,
    needs: frozenset[str],
    layer: int | None,
    mesh: Mesh | None = None,
) -> dict[str, Array]:
    """The fields of `Reference` that `needs` names, by row and position, and the two masks."""
    along = functools.partial(along_rows, mesh, rows="batch")
    forward = functools.partial(model.forward, params, None, spread=spread_of(mesh))
    tokens, at, side = gather(store, along(rows), jnp.zeros_like(rows), width, answers)
    tokens = along(tokens)
    every = "every" in needs
    assert side.inside is not None
    out = {"answers": side.mask, "tokens": side.inside}
    if "layer" in needs:
        out["every_layer"] = forward(tokens, layers=(0, layer)).hidden
    if needs <= {"layer"}:
        return out
    hidden = along(forward(tokens, at=None if every else at).hidden)
    picked = along(pick(hidden, at)) if every else hidden
    head = model.head(params)
    if needs & {"nll", "others"}:
        likelihood, total = answer_scores(picked, head, side.targets, train_head=False)
        out["nll"] = jnp.sum(jnp.where(side.mask, -likelihood, 0.0), axis=1)
        if "others" in needs:
            without, out["others_expectation"] = vocab_logsumexp_and_mean(picked, head, without=side.targets)
            out["others_log_odds"] = likelihood + total - without
    if "distribution" in needs:
        out["expectation"], out["negative_entropy"] = _distribution(picked, head)
    if every:
        out["every_expectation"], out["every_negative_entropy"] = _distribution(hidden, head)
    return out


def base_reference(
    model: Model,
    params: PyTree,
    tokens: Tokens,
    needs: frozenset[str],
    batch_size: int = 16,
    buckets: int = 6,
    layer: int | None = None,
) -> Reference:
    """Compute what `needs` names (see `objectives.protocol.Term`) for every row; an empty reference if nothing is.

    `layer`: the objective's, where `layer` is needed.
    """
    if not needs:
        return Reference()
    store, mesh = to_device(tokens), mesh_of(params)
    # There is no stack of candidates: all devices but those along `tensor` have rows of their own.
    batch_size = round_up(batch_size, 1 if mesh is None else mesh.size // mesh.shape[TENSOR])
    offsets = np.concatenate([[0], np.cumsum(tokens.answer_length)]).astype(np.int32)
    held: dict[str, np.ndarray] = {}
    run: Any = jax.jit(_base_scores, static_argnums=(0, 4, 5, 6, 7, 8))
    widths = choose_widths(tokens.length, buckets)
    group = np.asarray([fit(int(n), widths) for n in tokens.length])
    for width in widths:
        inside = np.flatnonzero(group == width)
        answers = min(round_up(int(tokens.answer_length[inside].max()), 8), width) if len(inside) else 0
        for begin in range(0, len(inside), batch_size):
            chosen = inside[begin : begin + batch_size]
            padded = np.full(batch_size, -1, np.int32)
            padded[: len(chosen)] = chosen
            got = fetch(run(model, params, store, jnp.asarray(padded), width, answers, needs, layer, mesh))
            answered, real = got.pop("answers"), got.pop("tokens")
            for name, values in got.items():
                # By row, by answer token, or by token: where each begins, which are real, and how many there are.
                begins, mask, count = {True: (tokens.start, real, len(tokens.flat))}.get(
                    name.startswith("every"), (offsets, answered, int(offsets[-1]))
                )
                if name == "nll":
                    held.setdefault(name, np.zeros(len(tokens.length), np.float32))[chosen] = values[: len(chosen)]
                    continue
                full = held.setdefault(name, np.zeros((count, *values.shape[2:]), np.float32))
                for k, row in enumerate(chosen):
                    kept = values[k][mask[k]]
                    full[begins[row] : begins[row] + len(kept)] = kept
    offset = jnp.asarray(offsets[:-1]) if needs & {"distribution", "others"} else None
    return Reference(answer_offset=offset, **{name: jnp.asarray(x) for name, x in held.items()})


def stores_for(
    model: Model, params: PyTree, sides: dict[str, Tokens], objective: Objective, buckets: int = 6
) -> dict[str, Store]:
    """Device stores of the sides that the objective reads, with what its terms need of the base.

    `buckets`: how many widths (programs) at most, per side.
    """
    return {
        s: to_device(
            sides[s],
            base_reference(model, params, sides[s], objective.needs(s), buckets=buckets, layer=objective.layer),
        )
        for s in objective.sides
    }
