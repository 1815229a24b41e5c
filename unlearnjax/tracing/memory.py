"""What a call of `mediate` holds on a device, in closed form: how many facts go together on an accelerator.

XLA's own account of the compiled program is 1.6 to 1.9 times lower (small models on a CPU, OLMo-1B's size on a TPU): it
uses memory again where this adds up.
"""

import jax
from jaxtyping import PyTree

from unlearnjax.models.config import ModelConfig
from unlearnjax.models.decoder import head
from unlearnjax.tracing.mediation import KINDS, blocks

SHARE = 0.8  # of what the weights leave free, for one call


def bytes_of_fact(config: ModelConfig, item: int, draws: int, before: int, rest: int) -> int:
    """Bytes that one fact takes in a call.

    Args:
      item: bytes of an activation. before, rest: the lengths that the call is padded to.
    """
    layers, hidden, slots = config.layers, config.hidden_size, before + rest
    keys = 2 * config.kv_heads * config.head_dim
    # The corrupted run's states, as they are read and as they enter the next layer, and its keys and values.
    corrupted = draws * layers * (2 * rest * hidden + 2 * slots * keys)
    clean = layers * (len(KINDS) * rest * hidden + slots * keys)
    positions, tokens = (max(x) for x in zip(*((n, n * (rest - first)) for first, n in blocks(rest)), strict=True))
    # A layer's run of a block: states kept and carried, the sub-layers' values, the MLP, queries; the cut cache's keys.
    queries = 2 * config.heads * config.head_dim
    block = draws * (tokens * (8 * hidden + 2 * config.intermediate_size + queries) + 2 * positions * slots * keys)
    scores = 2 * 4 * draws * positions * config.heads * rest * slots
    return item * (corrupted + clean + block) + scores + 4 * draws * rest * hidden


def facts_at_once(
    config: ModelConfig, params: PyTree[jax.Array], draws: int, before: int, rest: int, memory: int
) -> int:
    """How many facts a device of `memory` bytes takes in a call beside its part of the weights; at least 1."""
    held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(params))
    one = bytes_of_fact(config, head(params).dtype.itemsize, draws, before, rest)
    return max(1, int(SHARE * (memory - held)) // one)
