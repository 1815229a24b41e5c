"""Everything a run checks and reads before it computes anything: so that bad input costs nothing and leaves nothing."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from jax.sharding import Mesh

from unlearnjax.adapters.lora import resolve_targets
from unlearnjax.data.idk import ANSWERS, idk_rows, load_answers
from unlearnjax.data.mmlu import load_mmlu
from unlearnjax.data.rows import Document, Row, load_documents, load_rows
from unlearnjax.data.schedule import Pace, Schedule, plan
from unlearnjax.data.sequences import lockstep
from unlearnjax.data.tokens import Tokens, pooled, tokenize
from unlearnjax.errors import UserError
from unlearnjax.evaluation.batches import check_rows
from unlearnjax.evaluation.mmlu import Prompts, mmlu_prompts
from unlearnjax.evaluation.protocol import PROBE_ROOM
from unlearnjax.evaluation.semeval import kind_of
from unlearnjax.io.huggingface import load_config, load_tokenizer
from unlearnjax.models.decoder import build
from unlearnjax.models.language_model import LanguageModel, load_model
from unlearnjax.objectives.objective import TERMS, Objective, objective
from unlearnjax.recipes.groups import Group, groups_of, sequence_of, targets_of
from unlearnjax.recipes.schema import SEARCH, Candidate, Recipe
from unlearnjax.training.hyperparameters import SCHEDULES, Hyperparameters, stack


class Sources(NamedTuple):
    """Where the data comes from: paths or hub ids; members and non-members are optional, and so is the probe."""

    forget: str
    retain: str
    members: str | None = None
    nonmembers: str | None = None
    probe: str | None = None


class Data(NamedTuple):
    """The texts of a run."""

    forget: list[Row]
    retain: list[Row]
    members: list[Document] | None
    nonmembers: list[Document] | None
    probe: list[Row] | None


class Prepared(NamedTuple):
    """What training a group of candidates needs: tokens by side, the plan, and the candidates as arrays."""

    group: Group
    objective: Objective
    sides: dict[str, Tokens]
    schedule: Schedule
    hyperparameters: Hyperparameters


def load_data(sources: Sources) -> Data:
    """Read every set.

    Raises:
      UserError: see `unlearnjax.data.rows`; or members without non-members.
    """
    if (sources.members is None) != (sources.nonmembers is None):
        raise UserError("membership needs both --members and --nonmembers; one of them is missing")
    return Data(
        load_rows(sources.forget),
        load_rows(sources.retain),
        None if sources.members is None else load_documents(sources.members),
        None if sources.nonmembers is None else load_documents(sources.nonmembers),
        None if sources.probe is None else load_rows(sources.probe),
    )


def without_weights(folder: Path, source: str) -> LanguageModel:
    """A model folder's configuration and tokenizer: what the data is checked against before the weights are read.

    Raises:
      UserError: no or broken config.json, an unsupported architecture, a broken tokenizer.
    """
    config = load_config(folder)
    return LanguageModel(None, config, load_tokenizer(folder), build(config), source)


def load_reference(
    other: str | LanguageModel, model: LanguageModel, dtype: str, role: str, mesh: Mesh | None = None
) -> LanguageModel:
    """Another model to compare with.

    Args:
      role: what it is to be, such as `gold model`. mesh: see `load_model`.

    Raises:
      UserError: it cannot be loaded, or is not of the model's sizes, or has another vocabulary.
    """
    found = load_model(other, dtype, mesh=mesh) if isinstance(other, str) else other
    for field in dataclasses.fields(model.config):
        ours, its = getattr(model.config, field.name), getattr(found.config, field.name)
        if ours != its:
            raise UserError(
                f"{found.source}: cannot be the {role} of {model.source}: its {field.name} is {its}, not {ours}; give "
                "one of the same architecture"
            )
    if found.require_tokenizer().get_vocab() != model.require_tokenizer().get_vocab():
        raise UserError(f"{found.source}: cannot be the {role} of {model.source}: its tokenizer is another one")
    return found


def load_prompts(model: LanguageModel, mmlu_data: str, shots: int) -> Prompts:
    """MMLU's questions in the model's tokens; its weights are not needed.

    Raises:
      UserError: see `load_mmlu` and `mmlu_prompts`.
    """
    return mmlu_prompts(
        load_mmlu(mmlu_data, shots), model.require_tokenizer(), vocab_size=model.config.vocab_size,
        max_positions=model.config.max_positions, shots=shots,
    )  # fmt: skip


def check_evaluation(model: LanguageModel, data: Data, sources: Sources, max_new_tokens: int) -> None:
    """Check that all that the evaluation will read fits the model's context, before anything is computed.

    Raises:
      UserError: a prompt that is empty or leaves no room for `max_new_tokens`, a row (prompt and answer) or document
        longer than the context, or a document of a single token. The message names file and row.
    """
    tokenizer, limit, size = model.require_tokenizer(), model.config.max_positions, model.config.vocab_size

    def check(side: str, kind: str, texts: Sequence[str], room: int, least: int = 1) -> None:
        items = getattr(data, side)
        names = [f"{getattr(sources, side)}: {kind} {i} (id {x.id!r})" for i, x in enumerate(items, start=1)]
        ids = tokenizer(list(texts))["input_ids"]
        check_rows(ids, size, limit, room, names)
        for name, row in zip(names, ids, strict=True):
            if len(row) < least:
                raise UserError(f"{name}: is a single token, which nothing predicts; leave it out")

    for side in ("forget", "retain"):
        rows = getattr(data, side)
        check(side, "row", [r.input for r in rows], max_new_tokens)
        check(side, "row", [r.input + r.output for r in rows], 0)
    if data.probe:
        longest = max(len(ids) for ids in tokenizer([r.output for r in data.probe])["input_ids"])
        check("probe", "row", [r.input for r in data.probe], min(max_new_tokens, longest + PROBE_ROOM))
    for side in ("members", "nonmembers"):
        documents = getattr(data, side)
        if documents:
            check(side, "document", [d.document for d in documents], 0, least=2)


def check_searched(data: Data, sources: Sources) -> None:
    """Check that each split has a row that is scored, which a search of scales needs.

    Raises:
      UserError: a split without one.
    """
    for side in ("forget", "retain"):
        if all(kind_of(row.id) is None for row in getattr(data, side)):
            raise UserError(
                f"{getattr(sources, side)}: no row is scored, because no id ends in sc<digit> or qa<digit>; a merge "
                "with scale: search needs some"
            )


def _warmup(c: Candidate, rows: int, total: int) -> int:
    if c.warmup_epochs is None:
        return round(c.warmup_ratio * total)
    return int(c.warmup_epochs * rows) // (c.micro_batch * c.accumulation)


def hyperparameters(candidates: Sequence[Candidate], updates: Sequence[int], forget_rows: int) -> Hyperparameters:
    """The candidates' settings as arrays; lengths in updates come from the plan."""
    rows = []
    # A candidate without a term has its defaults: the arrays are one per parameter for all candidates.
    terms = {name for c in candidates for name in c.objective if TERMS[name].parameters}
    for c, total in zip(candidates, updates, strict=True):
        own = {term: {**TERMS[term].parameters, **c.parameters.get(term, {})} for term in sorted(terms)}
        rows.append(
            {
                "learning_rate": c.learning_rate,
                "weight_decay": c.weight_decay,
                "warmup_updates": _warmup(c, forget_rows, int(total)),
                "total_updates": int(total),
                "schedule": SCHEDULES.index(c.schedule),
                "max_grad_norm": float("inf") if c.max_grad_norm is None else c.max_grad_norm,
                "term_weights": c.objective,
                "beta": c.beta,
                "term_parameters": own,
                "lora_alpha": c.alpha,
                "lora_rank": c.rank,
                "dropout": c.dropout,
                "init_seed": c.init_seed,
            }
        )
    return stack(rows)


def prepare(
    recipe: Recipe,
    model: LanguageModel,
    data: Data,
    sources: Sources,
    found: Mapping[str, Sequence[int]] | None = None,
) -> list[Prepared]:
    """Check everything against the model (its weights are not needed), tokenize and plan, for each group.

    Args:
      found: the layers that `layers: auto` stands for, by `modules` (see `layers_of`).

    Raises:
      UserError: a row or document that does not fit the model's context (file and row), an empty prompt or answer, no
        row that is scored where a merge's scale is searched, no readable file of answers for IDK and DPO, layers that
        the model lacks, an adapter on linears that the model does not have, or a chat template that there is not.
    """
    resolve_targets(recipe.adapter.targets, model.config, "recipe: adapter")
    check_evaluation(model, data, sources, recipe.evaluation.max_new_tokens)
    if any(merge.scale == SEARCH for merge in recipe.merges):
        check_searched(data, sources)
    groups = groups_of(recipe.candidates, model.config.layers, found, recipe.training.candidates_at_once)
    return [_prepared(group, recipe, model, data, sources) for group in groups]


def padding_share(groups: Sequence[Prepared]) -> float:
    """Padding over all tokens that go through the model in training."""
    room = [sum(int((r >= 0).sum()) * s.width for s in g.schedule.steps for r in s.rows.values()) for g in groups]
    shares = [g.schedule.padding_share for g in groups]
    return sum(s * r for s, r in zip(shares, room, strict=True)) / max(sum(room), 1)


def _check_reached(candidates: Sequence[Candidate], group: Group, wanted: Objective) -> None:
    """Raise `UserError` where all that a candidate's objective reads lies below the layers that it trains."""
    for c, layers in zip(candidates, group.layers, strict=True):
        used = [TERMS[name] for name, weight in dict(c.objective).items() if weight != 0]  # type: ignore[arg-type]
        if wanted.layer is not None and all(t.reads == {"layer"} for t in used) and min(layers) >= wanted.layer:
            names = ", ".join(t.name for t in used)
            raise UserError(
                f"candidate {c.name!r}: {names} read the output of layer {wanted.layer} (counted from 1), and only "
                f"layers above it train; give layers below {wanted.layer}, or another training: layer"
            )


def _prepared(group: Group, recipe: Recipe, model: LanguageModel, data: Data, sources: Sources) -> Prepared:
    tokenizer, kind = model.require_tokenizer(), group.kind
    candidates = [recipe.candidates[i] for i in group.places]
    if kind.adapter == "lora":
        targets_of(recipe.adapter.targets, kind.modules, model.config)
    terms = {name for c in candidates for name, w in dict(c.objective).items() if w != 0}  # type: ignore[arg-type]
    wanted = objective(terms, model.config.layers, recipe.training.layer)
    _check_reached(candidates, group, wanted)
    texts = {"forget": (data.forget, sources.forget), "retain": (data.retain, sources.retain)}
    if "idk" in wanted.sides:
        file = recipe.training.idk
        answers = ANSWERS if file is None else load_answers(file)
        where = f"{sources.forget} with the answers of {file or 'side idk'}"
        texts["idk"] = (idk_rows(data.forget, answers), where)
    eos = model.config.eos_token_ids[0] if model.config.eos_token_ids else tokenizer.eos_token_id
    training = recipe.training
    sides = {
        side: tokenize(
            rows, tokenizer, model.config.max_positions, eos if kind.append_eos else None, source=source,
            prompt_tokens=training.prompt_tokens, row_tokens=training.row_tokens, separator=kind.separator,
            chat_template=kind.chat_template,
        )
        for side, (rows, source) in texts.items()
    }  # fmt: skip
    if kind.order is None:
        paces = [Pace(c.micro_batch, c.accumulation, c.epochs, c.order_seed) for c in candidates]
        read = {s: sides[s] for s in wanted.sides}
        schedule = plan(read, paces, buckets=training.buckets, order=training.order, seed=training.seed)
    else:
        pool = pooled(sides["forget"], sides["retain"])
        sides = {"pool": pool}
        schedule = lockstep(pool, [sequence_of(c, pool) for c in candidates], training.buckets)
    count = len(sides[wanted.sides[0]].length)
    h = hyperparameters(candidates, schedule.updates.tolist(), count)
    return Prepared(group, wanted, sides, schedule, h)
