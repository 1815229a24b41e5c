"""What a model says of each token of whole texts: the token's log-probability, and that number's mean and variance.

Mean and variance are over the model's own next-token distribution p, as the membership attack min-k%++ standardises by
them (2404.02936, section 4): mean = sum_v p_v log p_v, which is minus the entropy, and variance =
sum_v p_v (log p_v - mean)^2.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PyTree

from unlearnjax.distributed.mesh import CANDIDATE, mesh_of
from unlearnjax.distributed.processes import fetch
from unlearnjax.distributed.rules import filled, spread_of, spread_rows
from unlearnjax.evaluation.batches import batches, check_rows
from unlearnjax.evaluation.memory import room
from unlearnjax.evaluation.nll import LOGITS_AT_ONCE
from unlearnjax.models.precision import precision
from unlearnjax.models.protocol import WHERE_IT_IS, Model, Spread

FEWEST = 16  # positions at a time and candidate, however large the vocabulary: fewer would read the head for too little


class TokenStats(NamedTuple):
    """One row under one candidate, in nats (float32): entry i is of token i + 1 given the i + 1 tokens before it."""

    log_probability: Float[np.ndarray, " tokens_less_one"]
    mean: Float[np.ndarray, " tokens_less_one"]
    variance: Float[np.ndarray, " tokens_less_one"]


def batch_stats(
    model: Model,
    params: PyTree[Array],
    lora: PyTree[Array] | None,
    tokens: Int[Array, "rows length"],
    segments: Int[Array, "rows length"],
    chunk: int,
    spread: Spread = WHERE_IT_IS,
) -> Float[Array, "3 rows predicted"]:
    """One candidate: log-probability, mean and variance at each position but the last, which predicts nothing.

    Logits are float32 and of about `chunk` positions at a time. (Of positions, not of the vocabulary: with a position's
    whole distribution at hand the variance is a sum of squares, and not a difference that loses its digits. And some
    of each row: the rows may lie on several devices.)
    """
    hidden = model.forward(params, lora, tokens, segments=segments, spread=spread).hidden[:, :-1]
    targets, head = tokens[:, 1:], model.head(params)
    rows, count = targets.shape
    width = min(max(1, chunk // rows), count)
    filler = -count % width

    def some(part: tuple[Array, Array]) -> Array:
        x, target = part
        contract = (((2,), (1,)), ((), ()))
        logits = jax.lax.dot_general(
            x, head, contract, precision=precision(x.dtype), preferred_element_type=jnp.float32
        )
        log_p = jax.nn.log_softmax(logits, axis=2)
        p = jnp.exp(log_p)
        mean = jnp.sum(p * log_p, axis=2)
        variance = jnp.sum(p * jnp.square(log_p - mean[..., None]), axis=2)
        return jnp.stack([jnp.take_along_axis(log_p, target[..., None], axis=2)[..., 0], mean, variance])

    def parted(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, filler), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(rows, -1, width, *x.shape[2:]), 1, 0)

    found = jax.lax.map(some, (parted(hidden), parted(targets)))  # [parts, 3, rows, width]
    return jnp.moveaxis(found, 0, 2).reshape(3, rows, -1)[:, :, :count]


@functools.lru_cache(maxsize=4)
def program(model: Model, mesh: Mesh | None = None) -> Callable[..., Array]:
    """`batch_stats` mapped over candidates and jitted, once per model object (and mesh, where there is one)."""

    @functools.partial(jax.jit, static_argnames=("count",))
    def run(params: PyTree, lora: PyTree, tokens: Array, segments: Array, *, count: int) -> Array:
        chunk = max(FEWEST, LOGITS_AT_ONCE // (count * model.head(params).shape[0]))
        one = functools.partial(batch_stats, model, chunk=chunk, spread=spread_of(mesh, count))
        apart = CANDIDATE if count > 1 else None
        return jax.vmap(one, in_axes=(None, 0, None, None), axis_size=count, spmd_axis_name=apart)(
            params, lora, tokens, segments
        )

    return run


def token_stats_candidates(
    model: Model,
    params: PyTree[Array],
    lora: PyTree[Array] | None,
    rows: Sequence[Sequence[int]],
    *,
    batch_size: int,
    names: Sequence[str] | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[list[TokenStats]]:
    """`TokenStats` of each row under each of N candidates.

    Args:
      model: the decoder; reuse the object, the compiled program is kept by it.
      params: base weights, shared by the candidates.
      lora: adapters stacked to [N, layers, ...] with the scale folded into `b`; None is the base alone (N = 1).
      rows: token ids, at least one each (a row of a single token has empty arrays).
      batch_size: rows per batch, per candidate; on accelerators fewer where that many do not fit.
      names: the rows' names, for error messages.
      progress: called with the number of rows (times N) that have been finished since the last call.

    Returns:
      N lists of one TokenStats per row.

    Raises:
      UserError: a row without tokens, with an id outside the vocabulary, or longer than the context.
    """
    config = model.config
    check_rows(rows, config.vocab_size, config.max_positions, 0, names)
    wanted = 1 if lora is None else jax.tree.leaves(lora)[0].shape[0]
    lora = filled(params, lora)
    count = 1 if lora is None else jax.tree.leaves(lora)[0].shape[0]
    run = program(model, mesh_of(params))
    found: list[dict[int, TokenStats]] = [{} for _ in range(count)]
    fitted = room(config, params, lora, count)
    # The pad id is never attended to, and what it is given is cut off.
    for batch in batches(rows, batch_size, 0, left=False, widest=config.max_positions, per_octave=4, fitted=fitted):
        arrays = spread_rows(params, batch.tokens, batch.segments, candidates=count)
        stats = fetch(run(params, lora, *arrays, count=count))
        for n in range(count):
            for at, place in enumerate(batch.places):
                found[n][place] = TokenStats(*stats[n, :, at, : len(rows[place]) - 1].copy())
        if progress is not None:
            progress(wanted * len(batch.places))
    return [[one[i] for i in range(len(rows))] for one in found[:wanted]]
