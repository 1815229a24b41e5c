"""What a batch of an evaluation holds on a device, in closed form: how many rows go together on an accelerator."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from unlearnjax.data.buckets import round_up
from unlearnjax.distributed.mesh import FSDP, free_memory, mesh_of
from unlearnjax.distributed.rules import cut_by, row_shards, sharding
from unlearnjax.models.config import ModelConfig
from unlearnjax.models.decoder import head

SHARE = 0.8  # of what is free, for one batch
SLOT_STEP = 64  # cache lengths are multiples of this, so that different prompt widths share a program
LANES = 128  # a TPU's tiles pad heads to so many numbers


def bytes_of_batch(
    config: ModelConfig, mesh: Mesh | None, dtype: Any, candidates: int, rows: int, width: int, new: int = 0
) -> float:
    """What the rows of a batch take on a device, beside weights and adapters: with `bytes_of_cast` at least .8 of what
    TPUs' compiler said of the programs that were tried.

    Args:
      dtype: of activations. candidates: that read the rows, each of them all. width: the tokens that a row is padded
        to. new: tokens to be generated behind them; 0: there is no cache.
    """

    def on_device(name: str, size: int) -> float:
        sizes = {} if mesh is None else mesh.shape
        return size / math.prod(sizes[axis] for axis in cut_by(name, size, sizes))

    item, shape = jnp.dtype(dtype).itemsize, (candidates, rows)
    own = shape if mesh is None else sharding(mesh, ("candidate", "batch"), shape).shard_shape(shape)
    kv_heads, mlp = on_device("kv_heads", config.kv_heads), on_device("mlp", config.intermediate_size)
    heads = kv_heads * config.heads / config.kv_heads
    row = width * item * (8 * config.hidden_size + 2 * mlp + 2 * (heads + kv_heads) * config.head_dim)
    row += 2 * 4 * heads * width * width
    if new:
        slot = 2 * item * config.layers * kv_heads * config.head_dim
        # The loop over steps has its own layout of the cache, padded, and copies into it and out of it.
        loop = slot * (1 + 1.5 * round_up(config.head_dim, LANES) / config.head_dim)
        row = max(width * slot + row, round_up(width + new, SLOT_STEP) * loop) + 2 * 4 * config.vocab_size
    held = math.prod(own) * row
    if mesh is not None and mesh.shape[FSDP] > 1:  # two layers' weights, and embeddings, gathered
        layer = sum(out * inner for _, out, inner in config.linears.values()) * mlp / config.intermediate_size
        held += 2 * item * (layer + on_device("vocab", config.vocab_size) * config.hidden_size)
    return held


def bytes_of_cast(lora: PyTree[Any], dtype: Any) -> int:
    """What a stack of adapters takes on a device once more, in the dtype of activations."""

    def leaf(x: Any) -> int:
        shape = x.sharding.shard_shape(x.shape) if hasattr(x, "sharding") else x.shape
        return math.prod(shape) * jnp.dtype(dtype).itemsize

    return sum(leaf(x) for x in jax.tree.leaves(lora) if x.dtype != dtype)


def room(
    config: ModelConfig, params: PyTree[Array], lora: PyTree[Array] | None, candidates: int, new: int = 0
) -> Callable[[int, int], int] | None:
    """Says how many rows to take where so many of such a width are wanted: all where they fit beside what is on the
    devices now, else the most that do; on a mesh these divide among its devices. Where none do, what takes least.

    None where devices do not tell their memory, as CPUs. All processes of a job must call it at the same place.

    Args:
      lora: the adapters of the candidates that are asked, as they lie on the devices. new: see `bytes_of_batch`.
    """
    free = free_memory()
    if free is None:
        return None
    mesh, dtype = mesh_of(params), head(params).dtype
    allowed = SHARE * free - bytes_of_cast(lora, dtype)
    shards = 1 if mesh is None else row_shards(mesh, candidates, mesh.size)

    def fitted(rows: int, width: int) -> int:
        fewer = [shards << i for i in range(rows.bit_length() + 1) if shards << i < rows or i == 0]
        held = {n: bytes_of_batch(config, mesh, dtype, candidates, n, width, new) for n in (rows, *reversed(fewer))}
        return next((n for n in held if held[n] <= allowed), min(held, key=held.__getitem__))

    return fitted
