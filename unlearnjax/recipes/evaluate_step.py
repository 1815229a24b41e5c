"""The evaluation of a run: the base, every finished candidate and every merge, by the same protocol."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from unlearnjax.adapters.apply import add_delta
from unlearnjax.evaluation.journal import Journal
from unlearnjax.evaluation.mmlu import MmluScores, Prompts, mmlu_candidates
from unlearnjax.evaluation.protocol import Progress, evaluate_candidates
from unlearnjax.io.atomic import staged_file
from unlearnjax.models.language_model import LanguageModel
from unlearnjax.recipes.merge_step import Merged
from unlearnjax.recipes.prepare import Data
from unlearnjax.recipes.progress import bars, stage
from unlearnjax.recipes.resume import weights_sha256
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
    mmlu: Prompts | None = None,
    journal: Journal | None = None,
    progress: bool = False,
    stop: Stop | None = None,
) -> tuple[list[dict[str, Any]], list[str]]:
    """Score the base, the candidates and the merges. Whatever is an adapter is scored in one program, side by side.

    Args:
      candidates: adapters by name, with the scale folded in.
      out: gets a folder of CSV files per model under generations/.
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

    def evaluate(
        params: PyTree[Array], stack: PyTree[Array] | None, named: list[tuple[str, str]], kept: Journal | None
    ) -> list[dict]:
        names = [name for name, _ in named]
        folders = [out / "generations" / name for name in names]
        measured: list[MmluScores] = []
        with bars(progress, f"evaluating {names[0]}" if len(names) == 1 else "evaluating", stop) as bar:
            if mmlu is not None:
                measured = measure_mmlu(model, params, stack, mmlu, settings.batch_size, bar, kept)
            scores = evaluate_candidates(
                model.model, params, stack, model.require_tokenizer(), *data,
                mmlu=[m.average.accuracy for m in measured] or None,
                max_new_tokens=settings.max_new_tokens, batch_size=settings.batch_size, out_folders=folders,
                progress=bar, warn=lambda n, message: warnings.append((names[n], message)), journal=kept,
            )  # fmt: skip
            for folder, one in zip(folders, measured):
                write_mmlu(folder, one)
        return [{"name": n, "kind": k, "scores": s} for (n, k), s in zip(named, scores, strict=True)]

    def kept(name: str, changes: PyTree[Array] | None) -> Journal | None:
        return None if journal is None else journal.within(name, adapters=weights_sha256(changes))

    together = [("base", "base"), *((name, kind) for name, kind, _ in adapters)]
    models = evaluate(model.params, stack, together, kept("base", stack))
    for merged in merges:
        if merged.delta is not None:
            changed, of = add_delta(model.params, merged.delta), kept(merged.merge.name, merged.delta)
            models += evaluate(changed, None, [(merged.merge.name, "merge")], of)
    return models, _summary(warnings, len(models))
