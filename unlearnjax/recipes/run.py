"""The whole job: read, train all candidates, merge, evaluate everything, write what others can load."""

import contextlib
import dataclasses
import datetime
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jax.sharding import Mesh

import unlearnjax
from unlearnjax.adapters.lora import lora_weights, scaled
from unlearnjax.distributed.mesh import describe_sizes, mesh_of
from unlearnjax.distributed.processes import require_same
from unlearnjax.distributed.rules import idle
from unlearnjax.errors import UserError
from unlearnjax.evaluation.journal import Journal
from unlearnjax.evaluation.mmlu import SHOTS, Prompts
from unlearnjax.io.atomic import staged_file
from unlearnjax.io.huggingface import check_dtype, load_params, resolve
from unlearnjax.models.language_model import LanguageModel, save_model
from unlearnjax.recipes.describe import (
    describe_candidates,
    describe_data,
    describe_hardware,
    describe_mmlu,
    describe_model,
    describe_training,
)
from unlearnjax.recipes.evaluate_step import evaluate_all
from unlearnjax.recipes.export_step import changed, choose_export, save_candidates, save_merges
from unlearnjax.recipes.fit import candidates_at_once, mesh_for, way_of
from unlearnjax.recipes.layers_step import traced_layers
from unlearnjax.recipes.merge_step import Exported, Merged, at_scale, delta_of, describe, export, merge_candidates
from unlearnjax.recipes.prepare import (
    Data,
    Sources,
    load_data,
    load_prompts,
    load_reference,
    padding_share,
    prepare,
    without_weights,
)
from unlearnjax.recipes.progress import say_by_warning
from unlearnjax.recipes.resume import (
    CHECKPOINTS,
    EVALUATION,
    check_interval,
    claim,
    clear,
    data_fingerprint,
    model_fingerprint,
    run_fingerprint,
)
from unlearnjax.recipes.schema import EACH, SEARCH, Merge, Recipe, to_plain
from unlearnjax.recipes.search_step import Searcher
from unlearnjax.recipes.train_step import Trained, check_waypoints, train_candidates
from unlearnjax.recipes.trajectory_step import trajectories
from unlearnjax.report.html import render_html
from unlearnjax.report.schema import write_report
from unlearnjax.training.hyperparameters import index
from unlearnjax.training.interrupt import Stop
from unlearnjax.training.keeper import open_keeper
from unlearnjax.training.loop import finished
from unlearnjax.training.waypoints import waypoint_steps

CHECKPOINT_EVERY = 120.0  # seconds
WAYPOINTS = "waypoints"  # a folder beside the checkpoints, and gone with them


def _no_search(options: Sequence[Merged]) -> Merged:
    raise ValueError(f"merge {options[0].merge.name}: its scale is to be searched; give merge_all a search")


def merge_all(
    recipe: Recipe,
    trained: Trained,
    choose: Callable[[Sequence[Merged]], Merged] = _no_search,
    mesh: Mesh | None = None,
) -> tuple[list[tuple[Merged, Exported]], list[str]]:
    """Every merge of the recipe over the candidates that did not diverge, and warnings about what was left out.

    Args:
      choose: the search of scales (`Searcher.choose`), for recipes that ask for one.
      mesh: see `merge_candidates`.
    """
    kept = finished(trained.result)
    warnings = [
        f"candidate {candidate.name} diverged after {at} updates; it is left out of every merge"
        for candidate, at in zip(recipe.candidates, trained.result.diverged_at, strict=True)
        if at is not None
    ]
    names, ranks = [c.name for c in recipe.candidates], [c.rank for c in recipe.candidates]
    deltas, largest = trained.deltas, max((c.rank for c in recipe.candidates if c.adapter == "lora"), default=1)

    def merge(wanted: Merge) -> Merged:
        own, mine = _of(wanted, names, kept)
        return merge_candidates(own, trained.lora, trained.scale, mine, recipe.training.seed, ranks, deltas, mesh)

    def options(wanted: Merge) -> list[Merged]:
        each = [dataclasses.replace(wanted, of=[names[i]]) for i in kept] if wanted.of == EACH else []
        return [merge(one) for one in each or [wanted]]  # with nobody left, `merge` says so

    made = []
    for wanted in recipe.merges:
        try:
            if wanted.scale == SEARCH:
                merged = choose(options(wanted))
                if merged.scale == 0:
                    warnings.append(f"merge {wanted.name} is the base: no scale that keeps enough forgets more")
            else:
                merged = at_scale(merge(wanted), float(wanted.scale))
        except UserError as error:
            # The recipe was checked with all candidates; with those that are left a merge can be impossible.
            warnings.append(f"merge {wanted.name} was not made: {error}")
        else:
            if merged.length == 0 and merged.scale != 0:
                warnings.append(
                    f"merge {wanted.name} changes nothing: it kept no weight of its candidates (those that train "
                    "different layers share none)"
                )
            made.append((merged, export(merged, trained.lora, trained.scale, largest, deltas)))
    return made, warnings


def _of(wanted: Merge, names: Sequence[str], kept: Sequence[int]) -> tuple[Merge, list[int]]:
    """The merge with a weight for each of the recipe's candidates, and the indices of those that it merges."""
    if wanted.of is None:
        return wanted, list(kept)
    if wanted.weights is not None:
        given = dict(zip(wanted.of, wanted.weights, strict=True))
        wanted = dataclasses.replace(wanted, weights=[given.get(name, 0.0) for name in names])
    return wanted, [i for i in kept if names[i] in wanted.of]  # type: ignore[operator]


def run(
    model: str | LanguageModel,
    sources: Sources,
    out: str | Path,
    recipe: Recipe,
    *,
    gold: str | LanguageModel | None = None,
    mmlu_data: str | None = None,
    mmlu_shots: int = SHOTS,
    dtype: str = "float32",
    command: Sequence[str] = (),
    title: str | None = None,
    progress: bool = True,
    resume: bool = False,
    checkpoint_every: float = CHECKPOINT_EVERY,
    stop: Stop | None = None,
    say: Callable[[str], None] | None = None,
    mesh: Mesh | Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Unlearn: the job that `unlearnjax run` does.

    Args:
      model: a folder, a hub id, or a loaded model.
      sources: where forget, retain, members, non-members and probe rows come from.
      out: a new or empty folder. It gets candidates/ and merges/ (PEFT adapters; Hugging Face folders of what trained
        weights), model/ (the chosen merge, or of a recipe without merges the best candidate, as a Hugging Face folder),
        generations/ (CSV), trace/ where layers are found by it, recipe.yml, report.json and report.html. Each appears
        whole; report.json comes last, so a folder without it is a run that did not end.
      recipe: see `unlearnjax.recipes.load.load_recipe`.
      gold: a model that never saw the forget rows, to compare with: a folder, a hub id, or a loaded model, of the sizes
        and the tokenizer of `model`.
      mmlu_data, mmlu_shots: measure MMLU of everything that is evaluated (see `load_mmlu`), which the official
        aggregate needs, with so many solved questions before each.
      dtype: of the base weights, when `model` is a name.
      command: the command line, for the report.
      resume: go on with the unfinished run in `out`, if there is one. Everything that determines the weights must be as
        it was. What has been trained is not trained again, and a batch that was evaluated is not evaluated again;
        adapters and merges are written anew.
      checkpoint_every: seconds of training between checkpoints (in `out`/checkpoints, removed when the run has ended).
      stop: see `unlearnjax.training.interrupt.catch_signals`.
      say: receives lines about checkpoints and journals that could not be written or read; default: Python warnings.
      mesh: the devices that share the work, or their number along each axis (see `unlearnjax.distributed.mesh`), when
        `model` is a name; default: see `mesh_for`. A loaded model uses those that it lies on.

    Returns:
      The report (see `unlearnjax.report.schema`). Its `exported` names the merge in model/; both are absent where no
      merge could be made, because candidates diverged or no scale kept enough (`warnings` says so).

    Raises:
      UserError: any bad input, before anything is computed or written.
      Interrupted: `stop` asked for it; the run can be resumed.
    """
    out = claim(out, resume)
    check_interval(checkpoint_every)
    check_dtype(dtype)
    data = load_data(sources)
    rows = data_fingerprint(data)
    require_same({
        "recipe": to_plain(recipe), "rows": rows, "--dtype": dtype, "--gold": gold is not None,
        "--mmlu-data": mmlu_data is not None, "--mmlu-shots": mmlu_shots,
    })  # fmt: skip
    # The weights are read last: everything else about the input is cheap to check.
    folder = resolve(model) if isinstance(model, str) else None
    lm = without_weights(folder, str(model)) if folder is not None else model
    assert isinstance(lm, LanguageModel)
    groups = prepare(recipe, lm, data, sources)
    check_waypoints(recipe, groups)
    mmlu = None if mmlu_data is None else load_prompts(lm, mmlu_data, mmlu_shots)
    shared, models = None, 1 if gold is None else 2
    if folder is None:
        dtype = lm.params["embed"]["weight"].dtype.name
    else:
        shared = mesh_for(mesh, recipe, groups, lm.config, dtype, models)
    if recipe.training.candidates_at_once is None:
        if resume and (out / "recipe.yml").exists():
            # What it was begun with, whatever the devices were there.
            begun = yaml.safe_load((out / "recipe.yml").read_text(encoding="utf-8"))
            most = begun.get("training", {}).get("candidates_at_once")
        else:
            at = mesh_of(lm.params) if folder is None else shared
            most = candidates_at_once(recipe, groups, lm.config, dtype, at, models)
        if most is not None:
            (say or say_by_warning)(
                f"more than {most} candidates at once do not fit: they train in turns (training: candidates_at_once)"
            )
            recipe = dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, candidates_at_once=most))
            groups = prepare(recipe, lm, data, sources)
            check_waypoints(recipe, groups)
    reference = None if gold is None else load_reference(gold, lm, dtype, "gold model", shared)
    if folder is not None:
        lm = dataclasses.replace(lm, params=load_params(folder, lm.config, dtype, shared))

    plain = to_plain(recipe)
    of_model, say = model_fingerprint(lm.params), say or say_by_warning
    layers = traced_layers(
        lm, recipe, data, sources, out, command=command, progress=progress, stop=stop, say=say
    )  # fmt: skip
    if layers:
        groups = prepare(recipe, lm, data, sources, layers)
    shared = mesh_of(lm.params)
    if shared is not None:
        for group in groups:
            step = next(iter(group.schedule.steps[0].rows.values())).shape[1]
            for warning in idle(shared, len(group.group.places), len(group.objective.sides) * step):
                say(f"warning: --mesh: {warning}")
    known = run_fingerprint(plain, rows, groups, of_model)
    keeper = open_keeper(out / CHECKPOINTS, known, every=checkpoint_every, say=say, resume=resume)
    journal = Journal(out / CHECKPOINTS / EVALUATION, of_model, say)
    with contextlib.ExitStack() as stack:
        stack.callback(keeper.close)
        keepers = [keeper]
        for number in range(2, len(groups) + 1):
            place = out / CHECKPOINTS / f"group-{number}"
            begun = resume and any(place.glob("*step-*"))
            keepers.append(open_keeper(place, known, every=checkpoint_every, say=say, resume=begun))
            stack.callback(keepers[-1].close)
        clear(out)
        with staged_file(out / "recipe.yml") as path:
            path.write_text(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True), encoding="utf-8")
        waypoints = out / CHECKPOINTS / WAYPOINTS if recipe.training.waypoints else None
        trained = train_candidates(
            lm, groups, recipe, progress=progress, keepers=keepers, stop=stop, waypoints=waypoints,
            ways=[way_of(recipe, group, lm.config, dtype, shared, models) for group in groups],
        )  # fmt: skip
        described_candidates = describe_candidates(recipe.candidates, trained.result, layers, trained.kept)
        if waypoints is not None:
            steps = waypoint_steps(len(groups[0].schedule.steps), recipe.training.waypoints)
            ways = trajectories(
                lm, waypoints, steps, trained.lora, trained.scale, recipe.evaluation, data, journal=journal,
                progress=progress, stop=stop,
            )  # fmt: skip
            for candidate, way in zip(described_candidates, ways, strict=True):
                candidate["trajectory"] = way
        described = {**describe_data(sources, data), "padding_share": padding_share(groups)}
        if mmlu_data is not None and mmlu is not None:
            described["mmlu"] = describe_mmlu(mmlu_data, mmlu)
        about = {
            "title": title or f"Unlearning with the recipe {recipe.name}",
            "command": list(command),
            "recipe": plain,
            "data": described,
            "candidates": described_candidates,
        }
        report = finish(
            lm, recipe, data, trained, out, about, gold=reference, mmlu=mmlu, journal=journal, progress=progress,
            stop=stop,
        )  # fmt: skip
        for own in reversed(keepers):
            own.remove()
    return report


def finish(
    lm: LanguageModel,
    recipe: Recipe,
    data: Data,
    trained: Trained,
    out: Path,
    about: dict[str, Any],
    *,
    gold: LanguageModel | None,
    mmlu: Prompts | None,
    journal: Journal,
    progress: bool,
    stop: Stop | None,
) -> dict[str, Any]:
    """What comes after training: write the candidates, merge, evaluate, export and report.

    Args:
      about: the report's parts that were known before training.
      gold, mmlu, journal, stop: see `evaluate_all`.
    """
    save_candidates(out / "candidates", lm, recipe, trained)
    mesh = mesh_of(lm.params)
    searcher = Searcher(lm, recipe, data, journal, progress, stop)
    merges, notes = merge_all(recipe, trained, searcher.choose, mesh)
    save_merges(out / "merges", lm, recipe, merges)
    adapters, kept = None if trained.lora is None else scaled(trained.lora, trained.scale), finished(trained.result)
    loras = {recipe.candidates[i].name: index(adapters, i) for i in kept if i not in trained.deltas}
    deltas = {recipe.candidates[i].name: trained.deltas[i] for i in kept if i in trained.deltas}
    asked = recipe.evaluation.evaluates
    models, more = evaluate_all(
        lm, {name: own for name, own in loras.items() if asked(name)}, [m for m, _ in merges], recipe.evaluation, data,
        out, deltas={name: own for name, own in deltas.items() if asked(name)}, gold=gold, mmlu=mmlu, journal=journal,
        progress=progress, stop=stop,
    )  # fmt: skip

    report: dict[str, Any] = {
        "schema": "unlearnjax.report",
        "version": 1,
        **about,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "unlearnjax": unlearnjax.__version__,
        "hardware": describe_hardware() | ({} if mesh is None else {"mesh": describe_sizes(mesh.shape)}),
        "training": describe_training(trained),
        "merges": [describe(m, e, [c.name for c in recipe.candidates]) for m, e in merges],
        "models": models,
        "warnings": [*notes, *more],
    }
    alone = [] if recipe.merges else [*loras, *deltas]
    chosen = choose_export(recipe.evaluation.export, [m for m, _ in merges], models, alone)
    if chosen is not None:
        if isinstance(chosen, str):
            name, delta = chosen, deltas[chosen] if chosen in deltas else lora_weights(loras[chosen])
        else:
            name, delta = chosen.merge.name, delta_of(chosen)
        report["exported"] = name
        save_model(changed(lm, delta), out / "model", card=describe_model(lm.source, report, name))
    with staged_file(out / "report.html") as path:
        path.write_text(render_html(report), encoding="utf-8")
    write_report(out, report)
    return report
