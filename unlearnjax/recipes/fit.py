"""How many candidates train together where not all of them fit."""

from collections.abc import Sequence

from jax.sharding import Mesh

from unlearnjax.distributed.estimate import most_candidates
from unlearnjax.distributed.mesh import device_memory
from unlearnjax.distributed.programs import Workload
from unlearnjax.models.config import ModelConfig
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
    for prepared in groups:
        if prepared.group.kind.adapter != "lora":
            continue
        own = [recipe.candidates[i] for i in prepared.group.places]
        work = Workload(
            len(own), max(c.micro_batch for c in own), max(step.width for step in prepared.schedule.steps),
            max(c.rank for c in own), tuple(t.name for t in prepared.objective.terms), dtype,
            max(int(side.length.sum()) for side in prepared.sides.values()),
            copies=4 + (recipe.training.keep_best is not None), models=models,
        )  # fmt: skip
        most = most_candidates(config, work, sizes, memory)
        if most < len(own):
            found.append(most)
    return min(found, default=None)
