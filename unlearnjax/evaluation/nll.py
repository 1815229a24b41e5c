"""Next-token negative log-likelihoods of whole texts and of answers, for one model or N adapters of it at once."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PyTree
from unlearnjax_kernels.vocab_logsumexp import vocab_logsumexp

from unlearnjax.distributed.mesh import CANDIDATE, mesh_of
from unlearnjax.distributed.processes import fetch
from unlearnjax.distributed.rules import filled, spread_of, spread_rows
from unlearnjax.errors import UserError
from unlearnjax.evaluation.batches import Batch, batches, check_rows, name_of
from unlearnjax.evaluation.generate import stack_of_one
from unlearnjax.evaluation.journal import Records, finished, recorded
from unlearnjax.evaluation.memory import room
from unlearnjax.models.precision import precision
from unlearnjax.models.protocol import WHERE_IT_IS, Model, Spread, Variables

LOGITS_AT_ONCE = 1 << 24  # float32 logits alive at a time over all candidates: 64 MiB


class TokenNLL(NamedTuple):
    """Per row, or candidate and row: the sum of -log p in nats (float32) over the counted tokens, and their number."""

    total: np.ndarray
    tokens: np.ndarray

    @property
    def mean(self) -> np.ndarray:
        """float64; NaN for a row without counted tokens, as torch's mean of nothing."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return self.total.astype(np.float64) / self.tokens


def row_nll(
    model: Model,
    params: PyTree[Array],
    lora: PyTree[Array] | None,
    tokens: Int[Array, "rows length"],
    segments: Int[Array, "rows length"],
    counted: Float[Array, "rows length"],
    chunk: int,
    spread: Spread = WHERE_IT_IS,
) -> Float[Array, " rows"]:
    """One candidate: each row's NLL summed over the tokens whose `counted` is 1."""
    hidden = model.forward(params, lora, tokens, segments=segments, spread=spread).hidden[:, :-1]
    head, targets = model.head(params), tokens[:, 1:]
    flat = hidden.reshape(-1, hidden.shape[-1])
    chosen = head[targets.reshape(-1)]
    exact = precision(flat.dtype)
    logit = jnp.einsum("td,td->t", flat, chosen, precision=exact, preferred_element_type=jnp.float32)
    nll = (vocab_logsumexp(flat, head, chunk=chunk) - logit).reshape(targets.shape)
    return jnp.sum(jnp.where(counted[:, 1:] > 0, nll, 0.0), axis=1)


@functools.lru_cache(maxsize=4)
def program(model: Model, mesh: Mesh | None = None) -> Callable[..., Array]:
    """`row_nll` mapped over candidates and jitted, once per model object (and mesh, where there is one)."""

    @functools.partial(jax.jit, static_argnames=("count",))
    def run(params: PyTree, lora: PyTree, tokens: Array, segments: Array, counted: Array, *, count: int) -> Array:
        chunk = max(128, LOGITS_AT_ONCE // (count * tokens.size))
        one = functools.partial(row_nll, model, chunk=chunk, spread=spread_of(mesh, count))
        apart = CANDIDATE if count > 1 else None
        return jax.vmap(one, in_axes=(None, 0, None, None, None), axis_size=count, spmd_axis_name=apart)(
            params, lora, tokens, segments, counted
        )

    return run


def token_nll_candidates(
    model: Model,
    params: PyTree[Array],
    lora: PyTree[Array] | None,
    rows: Sequence[Sequence[int]],
    answer_start: Sequence[int] | int = 1,
    *,
    batch_size: int,
    names: Sequence[str] | None = None,
    progress: Callable[[int], None] | None = None,
    records: Records | None = None,
) -> TokenNLL:
    """Summed next-token NLL of each row under each of N candidates.

    Args:
      model: the decoder; reuse the object, the compiled program is kept by it.
      params: base weights, shared by the candidates.
      lora: adapters stacked to [N, layers, ...] with the scale folded into `b`; None is the base alone (N = 1).
      rows: token ids, at least one each.
      answer_start: the place of each row's first counted token; nothing predicts the token at 0, so 0 means 1. At or
        past the row's end nothing is counted.
      batch_size: rows per batch, per candidate; on accelerators fewer where that many do not fit.
      names: the rows' names, for error messages.
      progress: called with the number of rows (times N) that have been finished since the last call.
      records: finished batches of the same work, which are not computed again; gets each further one.

    Returns:
      TokenNLL of [N, rows] arrays.

    Raises:
      UserError: a row without tokens, with an id outside the vocabulary, longer than the context, or a negative start.
    """
    config = model.config
    check_rows(rows, config.vocab_size, config.max_positions, 0, names)
    starts = [answer_start] * len(rows) if isinstance(answer_start, int) else list(answer_start)
    if len(starts) != len(rows):
        raise UserError(f"answer_start has {len(starts)} entries for {len(rows)} rows; give one for each row")
    for i, start in enumerate(starts):
        if start < 0:
            raise UserError(f"{name_of(names, i)}: answer_start must not be negative, is {start}")
    starts = [max(start, 1) for start in starts]
    wanted = 1 if lora is None else jax.tree.leaves(lora)[0].shape[0]
    lora = filled(params, lora)
    count = 1 if lora is None else jax.tree.leaves(lora)[0].shape[0]
    run = program(model, mesh_of(params))
    total = np.zeros((count, len(rows)), np.float32)

    def totals(batch: Batch) -> list[list[float]]:
        counted = np.zeros(batch.tokens.shape, np.float32)
        for at, row in enumerate(batch.places):
            counted[at, starts[row] : len(rows[row])] = 1.0
        arrays = spread_rows(params, batch.tokens, batch.segments, counted, candidates=count)
        found = run(params, lora, *arrays, count=count)
        return np.asarray(fetch(found))[:, : len(batch.places)].tolist()

    # The pad id is never attended to and never counted.
    for batch in batches(
        rows, batch_size, 0, left=False, widest=config.max_positions, per_octave=4,
        fitted=room(config, params, lora, count), finished=finished(records),
    ):  # fmt: skip
        total[:, batch.places] = recorded(records, batch, totals)
        if progress is not None:
            progress(wanted * len(batch.places))
    number = np.array([max(len(row) - start, 0) for row, start in zip(rows, starts)], np.int64)
    total = total[:wanted]
    return TokenNLL(total, np.broadcast_to(number, total.shape))


def token_nll(
    model: Model,
    variables: Variables,
    rows: Sequence[Sequence[int]],
    answer_start: Sequence[int] | int = 1,
    *,
    batch_size: int,
    names: Sequence[str] | None = None,
    progress: Callable[[int], None] | None = None,
) -> TokenNLL:
    """`token_nll_candidates` for one model: arrays of [rows]. Same arguments and errors."""
    found = token_nll_candidates(
        model,
        variables.params,
        stack_of_one(variables.lora),
        rows,
        answer_start,
        batch_size=batch_size,
        names=names,
        progress=progress,
    )
    return TokenNLL(found.total[0], found.tokens[0])
