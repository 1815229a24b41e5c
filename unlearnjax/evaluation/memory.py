"""What a batch of an evaluation holds on a device, in closed form: how many rows go together on an accelerator."""

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from unlearnjax.data.buckets import round_up
from unlearnjax.distributed.mesh import FSDP, TENSOR, free_memory, mesh_of
from unlearnjax.distributed.rules import sharding
from unlearnjax.models.config import ModelConfig
from unlearnjax.models.decoder import head

SHARE = 0.8  # of what is free, for one batch
LANES = 128  # a TPU's tiles pad heads to so many numbers


def bytes_of_batch(
    config: ModelConfig, mesh: Mesh | None, dtype: Any, candidates: int, rows: int, width: int, new: int = 0
) -> float:
    """What the rows of a batch take on a device, beside the weights: about what TPUs' compiler says, or more.

    Args:
      dtype: of activations. candidates: that read the rows, each of them all. width: the tokens that a row is padded
        to. new: tokens to be generated behind them; 0: there is no cache.
    """
    item, shape = jnp.dtype(dtype).itemsize, (candidates, rows)
    own = shape if mesh is None else sharding(mesh, ("candidate", "batch"), shape).shard_shape(shape)
    fsdp, tensor = (1, 1) if mesh is None else (mesh.shape[FSDP], mesh.shape[TENSOR])
    keys = 2 * config.kv_heads * config.head_dim
    wide = 2 * config.intermediate_size + 2 * config.heads * config.head_dim + keys
    scores = 2 * 4 * config.heads * width
    row = width * (item * (8 * config.hidden_size + wide / tensor) + scores / tensor)
    if new:
        slot = item * config.layers * keys / tensor
        # The loop over steps has its own layout of the cache, padded, and copies into it and out of it.
        loop = (width + new) * slot * (1 + 1.5 * round_up(config.head_dim, LANES) / config.head_dim)
        row = max(width * slot + row, loop) + 2 * 4 * config.vocab_size
    layer = sum(out * inner for _, out, inner in config.linears.values())
    gathered = 2 * item * (layer + config.vocab_size * config.hidden_size) / tensor if fsdp > 1 else 0
    return math.prod(own) * row + gathered


def room(
    config: ModelConfig, params: PyTree[Array], candidates: int, new: int = 0
) -> Callable[[int, int], bool] | None:
    """Says whether so many rows of so many tokens fit beside what is on the devices now; None where these do not tell
    their memory, as CPUs.

    All processes of a job must call it at the same place.

    Args:
      candidates: that read the rows. new: see `bytes_of_batch`.
    """
    free = free_memory()
    if free is None:
        return None
    mesh, dtype = mesh_of(params), head(params).dtype

    def fits(rows: int, width: int) -> bool:
        return bytes_of_batch(config, mesh, dtype, candidates, rows, width, new) <= SHARE * free

    return fits
