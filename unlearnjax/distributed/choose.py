"""Which mesh, and which way through the model, should be the fastest that fits: by the closed form of `estimate`."""

import itertools
import math
from collections.abc import Mapping, Sequence

import jax

from unlearnjax.distributed.estimate import Estimate, candidates_apart, estimate, merge_held, remat_of, tokens_of
from unlearnjax.distributed.mesh import CANDIDATE, DATA, FSDP, TENSOR, device_memory
from unlearnjax.distributed.programs import Workload
from unlearnjax.distributed.topology import Chip, chip_of
from unlearnjax.models.config import ModelConfig, Remat

FULL = 0.9  # of a device's memory that the closed form may fill: it knows nothing of tiles and fragments


def this_chip(devices: int) -> Chip | None:
    """One of this job's so many devices; None where they do not tell their memory, as CPUs."""
    memory = device_memory()
    return None if memory is None else chip_of(jax.devices()[0].device_kind, devices, memory)


def fits(found: Estimate, memory: float) -> bool:
    """Whether a device of so many bytes should hold it."""
    return found.held <= FULL * memory


def _rounded(seconds: float) -> float:
    """What is the same but for the order in which it was computed compares as the same."""
    return float(f"{seconds:.6g}")


def ways(config: ModelConfig, w: Workload, sizes: Mapping[str, int], chip: Chip) -> list[Workload]:
    """The workload with each way of its step through the model filled in, the one that should be fastest first; those
    that cannot fit come last, the one that is nearest to it first.

    A way is what the backward pass recomputes, and how many of a device's candidates go through the model at once: what
    it keeps grows with both. Of ways that are as fast the one that has more candidates at once comes first: its
    products are larger. What the workload says itself is left as it is.
    """
    own = candidates_apart(w, sizes)
    remats: list[Remat] = ["linears", "full"]
    if remat_of(config, w) == "none":
        remats = ["none", *remats]
    if w.remat:
        remats = [w.remat]
    bounds = [w.tokens_at_once]
    if w.tokens_at_once is None:
        bounds += [n * tokens_of(w) for n in range(own - 1, 0, -1) if own % n == 0]

    def order(way: Workload) -> tuple[bool, float, float]:
        found = estimate(config, way, sizes, chip)
        large = not fits(found, chip.memory)
        return large, found.held if large else _rounded(found.seconds), -(way.tokens_at_once or math.inf)

    return sorted((w._replace(remat=r, tokens_at_once=b) for r in remats for b in bounds), key=order)


def best_way(config: ModelConfig, w: Workload, sizes: Mapping[str, int], chip: Chip) -> tuple[Workload, Estimate]:
    """The first of `ways`, and what it takes."""
    way = ways(config, w, sizes, chip)[0]
    return way, estimate(config, way, sizes, chip)


def most_candidates(config: ModelConfig, w: Workload, sizes: Mapping[str, int], memory: float) -> int:
    """How many of the workload's candidates a device of so many bytes holds: at least 1, and where that can be, as many
    as lie apart on the mesh or a multiple."""
    apart = sizes.get(CANDIDATE, 1)
    chip = Chip(1.0, memory, 1.0, 1.0)
    wanted = [n for n in range(1, w.candidates + 1) if n % apart == 0 or n < apart]
    found = {n: best_way(config, w._replace(candidates=n), sizes, chip)[1] for n in wanted}
    return max((n for n in wanted if fits(found[n], memory)), default=1)


def meshes(config: ModelConfig, work: Workload | Sequence[Workload], devices: int, chip: Chip) -> list[dict[str, int]]:
    """Meshes of so many devices, the one that should be fastest first (of those as fast, the one that sends least);
    then those that have no room for a merge of all candidates; last those that cannot fit, the nearest to it first.

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

    def order(sizes: Mapping[str, int]) -> tuple[bool, bool, float, float, int, float]:
        own = [best_way(config, w, sizes, chip)[1] for w in works]
        held = max(one.held for one in own)
        large = not all(fits(one, chip.memory) for one in own)
        alone = max(merge_held(config, w, sizes) for w in works) > FULL * chip.memory
        seconds, apart = (_rounded(sum(times)) for times in zip(*((one.seconds, one.apart) for one in own)))
        return large, alone, held if large else seconds, apart, sizes[TENSOR], held

    return sorted(found, key=order)


def fastest(config: ModelConfig, works: Sequence[Workload], devices: int, chip: Chip) -> dict[str, int]:
    """The first of `meshes`; where none fits, of half as many candidates at once, and so on."""
    while True:
        best = meshes(config, works, devices, chip)[0]
        if all(fits(best_way(config, w, best, chip)[1], chip.memory) for w in works):
            return best
        if max(w.candidates for w in works) == 1:
            return best
        works = [w._replace(candidates=math.ceil(w.candidates / 2)) for w in works]
