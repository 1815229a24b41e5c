"""What a training step costs in closed form: which meshes are worth compiling, and what can be said of GPUs.

(Where layers are unrolled the last one works at the answers alone, which is not counted here.)

Symbols: P base linears (entries over all layers), V x D the head, R an adapter's entries, T tokens and M answer slots
of one candidate's step on both sides, W tokens of a row, L layers. Products of one candidate, a multiply-add as two:

    forward             2 T P + 2 T R + 4 T W D L
    backward            2 T P + 4 T R + 8 T W D L          (the base is frozen: no gradient of its own)
    once more forward   2 T (P - d) + 2 T (R - e) + 4 T W D L   (where layers are recomputed in the backward pass: all
                        but the product that ends a layer, of d entries of the base and e of the adapters)
    head                4 M V D                            (value and gradient together)
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from unlearnjax.distributed.mesh import CANDIDATE, DATA, FSDP, TENSOR
from unlearnjax.distributed.programs import Workload
from unlearnjax.distributed.rules import cut_by
from unlearnjax.distributed.topology import Chip
from unlearnjax.models.config import ModelConfig
from unlearnjax.models.decoder import UNROLLED as SCANNED
from unlearnjax.objectives.objective import objective


class Estimate(NamedTuple):
    """Of one device and step: products, bytes sent, bytes that stay on it, seconds of the slower of the first two."""

    flops: float
    sent: float
    held: float
    seconds: float


def _linears(config: ModelConfig) -> tuple[int, int]:
    """Entries of all layers' linears, and of a rank-1 adapter on them."""
    sizes = [(out, inner) for _, out, inner in config.linears.values()]
    return config.layers * sum(o * i for o, i in sizes), config.layers * sum(o + i for o, i in sizes)


def step_flops(config: ModelConfig, w: Workload, recomputed: bool = True) -> float:
    """Products of one training step of all candidates.

    Args:
      recomputed: count the second pass forward too, where there is one. Without: what the model needs, as MFU has it.
    """
    base, adapter = _linears(config)
    adapter *= w.rank
    tokens = len(objective(w.terms).sides) * w.micro_batch * w.length
    attention = tokens * w.length * config.heads * config.head_dim * config.layers
    forward = 2 * tokens * (base + adapter) + 4 * attention
    backward = 2 * tokens * (base + 2 * adapter) + 8 * attention
    _, out, inner = config.linears["down"]
    last = 2 * tokens * config.layers * out * (inner + w.rank)
    again = forward - last if recomputed and config.layers > SCANNED else 0
    head = 4 * tokens / 2 * config.vocab_size * config.hidden_size
    return float(w.candidates * (forward + backward + again + head))


def estimate(config: ModelConfig, w: Workload, sizes: Mapping[str, int], chip: Chip) -> Estimate:
    """What a mesh of these sizes makes of it."""
    apart, data, fsdp, tensor = (sizes.get(axis, 1) for axis in (CANDIDATE, DATA, FSDP, TENSOR))
    base, adapter = _linears(config)
    width = 2 if w.dtype != "float32" else 4
    own = apart if w.candidates % apart == 0 else 1
    together = len(objective(w.terms).sides) * w.micro_batch
    rows = math.prod([sizes[axis] for axis in cut_by("rows", together, sizes)])
    flops = step_flops(config, w) / (own * rows * tensor)
    embeddings = config.vocab_size * config.hidden_size * (1 if config.tie_embeddings else 2)
    weights = (base + embeddings) * width / (fsdp * tensor)
    # Float32, cut along their long axis too.
    states = 4 * w.copies * w.candidates * adapter * w.rank / (own * fsdp * tensor)
    passes = 3 if config.layers > SCANNED else 2
    local = w.candidates / own * together * w.length / rows  # tokens on a device
    stream = local * config.hidden_size * width
    sent = passes * (base * width / tensor + embeddings * width / tensor) * (fsdp - 1) / fsdp
    sent += 4 * passes * config.layers * stream * (tensor - 1) / tensor
    gradients = 4 * w.candidates * adapter * w.rank / own
    sent += 2 * gradients / (fsdp * tensor) * (data * fsdp - 1) / (data * fsdp)
    kept = stream * config.layers if config.layers > SCANNED else 12 * stream * config.layers
    busy = local * (4 * config.intermediate_size + 8 * config.hidden_size) * width / tensor
    held = w.models * weights + states + kept + busy + w.set_tokens * config.hidden_size * 4 / (fsdp * tensor)
    return Estimate(flops, sent, held, max(flops / chip.flops, sent / chip.link))


def most_candidates(config: ModelConfig, w: Workload, sizes: Mapping[str, int], memory: float) -> int:
    """How many of the workload's candidates a device of so many bytes holds, by `estimate`: at least 1, and where that
    can be, as many as lie apart on the mesh or a multiple."""
    apart = sizes.get(CANDIDATE, 1)
    chip = Chip(1.0, memory, 1.0, 1.0)
    wanted = [n for n in range(1, w.candidates + 1) if n % apart == 0 or n < apart]
    held = {n: estimate(config, w._replace(candidates=n), sizes, chip).held for n in wanted}
    return max((n for n in wanted if held[n] <= 0.9 * memory), default=1)


def meshes(config: ModelConfig, work: Workload | Sequence[Workload], devices: int, chip: Chip) -> list[dict[str, int]]:
    """Meshes of so many devices, the one that should be fastest first; those that cannot fit come last, the one that
    is nearest to it first.

    Args:
      work: of several, which are done one after another, the sum of their times counts, and the largest must fit.
    """
    works = [work] if isinstance(work, Workload) else work
    divisors = [d for d in range(1, devices + 1) if devices % d == 0]
    found = []
    for tensor, fsdp in itertools.product(divisors, divisors):
        if devices % (tensor * fsdp) or config.kv_heads % tensor or config.intermediate_size % tensor:
            continue
        rest = devices // (tensor * fsdp)
        for apart in [d for d in divisors if rest % d == 0 and any(w.candidates % d == 0 for w in works)]:
            found.append({CANDIDATE: apart, DATA: rest // apart, FSDP: fsdp, TENSOR: tensor})

    def order(sizes: Mapping[str, int]) -> tuple[bool, float, int, float]:
        own = [estimate(config, w, sizes, chip) for w in works]
        held = max(one.held for one in own)
        large = held > 0.9 * chip.memory
        return large, held if large else sum(one.seconds for one in own), sizes[TENSOR], held

    return sorted(found, key=order)


def fastest(config: ModelConfig, works: Sequence[Workload], devices: int, chip: Chip) -> dict[str, int]:
    """The first of `meshes`; where none fits, of half as many candidates at once, and so on."""
    while True:
        best = meshes(config, works, devices, chip)[0]
        if max(estimate(config, w, best, chip).held for w in works) <= 0.9 * chip.memory:
            return best
        if max(w.candidates for w in works) == 1:
            return best
        works = [w._replace(candidates=math.ceil(w.candidates / 2)) for w in works]
