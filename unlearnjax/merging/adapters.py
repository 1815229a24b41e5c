"""Merging PEFT adapters into a PEFT adapter: LoRA in, LoRA out, never folded into a base."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from unlearnjax.errors import UserError
from unlearnjax.io.peft_raw import Module, RawAdapter
from unlearnjax.merging.api import check_count, check_each, check_hyperparameters, find_rule, merge
from unlearnjax.merging.core_space import truncate_lora
from unlearnjax.merging.job import Job, settings_at
from unlearnjax.merging.lora_space import SPACES, concatenate_lora, merge_lora, to_lora, truncation_error
from unlearnjax.merging.protocol import MergeMethod, Rule

SUMS = ("linear", "uniform", "task_arithmetic")  # their delta is a weighted sum, which an adapter can hold exactly


class MergedAdapter(NamedTuple):
    """The merge by module, and |delta - b a| / |delta| of what it loses (Frobenius, over all modules)."""

    modules: dict[str, Module]
    truncation_error: float


def merge_adapters(
    job: Job, adapters: Sequence[RawAdapter], space: str, *, rank: int | None = None, compress: int | None = None
) -> MergedAdapter:
    """Merge adapters of one model.

    Args:
      job: the method, weights and settings; `factor` multiplies the merged delta (negative: it is subtracted).
      space: see `merge_lora`; in "factors" the semantics is PEFT's unless another is named.
      rank: of the result. None: in space "delta" the largest of the adapters' (a weighted sum keeps all it needs), in
        "core" what it takes.
      compress: for space "core", see `core_space`.

    Raises:
      UserError: adapters that change different modules, or modules of different shapes, or in space "factors" have
        different ranks or scales; settings that differ by tensor; as `merge_lora`.
    """
    if space == "factors" and job.semantics is None and "peft" in find_rule(job.method, None)[0].semantics:
        job = _with_semantics(job, "peft")
    method, rule = find_rule(job.method, job.semantics)
    check_count(method, rule, len(adapters))
    check_adapters(adapters)
    settings, weights = _settings(job, method, rule)
    options: dict[str, Any] = {**settings, "semantics": rule.semantics, "key": None}
    if rule.needs_key:
        options["key"] = jax.random.key(job.seed)
    names = list(adapters[0].modules)
    factor = np.float32(job.factor)
    if space == "factors":
        found: dict[str, Module] = {}
        for name in names:
            _check_ranks(adapters, name)
            tree, scale = _stack(adapters, [name])
            merged = merge_lora(tree, scale[name], method, space, weights=weights, **options)[name]
            found[name] = _module(merged, factor)
        return MergedAdapter(found, 0.0)
    tree, scales = _stack(adapters, names)
    # Scales differ by module where there are alpha patterns: they go into b, and the product is the same.
    tree = {name: {"a": pair["a"], "b": pair["b"] * scales[name].reshape(-1, 1, 1, 1)} for name, pair in tree.items()}
    ones = jnp.ones(len(adapters), jnp.float32)
    if space == "core":
        ranks = [max(adapter.modules[name].a.shape[0] for name in names) for adapter in adapters]
        whole = merge_lora(
            tree, ones, method, space, weights=weights, ranks=ranks, compress=compress, **options
        )  # fmt: skip
        lora = whole if rank is None else truncate_lora(whole, rank)
        missed = 0.0 if rank is None else truncation_error(_delta(whole), lora)
        return MergedAdapter({name: _module(lora[name], factor) for name in names}, missed)
    if space not in SPACES or compress is not None:
        raise UserError(f"merge: compress is for space 'core', not {space!r}" if space in SPACES else
                        f"merge: unknown space {space!r}; valid: {', '.join(SPACES)}")  # fmt: skip
    if method.name in SUMS:
        lora = concatenate_lora(tree, ones, _coefficients(len(adapters), method, rule, weights, settings))
        exact = _delta(lora)
        if rank is not None:
            lora = truncate_lora(lora, rank)
        return MergedAdapter({n: _module(lora[n], factor) for n in names}, truncation_error(exact, lora))
    delta = merge_lora(tree, ones, method, space, weights=weights, **options)
    low = to_lora(delta, rank or max(m.a.shape[0] for adapter in adapters for m in adapter.modules.values()))
    return MergedAdapter({name: _module(low.lora[name], factor) for name in names}, low.truncation_error)


def check_adapters(adapters: Sequence[RawAdapter]) -> None:
    """Raises UserError where the adapters do not belong to one model, naming the module and both sides."""
    first = adapters[0]
    for other in adapters[1:]:
        for module in sorted(set(first.modules) ^ set(other.modules)):
            here, there = (first, other) if module in first.modules else (other, first)
            raise UserError(f"merge: module {module!r} is in {here.folder} and not in {there.folder}")
        for module, own in first.modules.items():
            shapes = [(m.b.shape[0], m.a.shape[1]) for m in (own, other.modules[module])]
            if shapes[0] != shapes[1]:
                raise UserError(f"merge: module {module!r} is {list(shapes[0])} in {first.folder} and "
                                f"{list(shapes[1])} in {other.folder}")  # fmt: skip


def _with_semantics(job: Job, semantics: str) -> Job:
    return dataclasses.replace(job, semantics=semantics)


def _settings(job: Job, method: MergeMethod, rule: Rule) -> tuple[dict[str, Any], Array | None]:
    """The hyperparameters and the weights, which are the same for all modules."""
    known = {p.name: p for p in rule.hyperparameters}
    if rule.needs_base is True:
        raise UserError(f"merge: {method.name} works on whole weights, and these are adapters")
    given = settings_at(job, [*known, "weight"], "", 0.0)
    listed = given.pop("weight", None)
    weights = None if listed is None else jnp.asarray(listed, jnp.float32)
    values = {}
    for name, each in given.items():
        if len(set(each)) > 1 and not known[name].per_candidate:
            raise UserError(f"merge: {name} of {method.name} must be the same for all adapters, not {each}")
        values[name] = each[0] if len(set(each)) == 1 else tuple(each)
    settings = check_hyperparameters(method, rule, values)
    if rule.wants_base(settings):
        raise UserError(f"merge: {method.name} works on whole weights, and these are adapters; pass origin base")
    check_each(method, rule, settings, len(job.inputs))
    return settings, weights


def _stack(adapters: Sequence[RawAdapter], names: Sequence[str]) -> tuple[dict[str, Any], dict[str, Array]]:
    """The adapters as a stacked LoRA tree of one layer per module, padded to the largest rank, and their scales."""
    rank = max(adapter.modules[name].a.shape[0] for adapter in adapters for name in names)
    tree, scales = {}, {}
    for name in names:
        own = [adapter.modules[name] for adapter in adapters]
        pads = [rank - module.a.shape[0] for module in own]
        tree[name] = {
            "a": jnp.stack([jnp.pad(m.a, ((0, pad), (0, 0)))[None] for m, pad in zip(own, pads, strict=True)]),
            "b": jnp.stack([jnp.pad(m.b, ((0, 0), (0, pad)))[None] for m, pad in zip(own, pads, strict=True)]),
        }
        scales[name] = jnp.asarray([module.scale for module in own], jnp.float32)
    return tree, scales


def _check_ranks(adapters: Sequence[RawAdapter], name: str) -> None:
    ranks = [adapter.modules[name].a.shape[0] for adapter in adapters]
    if len(set(ranks)) > 1:
        raise UserError(f"merge: {name!r} has ranks {ranks}; space 'factors' needs equal ones, use 'core' or 'delta'")


def _coefficients(
    count: int, method: MergeMethod, rule: Rule, weights: Array | None, settings: dict[str, Any]
) -> Array:
    """What a sum multiplies each adapter by: its action on the unit vectors."""
    units = jnp.eye(count, dtype=jnp.float32)
    return merge(units, method, weights=weights, semantics=rule.semantics, **settings)


def _delta(lora: dict[str, Any]) -> dict[str, Any]:
    return {
        name: {"weight": jnp.matmul(p["b"], p["a"], precision=jax.lax.Precision.HIGHEST)} for name, p in lora.items()
    }


def _module(pair: dict[str, Array], factor: np.float32) -> Module:
    """One layer's pair as a module of scale 1; a factor that is negative goes into b alone."""
    return Module(np.asarray(pair["a"][0]), np.asarray(pair["b"][0]) * factor, 1.0)


def describe_adapters(job: Job, space: str, found: MergedAdapter, folders: Sequence[Path]) -> str:
    """One paragraph for the card."""
    rule = find_rule(job.method, job.semantics)[1]
    lost = f"; the adapter misses {found.truncation_error:.3g} of the merged delta" if found.truncation_error else ""
    step = "" if job.factor == 1 else f" The merged delta is multiplied by {job.factor:g}."
    what = f"{job.method} ({rule.semantics} semantics: {rule.source}) in space {space}"
    return f"{what} of {len(folders)} adapters{lost}.{step}"
