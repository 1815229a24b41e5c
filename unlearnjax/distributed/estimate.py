"""What a training step costs in closed form: what `choose` decides by, and what can be said of GPUs.

(Where layers are unrolled the last one works at the answers alone, which is not counted here.)

Symbols: P base linears (entries over all layers), V x D the head, R an adapter's entries, T tokens and M answer slots
of one candidate's step on both sides, W tokens of a row, L layers. Products of one candidate, a multiply-add as two:

    forward             2 T P + 2 T R + 4 T W D L
    backward            2 T P + 4 T R + 8 T W D L          (the base is frozen: no gradient of its own)
    once more forward   2 T (P - d) + 2 T (R - e) + 4 T W D L   (where whole layers are recomputed in the backward
                        pass: all but the product that ends one, of d entries of the base and e of the adapters)
                        4 T W D L   (where their linears' outputs are kept: the scores and the mixture)
    head                4 M V D                            (value and gradient together)
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

from unlearnjax.distributed.mesh import CANDIDATE, DATA, FSDP, TENSOR
from unlearnjax.distributed.programs import Workload
from unlearnjax.distributed.rules import cut_by
from unlearnjax.distributed.topology import Chip
from unlearnjax.models.config import ModelConfig, Remat
from unlearnjax.models.decoder import UNROLLED, default_remat
from unlearnjax.objectives.objective import TERMS, sides_of
from unlearnjax.training.step import group_size


class Estimate(NamedTuple):
    """Of one device and step: products, bytes sent, bytes that stay on it; seconds of the slower of the first two, and
    of both, one after the other."""

    flops: float
    sent: float
    held: float
    seconds: float
    apart: float


def _linears(config: ModelConfig) -> tuple[int, int]:
    """Entries of all layers' linears, and of a rank-1 adapter on them."""
    sizes = [(out, inner) for _, out, inner in config.linears.values()]
    return config.layers * sum(o * i for o, i in sizes), config.layers * sum(o + i for o, i in sizes)


def tokens_of(w: Workload) -> int:
    """Of one candidate in a step."""
    return len(sides_of(TERMS[name] for name in w.terms)) * w.micro_batch * w.length


def step_flops(config: ModelConfig, w: Workload, recomputed: bool = True) -> float:
    """Products of one training step of all candidates.

    Args:
      recomputed: count what the backward pass does once more. Without: what the model needs, as MFU has it.
    """
    base, adapter = _linears(config)
    adapter *= w.rank
    tokens = tokens_of(w)
    attention = tokens * w.length * config.heads * config.head_dim * config.layers
    forward = 2 * tokens * (base + adapter) + 4 * attention
    backward = 2 * tokens * (base + 2 * adapter) + 8 * attention
    _, out, inner = config.linears["down"]
    last = 2 * tokens * config.layers * out * (inner + w.rank)
    again = {"none": 0, "linears": 4 * attention, "full": forward - last}[remat_of(config, w)] if recomputed else 0
    head = 4 * tokens / 2 * config.vocab_size * config.hidden_size
    return float(w.candidates * (forward + backward + again + head))


def remat_of(config: ModelConfig, w: Workload) -> Remat:
    """What the workload's step recomputes; by default what `build` does."""
    return w.remat or default_remat(config.layers <= UNROLLED)


def candidates_apart(w: Workload, sizes: Mapping[str, int]) -> int:
    """How many candidates a device of the mesh has."""
    apart = sizes.get(CANDIDATE, 1)
    return w.candidates // (apart if w.candidates % apart == 0 else 1)


def candidates_together(w: Workload, own: int) -> int:
    """How many of a device's `own` candidates go through the model at once."""
    most = own if w.tokens_at_once is None else w.tokens_at_once // tokens_of(w)
    return group_size(own, most, w.candidates // own)


def _kept(config: ModelConfig, w: Workload, tensor: int) -> float:
    """Numbers that a token leaves for the backward pass in one layer, on a device. XLA cuts what enters a layer along
    `tensor` to keep it."""
    hidden, wide = config.hidden_size, 2 * config.intermediate_size
    asked = (config.heads + 2 * config.kv_heads) * config.head_dim
    if remat_of(config, w) == "full":
        return hidden / tensor
    if remat_of(config, w) == "linears":
        ends = 1 if config.norms == "before" else 2  # a norm of what ends a layer reads that once more
        return ends * hidden + (hidden + asked + wide) / tensor + len(config.linears) * w.rank
    return _busy(config, w, tensor)


def _busy(config: ModelConfig, w: Workload, tensor: int) -> float:
    """Numbers of a token that are alive at once in one layer's backward pass: as measured, and its scores."""
    cut = 7 * config.hidden_size + 8 * config.intermediate_size + 3 * config.heads * w.length
    return 5 * config.hidden_size + cut / tensor


def estimate(config: ModelConfig, w: Workload, sizes: Mapping[str, int], chip: Chip) -> Estimate:
    """What a mesh of these sizes makes of it, the way that the workload says."""
    data, fsdp, tensor = (sizes.get(axis, 1) for axis in (DATA, FSDP, TENSOR))
    base, adapter = _linears(config)
    width = 2 if w.dtype != "float32" else 4
    own = candidates_apart(w, sizes)
    group = candidates_together(w, own)
    rows = math.prod([sizes[axis] for axis in cut_by("rows", tokens_of(w) // w.length, sizes)])
    flops = step_flops(config, w) * own / w.candidates / (rows * tensor)
    embeddings = config.vocab_size * config.hidden_size * (1 if config.tie_embeddings else 2)
    # Float32, cut along their long axis too. A group's gradients are whole before they are added; and where there are
    # several groups, what they start from and what they end with are not in one place.
    one = 4 * adapter * w.rank / (fsdp * tensor)
    states = w.copies * own * one + group * one
    if group < own:
        states += (1 if chip.tpu else 2) * own * one
    tokens = group * tokens_of(w) / rows  # on a device at once
    passes = (3 if remat_of(config, w) == "full" else 2) * -(-own // group)
    sent = passes * (base + embeddings) * width / tensor * (fsdp - 1) / fsdp
    # Two sums of activations in each pass through a layer, which XLA forms in float32.
    sent += 2 * 2 * 4 * passes * config.layers * tokens * config.hidden_size * (tensor - 1) / tensor
    # A layer's adapters are gathered from where they are cut, and their gradients summed to there.
    sent += 2 * own * one * (fsdp * tensor - 1 + (data - 1) / data)
    held = w.models * (base + embeddings) * width / (fsdp * tensor) + states
    held += tokens * width * (config.layers * _kept(config, w, tensor) + _busy(config, w, tensor))
    held += w.set_tokens * config.hidden_size * 4 / (fsdp * tensor)
    if fsdp > 1:  # two layers' weights, or an embedding, gathered
        held += max(2 * base / config.layers, config.vocab_size * config.hidden_size) * width / tensor
    products, links = flops / chip.flops + passes * config.layers * chip.layer, sent / chip.link
    return Estimate(flops, sent, held, max(products, links), products + links)


def merge_held(config: ModelConfig, w: Workload, sizes: Mapping[str, int]) -> float:
    """Bytes of a device while all candidates' LoRAs are merged in delta space: base weights, the adapters where
    training left them and as a merge reads them, the merged delta, and one linear's deltas of a layer four times."""
    base, adapter = _linears(config)
    width = 2 if w.dtype != "float32" else 4
    cut = sizes.get(FSDP, 1) * sizes.get(TENSOR, 1)
    embeddings = config.vocab_size * config.hidden_size * (1 if config.tie_embeddings else 2)
    held = w.models * (base + embeddings) * width / cut
    devices = math.prod(sizes.values())
    held += 4 * adapter * w.rank * (candidates_apart(w, sizes) / cut + w.candidates / devices)
    largest, wide = max((out * inner, inner) for _, out, inner in config.linears.values())
    held += 4 * w.candidates * (w.rank * wide + 4 * largest / devices)
    return held + 4 * base / devices
