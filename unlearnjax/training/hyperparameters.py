"""What may differ between candidates, as arrays: stacked over candidates, a leading axis N on every leaf."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

SCHEDULES = ("constant", "linear", "cosine", "steps")


class Hyperparameters(NamedTuple):
    """One candidate's settings (or, stacked, all candidates'). Counts are in optimizer updates."""

    learning_rate: Float[Array, ""]
    weight_decay: Float[Array, ""]
    warmup_updates: Float[Array, ""]
    total_updates: Float[Array, ""]
    schedule: Int[Array, ""]  # index into SCHEDULES
    max_grad_norm: Float[Array, ""]  # inf: no clipping
    term_weights: dict[str, Float[Array, ""]]
    beta: Float[Array, ""]  # NPO's inverse temperature
    term_parameters: dict[str, dict[str, Float[Array, ""]]]  # of the terms that have their own
    lora_alpha: Float[Array, ""]
    lora_rank: Int[Array, ""]
    dropout: Float[Array, ""]
    init_seed: Int[Array, ""]


DTYPES = {"schedule": jnp.int32, "lora_rank": jnp.int32, "init_seed": jnp.uint32}


def stack(candidates: Sequence[Mapping[str, Any]]) -> Hyperparameters:
    """Candidates' plain values (keys are the fields' names) to arrays with a leading axis N.

    `term_parameters` has the same terms and names for all candidates, and may be left out where no term has any.
    """
    columns: dict[str, Any] = {}
    for field in Hyperparameters._fields:
        if field == "term_weights":
            names = sorted({n for c in candidates for n in c[field]})
            columns[field] = {
                n: jnp.asarray([float(c[field].get(n, 0.0)) for c in candidates], jnp.float32) for n in names
            }
        elif field == "term_parameters":
            own = [c.get(field, {}) for c in candidates]
            columns[field] = {
                term: {n: jnp.asarray([float(o[term][n]) for o in own], jnp.float32) for n in names}
                for term, names in own[0].items()
            }
        else:
            columns[field] = jnp.asarray([c[field] for c in candidates], DTYPES.get(field, jnp.float32))
    return Hyperparameters(**columns)


def index(stacked: Any, i: int) -> Any:
    """Candidate i of a stacked pytree."""
    return jax.tree.map(lambda x: x[i], stacked)


def subset(stacked: Any, keep: Sequence[int]) -> Any:
    """The candidates `keep` of a stacked pytree."""
    chosen = np.asarray(keep, np.int32)
    return jax.tree.map(lambda x: x[chosen], stacked)


def learning_rate(h: Any, update: Int[Array, ""]) -> Float[Array, ""]:
    """The rate of update `update` (counted from 0): linear warmup, then constant, linear decay to 0, half a cosine, or
    a tenth after half of the rest and a hundredth after three quarters.

    As transformers' get_linear_schedule_with_warmup and its siblings define it, but with traced lengths. `h`: whatever
    has learning_rate, warmup_updates, total_updates and schedule.
    """
    step = update.astype(jnp.float32)
    warm = jnp.where(h.warmup_updates > 0.0, jnp.minimum(step / jnp.maximum(h.warmup_updates, 1.0), 1.0), 1.0)
    after = jnp.maximum(step - h.warmup_updates, 0.0) / jnp.maximum(h.total_updates - h.warmup_updates, 1.0)
    after = jnp.minimum(after, 1.0)
    steps = jnp.where(after < 0.5, 1.0, jnp.where(after < 0.75, 0.1, 0.01))
    decay = jnp.stack([jnp.ones_like(after), 1.0 - after, 0.5 * (1.0 + jnp.cos(jnp.pi * after)), steps])[h.schedule]
    return h.learning_rate * warm * decay
