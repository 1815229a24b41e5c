"""Which mesh suits a recipe's candidates, which way they go through the model, and how many of them train together
where not all of them fit."""

import math
from collections.abc import Mapping, Sequence

import jax
from jax.sharding import Mesh

from unlearnjax.distributed.choose import best_way, fastest, most_candidates, this_chip
from unlearnjax.distributed.mesh import choose_mesh, device_memory
from unlearnjax.distributed.programs import Workload
from unlearnjax.distributed.topology import chip_of
from unlearnjax.models.abstract import weight_bytes
from unlearnjax.models.config import ModelConfig, Remat
from unlearnjax.models.decoder import UNROLLED, default_remat
from unlearnjax.recipes.prepare import Prepared
from unlearnjax.recipes.schema import Recipe


def candidates_at_once(
    recipe: Recipe, groups: Sequence[Prepared], config: ModelConfig, dtype: str, mesh: Mesh | None, models: int
) -> int | None:
    """How many candidates of a group at most go into one program, by the closed form of what they hold; None: all.

    Where devices do not tell their memory (CPUs) nothing is bounded, and neither are groups that train the model's own
    weights, which the closed form does not know.

    Args:
      models: of the base's size that stay on the devices (see `Workload`).
    """
    memory = device_memory()
    if memory is None:
        return None
    sizes = {} if mesh is None else dict(mesh.shape)
    found = []
    for work in workloads(recipe, groups, config, dtype, models):
        most = most_candidates(config, work, sizes, memory)
        if most < work.candidates:
            found.append(most)
    return min(found, default=None)


def way_of(
    recipe: Recipe, prepared: Prepared, config: ModelConfig, dtype: str, mesh: Mesh | None, models: int
) -> tuple[Remat | None, int | None]:
    """What a group's backward pass recomputes, and the tokens that go through the model at once: what the recipe says,
    else, where devices tell their memory, the fastest that fits by the closed form (see `ways`), else None each.

    Args:
      models: see `candidates_at_once`.
    """
    training, chip = recipe.training, this_chip(1 if mesh is None else mesh.size)
    if chip is None or prepared.group.kind.adapter != "lora":
        return training.remat, training.tokens_at_once
    (work,) = workloads(recipe, [prepared], config, dtype, models)
    way, _ = best_way(config, work, {} if mesh is None else dict(mesh.shape), chip)
    return way.remat, way.tokens_at_once


def rows_of(prepared: Prepared) -> int:
    """Rows of each side in a candidate's step: of several micro-batches, where these are small."""
    return int(next(iter(prepared.schedule.steps[0].rows.values())).shape[1])


def workloads(
    recipe: Recipe, groups: Sequence[Prepared], config: ModelConfig, dtype: str, models: int
) -> list[Workload]:
    """Of each group of LoRAs, which train together. Those on some layers are taken to be on all, and recompute what the
    model does by default."""
    found = []
    for prepared in groups:
        if prepared.group.kind.adapter != "lora":
            continue
        own = [recipe.candidates[i] for i in prepared.group.places]
        every = prepared.group.kind.layers is None
        found.append(Workload(
            len(own), rows_of(prepared), max(step.width for step in prepared.schedule.steps),
            max(c.rank for c in own), tuple(t.name for t in prepared.objective.terms), dtype,
            max(int(side.length.sum()) for side in prepared.sides.values()),
            tokens_at_once=recipe.training.tokens_at_once,
            remat=recipe.training.remat if every else default_remat(config.layers <= UNROLLED),
            copies=4 + (recipe.training.keep_best is not None), models=models,
        ))  # fmt: skip
    return found


def mesh_for(
    sizes: Mapping[str, int] | Mesh | None,
    recipe: Recipe,
    groups: Sequence[Prepared],
    config: ModelConfig,
    dtype: str,
    models: int,
) -> Mesh | None:
    """`choose_mesh`, by default the one that the closed form calls fastest for these groups, as `plan` does; where all
    train the model's own weights, of which that knows nothing, by sizes alone.

    Args:
      models: see `candidates_at_once`.

    Raises:
      UserError: see `choose_mesh`.
    """
    works = workloads(recipe, groups, config, dtype, models)
    rows = min(len(g.objective.sides) * rows_of(g) for g in groups)

    def best(devices: int, memory: int) -> Mapping[str, int]:
        return fastest(config, works, devices, chip_of(jax.devices()[0].device_kind, devices, memory))

    together = math.gcd(*(len(g.group.places) for g in groups))
    weights = models * weight_bytes(config, dtype)
    return choose_mesh(sizes, together, weights, rows, best if works else None)
