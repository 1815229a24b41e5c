"""The evaluation of a run: the base, every finished candidate and every merge, by the same protocol."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from unlearnjax.adapters.apply import add_delta
from unlearnjax.evaluation.protocol import evaluate_candidates
from unlearnjax.models.language_model import LanguageModel
from unlearnjax.recipes.merge_step import Merged
from unlearnjax.recipes.prepare import Data
from unlearnjax.recipes.progress import bars
from unlearnjax.recipes.schema import Evaluation


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


def _named(warnings: Sequence[str], names: Sequence[str]) -> list[tuple[str, str]]:
    """(model, warning) pairs: the evaluation numbers the models of a stack from 1, a reader knows them by name."""
    if len(names) == 1:
        return [(names[0], warning) for warning in warnings]
    pairs = []
    for warning in warnings:
        for number, name in enumerate(names, start=1):
            prefix = f"candidate {number}: "
            if warning.startswith(prefix):
                pairs.append((name, warning.removeprefix(prefix)))
    return pairs


def _summary(pairs: Sequence[tuple[str, str]], count: int) -> list[str]:
    """One line per warning; without names where all `count` models have it, because then it is about the data."""
    found: dict[str, list[str]] = {}
    for name, warning in pairs:
        if name not in found.setdefault(warning, []):
            found[warning].append(name)
    return [w if len(names) == count else f"{', '.join(names)}: {w}" for w, names in found.items()]


def evaluate_all(
    model: LanguageModel,
    candidates: Mapping[str, PyTree[Array]],
    merges: Sequence[Merged],
    settings: Evaluation,
    data: Data,
    out: Path,
    *,
    progress: bool = False,
) -> tuple[list[dict[str, Any]], list[str]]:
    """Score the base, the candidates and the merges. Whatever is an adapter is scored in one program, side by side.

    Args:
      candidates: adapters by name, with the scale folded in.
      out: gets a folder of CSV files per model under generations/.

    Returns:
      The report's `models`, and the warnings.
    """
    adapters = [(name, "candidate", lora) for name, lora in candidates.items()]
    adapters += [(m.merge.name, "merge", m.lora) for m in merges if m.lora is not None]
    stack = None
    if adapters:
        # An adapter of zeros is the base.
        stack = _stack_adapters([jax.tree.map(jnp.zeros_like, adapters[0][2]), *(lora for _, _, lora in adapters)])
    warnings: list[tuple[str, str]] = []

    def evaluate(params: PyTree[Array], stack: PyTree[Array] | None, named: list[tuple[str, str]]) -> list[dict]:
        raised: list[str] = []
        names = [name for name, _ in named]
        with bars(progress, f"evaluating {names[0]}" if len(names) == 1 else "evaluating") as bar:
            scores = evaluate_candidates(
                model.model, params, stack, model.require_tokenizer(), *data,
                max_new_tokens=settings.max_new_tokens, batch_size=settings.batch_size,
                out_folders=[out / "generations" / name for name in names], progress=bar, warn=raised.append,
            )  # fmt: skip
        warnings.extend(_named(raised, names))
        return [{"name": n, "kind": k, "scores": s} for (n, k), s in zip(named, scores, strict=True)]

    models = evaluate(model.params, stack, [("base", "base"), *((name, kind) for name, kind, _ in adapters)])
    for merged in merges:
        if merged.delta is not None:
            models += evaluate(add_delta(model.params, merged.delta), None, [(merged.merge.name, "merge")])
    return models, _summary(warnings, len(models))
