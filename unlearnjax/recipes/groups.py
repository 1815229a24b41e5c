"""Which candidates train together: those whose trainable trees have the same shapes and whose rows come alike."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from unlearnjax.adapters.lora import check_layers, lora, resolve_targets
from unlearnjax.adapters.protocol import Adapter
from unlearnjax.adapters.restricted import MODULES, restricted
from unlearnjax.data.sequences import Micro, annealed, chunked, chunks_between, mixed
from unlearnjax.data.tokens import Tokens
from unlearnjax.errors import UserError, check_known
from unlearnjax.models.config import ModelConfig
from unlearnjax.objectives.objective import TERMS
from unlearnjax.recipes.schema import Candidate
from unlearnjax.tracing.effects import default_width

ADAPTERS = ("lora", "full")
AUTO, ALL = "auto", "all"
LAST = re.compile(r"last-([1-9]\d*)")
# The orders of a pool of forget and retain rows, and what each takes beside epochs, micro_batch and accumulation.
ORDERS: dict[str, dict[str, Any]] = {
    "mixed": {"bucketed": False},
    "chunked": {"chunk": 32, "ratio": 7},
    "annealed": {"chunk": 64, "anneal_epochs": 3, "interleaving": 1.0, "fraction": 0.25, "finally_all": False,
                 "anneal_rate": 1.0},
}  # fmt: skip
_SHARES = ("interleaving", "fraction")


class Kind(NamedTuple):
    """What the candidates of a group share. `layers`: how many of them train; None: a LoRA on all."""

    adapter: str
    modules: str
    layers: int | None
    order: str | None
    separator: str
    append_eos: bool
    chat_template: bool


class Group(NamedTuple):
    """Candidates of one kind, in the order of their layers: their places in the recipe, and the layers of each."""

    kind: Kind
    places: tuple[int, ...]
    layers: tuple[tuple[int, ...], ...]


def layers_of(candidate: Candidate, total: int, found: Sequence[int] | None = None) -> tuple[int, ...]:
    """The layers that a candidate trains in a model of `total`.

    Args:
      found: what `auto` stands for; None: not traced yet, and the lowest layers stand in for as many others.

    Raises:
      UserError: layers that the model does not have.
    """
    where = f"candidate {candidate.name!r}"
    wanted = candidate.layers
    if not isinstance(wanted, str):
        return tuple(check_layers(wanted, total, where))
    if wanted == ALL:
        return tuple(range(total))
    if wanted == AUTO:
        return tuple(range(default_width(total)) if found is None else check_layers(found, total, where))
    last = LAST.fullmatch(wanted)
    assert last is not None  # `check_training` saw to it
    count = int(last[1])
    if count > total:
        raise UserError(f"{where}: layers {wanted} of a model with {total}; give at most last-{total}")
    return tuple(range(total - count, total))


def groups_of(
    candidates: Sequence[Candidate],
    total: int,
    found: Mapping[str, Sequence[int]] | None = None,
    at_once: int | None = None,
) -> list[Group]:
    """The candidates by kind, in the order of each kind's first.

    Args:
      total: the model's layers. found: what layers `auto` stand for, by `modules` (see `layers_of`).
      at_once: candidates of a group at most; None: all of a kind.

    Raises:
      UserError: see `layers_of`.
    """
    by_kind: dict[Kind, list[tuple[int, tuple[int, ...]]]] = {}
    for place, c in enumerate(candidates):
        own = layers_of(c, total, None if found is None else found.get(c.modules))
        whole = c.adapter == "lora" and len(own) == total
        count = None if whole else len(own)
        kind = Kind(c.adapter, c.modules, count, c.order, c.separator, c.append_eos, c.chat_template)
        by_kind.setdefault(kind, []).append((place, own))
    # Those with the same layers side by side: a step slices them.
    ordered = {kind: sorted(own, key=lambda x: x[1]) for kind, own in by_kind.items()}
    parts = [(kind, part) for kind, own in ordered.items() for part in _parts(own, at_once)]
    return [Group(kind, *(tuple(x) for x in zip(*part, strict=True))) for kind, part in parts]


def _parts(own: list[Any], at_once: int | None) -> list[list[Any]]:
    """Full parts, and what is left: where all of them and `at_once` divide by a mesh's axis, so does every part."""
    size = len(own) if at_once is None else at_once
    return [own[i : i + size] for i in range(0, len(own), size)]


def targets_of(targets: str | Sequence[str], modules: str, config: ModelConfig) -> tuple[str, ...]:
    """A LoRA's linears: those of the run's targets that lie in `modules`.

    Raises:
      UserError: see `resolve_targets`; none of them does.
    """
    wanted, blocks = resolve_targets(targets, config, "recipe: adapter"), MODULES[modules]
    own = tuple(name for name in wanted if blocks is None or config.linears[name][0] in blocks)
    if not own:
        raise UserError(f"recipe: adapter: none of the targets {', '.join(wanted)} lies in {modules}")
    return own


def adapters_of(
    group: Group, config: ModelConfig, targets: str | Sequence[str], rank: int
) -> list[tuple[Adapter, tuple[int, ...]]]:
    """The group's adapters, one for each set of layers, with the places in the group of those that have it.

    Args:
      rank: the largest of the group's, for a LoRA.
    """
    by_layers: dict[tuple[int, ...], list[int]] = {}
    for place, layers in enumerate(group.layers):
        by_layers.setdefault(layers, []).append(place)
    kind = group.kind

    def adapter(layers: tuple[int, ...]) -> Adapter:
        if kind.adapter == "full":
            return restricted(config, layers, kind.modules)
        linears = targets_of(targets, kind.modules, config)
        return lora(config, linears, rank, None if kind.layers is None else layers)

    return [(adapter(layers), tuple(places)) for layers, places in by_layers.items()]


def sequence_of(candidate: Candidate, pool: Tokens) -> list[Micro]:
    """A candidate's micro-batches of a pool of forget and retain rows.

    Raises:
      UserError: an update would have a retain row twice.
    """
    c = candidate
    assert pool.border is not None
    forget, retain = pool.border, len(pool.length) - pool.border
    own = {**ORDERS[c.order or ""], **c.order_parameters}
    if own.get("ratio", 1) > retain:
        raise UserError(
            f"candidate {c.name!r}: order_parameters: an update of {own['ratio']} retain rows, and the retain set has "
            f"{retain}; lower ratio"
        )
    if c.order == "mixed":
        return mixed(
            forget, retain, batch=c.micro_batch, accumulation=c.accumulation, epochs=c.epochs, seed=c.order_seed,
            lengths=pool.length if own["bucketed"] else None,
        )  # fmt: skip
    if c.order == "chunked":
        return chunked(forget, retain, epochs=c.epochs, **own)
    chunks, every = -(-forget // own["chunk"]), chunks_between(own["interleaving"])
    if every > chunks and not own["finally_all"]:
        raise UserError(
            f"candidate {c.name!r}: order_parameters: with interleaving {own['interleaving']} the retain set's turn "
            f"comes after every {every} chunks, and the forget set has {chunks}; raise interleaving, lower chunk, or "
            "give finally_all: true"
        )
    return annealed(forget, retain, batch=c.micro_batch, ascent_epochs=c.epochs, seed=c.order_seed, **own)


def check_training(candidate: Candidate, where: str) -> None:
    """Check what trains, and how rows come, of a candidate whose objective is {term: weight}.

    Raises:
      UserError: an unknown adapter, modules, order or parameter of it; layers that are no layers; an objective that
        does not go with the order.
    """
    c = candidate
    check_known([c.adapter], ADAPTERS, "adapter", where)
    check_known([c.modules], MODULES, "modules", where)
    if isinstance(c.layers, str) and c.layers not in (ALL, AUTO) and not LAST.fullmatch(c.layers):
        raise UserError(f"{where}: layers must be all, auto, last-<count> or a list of numbers, not {c.layers!r}")
    used = [name for name, weight in dict(c.objective).items() if weight != 0]  # type: ignore[arg-type]
    pool = [name for name in used if TERMS[name].side == "pool"]
    if pool and len(pool) < len(used):
        apart = ", ".join(sorted(set(used) - set(pool)))
        raise UserError(f"{where}: objective: {apart} and {', '.join(pool)} read rows in different ways; use one kind")
    if pool and c.order is None:
        raise UserError(f"{where}: {', '.join(pool)} need an order that mixes rows; give one of {', '.join(ORDERS)}")
    if c.order is None:
        if c.order_parameters:
            raise UserError(f"{where}: order_parameters are of an order; give one of {', '.join(ORDERS)}")
        return
    check_known([c.order], ORDERS, "order", where)
    if not pool:
        raise UserError(f"{where}: order {c.order} is for objectives that mix rows, and {', '.join(used)} do not")
    if c.order != "mixed":
        if c.schedule != "constant":
            raise UserError(f"{where}: order {c.order} lowers the rate in each of its phases; give schedule: constant")
        if c.accumulation != 1:
            raise UserError(f"{where}: in order {c.order} each micro-batch is an update; give accumulation: 1")
    known = ORDERS[c.order]
    check_known(c.order_parameters, known, f"parameter of {c.order}", f"{where}: order_parameters")
    for name, value in c.order_parameters.items():
        _check_parameter(name, value, known[name], f"{where}: order_parameters")


def _check_parameter(name: str, value: Any, default: Any, where: str) -> None:
    if isinstance(default, bool):
        right, words = isinstance(value, bool), "true or false"
    elif isinstance(default, int):
        right = isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31
        words = "a whole number above 0"
    else:
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1e30
        share = name in _SHARES
        right, words = number and (value <= 1 or not share), f"a number above 0{', of at most 1' if share else ''}"
    if not right:
        raise UserError(f"{where}: {name} must be {words}, not {value!r}")
