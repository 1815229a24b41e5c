"""The training of a recipe's candidates: group after group, each group in one compiled program per length bucket."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, PyTree

from unlearnjax.adapters.lora import widened
from unlearnjax.adapters.restricted import change_on_host
from unlearnjax.distributed.mesh import mesh_of
from unlearnjax.distributed.processes import fetch
from unlearnjax.errors import UserError
from unlearnjax.models.attention import flash_suits
from unlearnjax.models.config import Remat
from unlearnjax.models.language_model import LanguageModel
from unlearnjax.models.protocol import Model
from unlearnjax.recipes.groups import adapters_of
from unlearnjax.recipes.prepare import Prepared
from unlearnjax.recipes.schema import Recipe
from unlearnjax.training.best import Assessor, sampled
from unlearnjax.training.hyperparameters import index
from unlearnjax.training.interrupt import Stop
from unlearnjax.training.keeper import Keeper
from unlearnjax.training.loop import Result, abstract_states, train
from unlearnjax.training.reference import stores_for
from unlearnjax.training.step import Task
from unlearnjax.training.waypoints import recorder, waypoint_steps

Way = tuple[Remat | None, int | None]  # what is recomputed, tokens at once; None: by default


class Taken(NamedTuple):
    """How a group's steps went through the model: see `Training`, and `flash` of `unlearnjax.models.decoder.build`."""

    remat: Remat
    tokens_at_once: int | None
    flash: bool


class Trained(NamedTuple):
    """All candidates after training.

    lora: the LoRAs stacked over N, padded with zeros to one rank, to all layers and to the same linears, and zero for
    candidates that are none; None where no candidate is a LoRA. scale: [N], alpha / rank.
    result: the history of all N; its states hold no weights any more.
    deltas: of the other candidates, by their place among the N: the change of the weights, float32, in host memory.
    kept: after how many updates each candidate was best, by its place; empty where the last state is what is kept.
    ways: of each group.
    """

    lora: PyTree[Array] | None
    scale: Array
    result: Result
    deltas: Mapping[int, PyTree[Array]] = MappingProxyType({})
    kept: Mapping[int, int] = MappingProxyType({})
    ways: Sequence[Taken] = ()


def train_candidates(
    model: LanguageModel,
    groups: Sequence[Prepared],
    recipe: Recipe,
    *,
    progress: bool = False,
    keepers: Sequence[Keeper] = (),
    stop: Stop | None = None,
    waypoints: Path | None = None,
    ways: Sequence[Way] = (),
) -> Trained:
    """Train every candidate of the recipe.

    Args:
      groups: of `prepare`.
      ways: how each group goes through the model (see `way_of`); default: as the recipe says.
      keepers: one for each group. They get checkpoints; training goes on from the newest ones.
      stop: asks training to save itself and to raise `Interrupted`.
      waypoints: gets the adapters at the recipe's waypoints (see `check_waypoints`).
    """
    results, loras, deltas = [], {}, {}
    kept: dict[int, int] = {}
    taken = []
    stacked = None
    ordinary = len(groups) == 1 and groups[0].group.kind.layers is None  # trained as the stack that is wanted
    for number, group in enumerate(groups):
        keeper = keepers[number] if keepers else None
        label = "training" if len(groups) == 1 else f"training {number + 1}/{len(groups)}"
        remat, tokens_at_once = ways[number] if ways else (recipe.training.remat, recipe.training.tokens_at_once)
        decoder = _decoder(model, group, remat)
        taken.append(Taken(decoder.remat, tokens_at_once, decoder.flash))
        result = _train(model, decoder, tokens_at_once, group, recipe, keeper, stop, waypoints, progress, label)
        best = result.states.best
        trained = result.states.trainable if best == () else best.trainable
        if best != ():
            kept |= zip(group.group.places, fetch(best.updates).tolist(), strict=True)
        # Moments and gradients are done with: the next group, and the evaluation, need their room.
        results.append(result._replace(states=result.states._replace(trainable=(), moments=(), gradient=(), best=())))
        del result, best
        if ordinary:
            stacked = trained
            break
        for i, place in enumerate(group.group.places):
            own = index(trained, i)
            if group.group.kind.adapter == "full":
                deltas[place] = change_on_host(model.params, own, group.group.layers[i])
            elif group.group.kind.layers is None:
                loras[place] = own
            else:
                loras[place] = widened(own, group.group.layers[i], model.config.layers)
            del own
        del trained
    if loras:
        stacked = _stacked(loras, len(recipe.candidates))
    scale = jnp.asarray([c.alpha / c.rank for c in recipe.candidates], jnp.float32)
    return Trained(stacked, scale, _together(results, groups), deltas, kept, taken)


def _decoder(model: LanguageModel, prepared: Prepared, remat: Remat | None) -> Model:
    """The model's decoder as a group trains through it."""
    decoder = model.model
    if prepared.group.kind.layers is not None:  # adapters of some layers give them taken apart
        decoder = decoder.rebuilt(unroll=True)
    elif remat is not None:
        decoder = decoder.rebuilt(remat=remat)
    widths = [step.width for step in prepared.schedule.steps]
    # On a mesh cuDNN's kernel was not tried.
    alone, dtype = mesh_of(model.params) is None, model.params["embed"]["weight"].dtype
    if alone and flash_suits(model.config.head_dim, dtype, widths):
        decoder = decoder.rebuilt(flash=True)
    return decoder


def _train(
    model: LanguageModel,
    decoder: Model,
    tokens_at_once: int | None,
    prepared: Prepared,
    recipe: Recipe,
    keeper: Keeper | None,
    stop: Stop | None,
    waypoints: Path | None,
    progress: bool,
    label: str,
) -> Result:
    kind, h = prepared.group.kind, prepared.hyperparameters
    candidates = [recipe.candidates[i] for i in prepared.group.places]
    variants = adapters_of(prepared.group, model.config, recipe.adapter.targets, max(c.rank for c in candidates))
    use_dropout = kind.adapter == "lora" and any(c.dropout > 0 for c in candidates)
    task = Task(
        decoder, variants[0][0], prepared.objective, use_dropout, tokens_at_once,
        tuple(variants) if len(variants) > 1 else (), recipe.training.keep_best is not None,
    )  # fmt: skip
    assessor = None
    if recipe.training.keep_best is not None:
        read = {side: prepared.sides[side] for side in prepared.objective.sides}
        rows = max(c.micro_batch for c in candidates)
        assessor = Assessor(recipe.training.keep_best, sampled(read, recipe.training.best_rows, rows))
    start = None
    if keeper is not None:
        start = keeper.restore(abstract_states(task, model.params, h))
    stores = {}
    steps = prepared.schedule.steps
    if start is None or start.step < len(steps):
        stores = stores_for(model.model, model.params, prepared.sides, prepared.objective, recipe.training.buckets)
    after_step = None
    if waypoints is not None:
        after_step = recorder(waypoints, waypoint_steps(len(steps), recipe.training.waypoints))
    return train(
        task, model.params, stores, prepared.schedule, h, progress=progress, label=label, start=start, keeper=keeper,
        stop=stop, after_step=after_step, assessor=assessor,
    )  # fmt: skip


def check_waypoints(recipe: Recipe, groups: Sequence[Prepared]) -> None:
    """Check that the recipe's candidates can be looked at on the way, if it asks for that.

    Raises:
      UserError: they are not all LoRAs on all layers that train together.
    """
    if recipe.training.waypoints and (len(groups) > 1 or groups[0].group.kind.layers is not None):
        raise UserError(
            "recipe: training: waypoints are for candidates that train together as LoRAs on all layers; set them to 0"
        )


def _stacked(loras: Mapping[int, PyTree[Array]], count: int) -> PyTree[Array]:
    """Adapters by place to one stack of `count`: padded with zeros where a rank, a linear or a candidate is missing."""
    pairs: dict[tuple[str, str], dict[int, dict[str, Array]]] = {}
    for place, tree in loras.items():
        for block, linears in tree["layers"].items():
            for linear, pair in linears.items():
                pairs.setdefault((block, linear), {})[place] = pair
    rank = max(pair["a"].shape[-2] for own in pairs.values() for pair in own.values())
    layers: dict[str, dict[str, dict[str, Array]]] = {}
    for (block, linear), own in pairs.items():
        like = next(iter(own.values()))
        layer_count, _, inner = like["a"].shape
        a = jnp.zeros((count, layer_count, rank, inner), jnp.float32)
        b = jnp.zeros((count, layer_count, like["b"].shape[1], rank), jnp.float32)
        for place, pair in own.items():
            r = pair["a"].shape[-2]
            a, b = a.at[place, :, :r].set(pair["a"]), b.at[place, :, :, :r].set(pair["b"])
        layers.setdefault(block, {})[linear] = {"a": a, "b": b}
    return {"layers": layers}


def _together(results: Sequence[Result], groups: Sequence[Prepared]) -> Result:
    """The groups' histories as one, in the recipe's order of candidates."""
    if len(results) == 1:
        return results[0]
    places = [place for group in groups for place in group.group.places]
    order = sorted(range(len(places)), key=places.__getitem__)
    curves = [curve for r in results for curve in r.curves]
    diverged = [at for r in results for at in r.diverged_at]
    return Result(
        results[0].states, [curves[i] for i in order], [diverged[i] for i in order], sum(r.seconds for r in results),
        sum(r.candidate_steps for r in results), sum(r.steady_seconds for r in results),
        sum(r.steady_candidate_steps for r in results),
    )  # fmt: skip
