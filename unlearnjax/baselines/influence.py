"""Influence unlearning (IU): one step against what the forget rows changed, by a WoodFisher estimate of the inverse
Hessian (Izzo et al. 2002.10077, Jia et al. 2304.04934; Unlearn-Sparse and Unlearn-Saliency unlearn/Wfisher.py)."""

from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree

from unlearnjax.baselines.gradients import rows_gradient, summed_gradient, views
from unlearnjax.baselines.protocol import Job, Unlearned
from unlearnjax.training.state import global_norm


def influence(job: Job) -> Unlearned:
    """weights + alpha * woodfisher(v), with v = n_f / (n_f + n_r) (mean forget gradient - mean retain gradient).

    WoodFisher goes over the first damping + 2 retain rows, one at a time, as the code does. BatchNorm uses its running
    statistics throughout, which stay. If the weights' norm would not be finite they stay too, and `diverged_at` is 0.
    """
    subject, s = job.subject, job.settings
    assert s.alpha is not None and s.damping is not None
    forget, retain = views(job.forget, s, job.seed), views(job.retain, s, job.seed, 1)
    share = forget.labels.shape[0] / (forget.labels.shape[0] + retain.labels.shape[0])
    means = jax.device_get([summed_gradient(job, x, by_batch=False) for x in (forget, retain)])
    vector = jax.tree.map(lambda f, r: np.float32(share) * (f - r), *means)
    count, one = min(s.damping + 2, retain.labels.shape[0]), np.ones(1, np.float32)
    rows = job.watched(np.arange(count, dtype=np.int32)[:, None], count, "row")
    each = (rows_gradient(subject.net, subject.trained, subject.fixed, retain, row, one) for row in rows)
    step = woodfisher(vector, each, s.damping)
    trained, finite = jax.device_get(_moved(subject.trained, step, jnp.float32(s.alpha)))
    kept = trained if finite else jax.device_get(subject.trained)
    return Unlearned(kept, jax.device_get(subject.fixed), [], None if finite else 0)


@jax.jit
def _moved(weights: PyTree[Array], step: PyTree[Array], by: Float[Array, ""]) -> tuple[PyTree[Array], Bool[Array, ""]]:
    """weights + by * step, and whether all of it is finite."""
    moved = jax.tree.map(lambda p, k: p + by * k, weights, step)
    return moved, jnp.isfinite(global_norm(moved))


class _Recurrence(NamedTuple):
    k: PyTree[Array]
    o: PyTree[Array]


def woodfisher(vector: PyTree[Array], gradients: Iterable[PyTree[Array]], damping: int) -> PyTree[Array]:
    """The code's estimate of the inverse Hessian times `vector`: k = vector, o = the first gradient, and for each
    further one g, with N = damping,

        k <- k - (k.g) / (N + o.g) o,    o <- o - (o.g) / (N + o.g) o.

    o stays a multiple of the first gradient, so k differs from `vector` in that direction alone; WoodFisher as it was
    published (2004.14340) recomputes o for every gradient.
    """
    state: _Recurrence | None = None
    for g in gradients:
        state = _Recurrence(vector, g) if state is None else _next(state, g, jnp.float32(damping))
    return vector if state is None else state.k


@jax.jit
def _next(state: _Recurrence, g: PyTree[Array], damping: Float[Array, ""]) -> _Recurrence:
    along = _dot(state.o, g)
    by = _dot(state.k, g) / (damping + along)
    return _Recurrence(
        jax.tree.map(lambda k, o: k - by * o, state.k, state.o),
        jax.tree.map(lambda o: o - along / (damping + along) * o, state.o),
    )


def _dot(a: PyTree[Array], b: PyTree[Array]) -> Float[Array, ""]:
    return sum(jax.tree.leaves(jax.tree.map(lambda x, y: jnp.vdot(x, y), a, b)), jnp.float32(0.0))
