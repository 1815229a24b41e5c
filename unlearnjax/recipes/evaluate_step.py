"""The evaluation of a run: the base, every finished candidate and every merge, by the same protocol."""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from unlearnjax.adapters.apply import add_delta
from unlearnjax.evaluation.csvs import Scored, read_generations
from unlearnjax.evaluation.full.asked import Asking
from unlearnjax.evaluation.full.suite import SPLITS, Effort, Subjects, Texts, measure, yardsticks
from unlearnjax.evaluation.journal import Journal, digest
from unlearnjax.evaluation.mmlu import MmluScores, Prompts, mmlu_candidates
from unlearnjax.evaluation.protocol import Progress, decode, evaluate_candidates, stage
from unlearnjax.io.atomic import staged_file
from unlearnjax.models.language_model import LanguageModel
from unlearnjax.recipes.merge_step import Merged
from unlearnjax.recipes.prepare import Data
from unlearnjax.recipes.progress import bars
from unlearnjax.recipes.resume import weights_digest
from unlearnjax.recipes.schema import Evaluation
from unlearnjax.training.interrupt import Stop


def _is_pair(x: Any) -> bool:
    return isinstance(x, dict) and set(x) == {"a", "b"}


def _stack_adapters(adapters: Sequence[PyTree[Array]]) -> PyTree[Array]:
    """Adapters (scale folded in) of different ranks to one stack, padded with zeros to the largest rank."""
    largest = max(p["a"].shape[1] for t in adapters for p in jax.tree.leaves(t, is_leaf=_is_pair))

    def pad(pair: dict[str, Array]) -> dict[str, Array]:
        more = largest - pair["a"].shape[1]
        return {
            "a": jnp.pad(pair["a"], ((0, 0), (0, more), (0, 0))),
            "b": jnp.pad(pair["b"], ((0, 0), (0, 0), (0, more))),
        }

    padded = [jax.tree.map(pad, t, is_leaf=_is_pair) for t in adapters]
    return jax.tree.map(lambda *xs: jnp.stack(xs), *padded)


class Group(NamedTuple):
    """Models that share base weights, which are made when they are needed. `kinds` are the report's."""

    params: Callable[[], PyTree[Array]]
    stack: PyTree[Array] | None
    names: list[str]
    kinds: list[str]
    journal: Journal | None


def _summary(pairs: Sequence[tuple[str, str]], count: int) -> list[str]:
    """One line per warning; without names where all `count` models have it, because then it is about the data."""
    found: dict[str, list[str]] = {}
    for name, warning in pairs:
        if name not in found.setdefault(warning, []):
            found[warning].append(name)
    return [w if len(names) == count else f"{', '.join(names)}: {w}" for w, names in found.items()]


def measure_mmlu(
    model: LanguageModel,
    params: PyTree[Array],
    stack: PyTree[Array] | None,
    prompts: Prompts,
    batch_size: int,
    progress: Progress | None,
    journal: Journal | None,
) -> list[MmluScores]:
    """MMLU of the candidates of a stack (None: of `params` alone)."""
    count = 1 if stack is None else jax.tree.leaves(stack)[0].shape[0]
    advance = stage(progress, "MMLU", count * len(prompts.ids))
    return mmlu_candidates(
        model.model, params, stack, prompts, batch_size=batch_size, progress=advance, journal=journal
    )  # fmt: skip


def write_mmlu(folder: Path, scores: MmluScores) -> None:
    """Write mmlu.json, which the official script and `unlearnjax score --mmlu` read."""
    with staged_file(folder / "mmlu.json") as path:
        path.write_text(json.dumps(scores.as_json(), indent=1), encoding="utf-8")


def evaluate_all(
    model: LanguageModel,
    candidates: Mapping[str, PyTree[Array]],
    merges: Sequence[Merged],
    settings: Evaluation,
    data: Data,
    out: Path,
    *,
    deltas: Mapping[str, PyTree[Array]] = MappingProxyType({}),
    gold: LanguageModel | None = None,
    mmlu: Prompts | None = None,
    journal: Journal | None = None,
    progress: bool = False,
    stop: Stop | None = None,
) -> tuple[list[dict[str, Any]], list[str]]:
    """Score the base, the candidates and the merges. Whatever is an adapter is scored in one program, side by side.

    With `settings.suite` full, what the score hides is measured too (see `unlearnjax.evaluation.full.suite`).

    Args:
      candidates: adapters by name, with the scale folded in.
      out: gets a folder of CSV files per model under generations/.
      deltas: changes of the weights by name, of candidates that are no adapters.
      gold: a model of the same sizes that never saw the forget rows; scored like the others.
      mmlu: MMLU is measured too, and a mmlu.json is in each of these folders.
      journal: keeps finished batches; those in it are not computed again. Its fingerprint must tell the base weights.
      stop: looked at after each batch.

    Returns:
      The report's `models`, and the warnings.

    Raises:
      Interrupted: `stop` asked for it.
    """
    adapters = [(name, "candidate", lora) for name, lora in candidates.items()]
    adapters += [(m.merge.name, "merge", m.lora) for m in merges if m.lora is not None]
    stack = None
    if adapters:
        # An adapter of zeros is the base.
        stack = _stack_adapters([jax.tree.map(jnp.zeros_like, adapters[0][2]), *(lora for _, _, lora in adapters)])
    warnings: list[tuple[str, str]] = []

    def kept(name: str, changes: PyTree[Array] | None, **more: Any) -> Journal | None:
        return None if journal is None else journal.within(name, adapters=weights_digest(changes), **more)

    names, kinds = ["base", *(name for name, _, _ in adapters)], ["base", *(kind for _, kind, _ in adapters)]
    groups = [Group(lambda: model.params, stack, names, kinds, kept("base", stack))]
    if gold is not None:
        groups.insert(0, Group(lambda: gold.params, None, ["gold"], ["gold"], kept("gold", gold.params)))
    whole = [(name, "candidate", delta) for name, delta in deltas.items()]
    whole += [(m.merge.name, "merge", m.delta) for m in merges if m.delta is not None]
    for name, what, delta in whole:
        make = functools.partial(add_delta, model.params, delta)
        groups.append(Group(make, None, [name], [what], kept(name, delta)))

    def official(group: Group) -> list[dict[str, Any]]:
        folders = [out / "generations" / name for name in group.names]
        measured: list[MmluScores] = []
        params, label = group.params(), f"evaluating {group.names[0]}" if len(group.names) == 1 else "evaluating"
        with bars(progress, label, stop) as bar:
            if mmlu is not None:
                measured = measure_mmlu(model, params, group.stack, mmlu, settings.batch_size, bar, group.journal)
            scores = evaluate_candidates(
                model.model, params, group.stack, model.require_tokenizer(), *data,
                mmlu=[m.average.accuracy for m in measured] or None,
                max_new_tokens=settings.max_new_tokens, batch_size=settings.batch_size, out_folders=folders,
                progress=bar, warn=lambda n, message: warnings.append((group.names[n], message)),
                journal=group.journal,
            )  # fmt: skip
            for folder, one in zip(folders, measured):
                write_mmlu(folder, one)
        each = zip(group.names, group.kinds, scores, strict=True)
        return [{"name": name, "kind": kind, "scores": own} for name, kind, own in each]

    models = [entry for group in groups for entry in official(group)]
    if settings.suite == "full":
        folders = {entry["name"]: out / "generations" / entry["name"] for entry in models}
        found = evaluate_full(model, groups, models, settings, data, folders, progress=progress, stop=stop)
        models = [{**entry, "full": found[entry["name"]]} for entry in models]
    order = ("base", "gold", "candidate", "merge")
    return sorted(models, key=lambda entry: order.index(entry["kind"])), _summary(warnings, len(models))


def evaluate_full(
    model: LanguageModel,
    groups: Sequence[Group],
    models: Sequence[Mapping[str, Any]],
    settings: Evaluation,
    data: Data,
    folders: Mapping[str, Path],
    *,
    progress: bool,
    stop: Stop | None,
) -> dict[str, dict[str, Any]]:
    """What the score hides, by model.

    Args:
      model: the one before unlearning, which the others are measured against.
      groups: what to measure. The gold model, if there is one, comes first, alone and by that name.
      models: name and scores of each of them. folders: by name, where their generations are.
    """
    texts = Texts(data.forget, data.retain, data.members or (), data.nonmembers or ())
    effort = Effort(settings.full_rows, settings.full_draws)
    tokenizer, eos = model.require_tokenizer(), model.config.eos_token_ids
    eos = eos or ((tokenizer.eos_token_id,) if tokenizer.eos_token_id is not None else ())
    asking = Asking(tokenizer, decode, eos, settings.max_new_tokens, settings.batch_size)
    scores = {entry["name"]: entry["scores"] for entry in models}

    def outputs(name: str) -> dict[str, list[Scored]]:
        return {split: read_generations(folders[name] / f"{split}_0.csv") for split in SPLITS}

    against = yardsticks(model.model, model.params, texts, outputs(groups[0].names[0]), asking, effort)
    found: dict[str, dict[str, Any]] = {}
    for group in groups:
        subjects = Subjects(
            group.params(), group.stack, group.names, [outputs(name) for name in group.names],
            [scores[name] for name in group.names],
        )  # fmt: skip
        gold = None if group.names == ["gold"] else found.get("gold")
        journal = group.journal
        if journal is not None:
            journal = journal.within("full", effort=effort, gold=digest({"gold": gold, "asking": asking[2:]}))
        with bars(progress, group.names[0] if len(group.names) == 1 else f"{len(group.names)} models", stop) as bar:
            parts = measure(
                model.model, subjects, texts, asking, effort, against, gold=gold,
                gold_scores=None if gold is None else scores["gold"], journal=journal, progress=bar,
            )  # fmt: skip
        found |= dict(zip(group.names, parts, strict=True))
    return found
