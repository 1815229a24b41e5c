"""How likely given continuations of given contexts are, and whether greedy decoding would produce them."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, PyTree

from unlearnjax.distributed.mesh import mesh_of
from unlearnjax.distributed.processes import fetch
from unlearnjax.distributed.rules import spread_of, spread_rows
from unlearnjax.errors import UserError
from unlearnjax.evaluation.batches import batches, check_rows, name_of, power_of_two
from unlearnjax.evaluation.memory import room
from unlearnjax.evaluation.nll import LOGITS_AT_ONCE
from unlearnjax.models.layers import precision
from unlearnjax.models.protocol import WHERE_IT_IS, Model, Spread, Variables


class ContinuationScores(NamedTuple):
    """Per row: log p(continuation | context) in nats, and whether each of its tokens is the likeliest one."""

    log_probability: Float[np.ndarray, " rows"]
    greedy: Bool[np.ndarray, " rows"]


def row_scores(
    model: Model,
    params: PyTree[Array],
    lora: PyTree[Array] | None,
    tokens: Int[Array, "rows length"],
    segments: Int[Array, "rows length"],
    targets: Int[Array, "rows width"],
    counted: Bool[Array, "rows width"],
    spread: Spread = WHERE_IT_IS,
) -> tuple[Float[Array, " rows"], Bool[Array, " rows"]]:
    """Log-probability of each row's counted targets, which follow its last `width` tokens, and whether all are greedy.

    Logits are float32 and of a few positions at a time: at most `LOGITS_AT_ONCE` numbers.
    """
    rows, width = targets.shape
    hidden = model.forward(params, lora, tokens, segments=segments, spread=spread).hidden[:, -width:]
    flat = hidden.reshape(rows * width, -1)
    head = model.head(params)
    chunk = min(max(128, LOGITS_AT_ONCE // head.shape[0]), rows * width)
    filler = -(rows * width) % chunk

    def some(part: tuple[Array, Array]) -> tuple[Array, Array]:
        x, target = part
        contract = (((1,), (1,)), ((), ()))
        logits = jax.lax.dot_general(
            x, head, contract, precision=precision(x.dtype), preferred_element_type=jnp.float32
        )
        chosen = jnp.take_along_axis(logits, target[:, None], axis=1)[:, 0]
        likeliest = jnp.argmax(logits, axis=1).astype(jnp.int32)
        return chosen - jax.nn.logsumexp(logits, axis=1), likeliest == target

    parts = jnp.pad(flat, ((0, filler), (0, 0))).reshape(-1, chunk, flat.shape[1])
    scores, likeliest = jax.lax.map(some, (parts, jnp.pad(targets.reshape(-1), (0, filler)).reshape(-1, chunk)))

    def by_row(x: Array) -> Array:
        return x.reshape(-1)[: rows * width].reshape(rows, width)

    total = jnp.sum(jnp.where(counted, by_row(scores), 0.0), axis=1)
    return total, jnp.all(by_row(likeliest) | ~counted, axis=1)


@functools.lru_cache(maxsize=4)
def program(model: Model, mesh: Mesh | None = None) -> Callable[..., tuple[Array, Array]]:
    """`row_scores` jitted, once per model object (and mesh, where there is one)."""
    return jax.jit(functools.partial(row_scores, model, spread=spread_of(mesh)))


def continuation_scores(
    model: Model,
    variables: Variables,
    rows: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    batch_size: int,
    max_length: int | None = None,
    names: Sequence[str] | None = None,
    progress: Callable[[int], None] | None = None,
) -> ContinuationScores:
    """Score each row's continuation after its context.

    Contexts too long for the model lose tokens on the left. (The last token of a continuation is only predicted, so a
    row may be one token longer than the context window.)

    Args:
      model: the decoder; reuse the object, the compiled program is kept by it.
      rows: (context, continuation) in token ids, at least one each.
      batch_size: rows per batch; on accelerators fewer where that many do not fit.
      max_length: tokens the model sees at most; by default its context window.
      names: the rows' names, for error messages.
      progress: called with the number of rows that have been finished since the last call.

    Raises:
      UserError: an empty context or continuation, an id outside the vocabulary, or a continuation longer than the
        context window.
    """
    limit = max_length or model.config.max_positions
    for i, (context, continuation) in enumerate(rows):
        if not context or not continuation:
            raise UserError(f"{name_of(names, i)}: context and continuation must have a token each")
    check_rows([continuation for _, continuation in rows], model.config.vocab_size, limit, 0, names)
    seen = [[*context, *continuation][-limit - 1 : -1] for context, continuation in rows]
    check_rows(seen, model.config.vocab_size, limit, 0, names)
    run = program(model, mesh_of(variables.params))
    total, greedy = np.zeros(len(rows), np.float32), np.zeros(len(rows), bool)
    fitted = room(model.config, variables.params, variables.lora, 1)
    # The pad id is never attended to. Padding on the left puts all continuations at the end.
    for batch in batches(seen, batch_size, 0, left=True, widest=limit, per_octave=4, fitted=fitted):
        count, length = batch.tokens.shape
        width = min(power_of_two(max(len(rows[place][1]) for place in batch.places)), length)
        targets, counted = np.zeros((count, width), np.int32), np.zeros((count, width), bool)
        for at, place in enumerate(batch.places):
            continuation = rows[place][1]
            targets[at, width - len(continuation) :] = continuation
            counted[at, width - len(continuation) :] = True
        arrays = spread_rows(variables.params, batch.tokens, batch.segments, targets, counted)
        found = run(variables.params, variables.lora, *arrays)
        total[batch.places], greedy[batch.places] = (x[: len(batch.places)] for x in fetch(found))
        if progress is not None:
            progress(len(batch.places))
    return ContinuationScores(total, greedy)
