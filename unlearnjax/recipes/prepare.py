"""Everything a run checks and reads before it computes anything: so that bad input costs nothing and leaves nothing."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from unlearnjax.data.rows import Document, Row, fingerprint, load_documents, load_rows
from unlearnjax.data.schedule import Pace, Schedule, plan
from unlearnjax.data.tokens import Tokens, tokenize
from unlearnjax.errors import UserError
from unlearnjax.evaluation.batches import check_rows
from unlearnjax.models.language_model import LanguageModel
from unlearnjax.objectives.objective import Objective, objective
from unlearnjax.recipes.schema import SCHEDULES, Candidate, Recipe
from unlearnjax.training.hyperparameters import Hyperparameters, stack


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
    """What training needs: tokens by side, the plan, and the candidates as arrays."""

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


def check_evaluation(model: LanguageModel, data: Data, sources: Sources, max_new_tokens: int) -> None:
    """Check that what the evaluation will read fits the model's context, before anything is trained.

    Raises:
      UserError: a prompt that leaves no room for `max_new_tokens`, or a document longer than the context.
    """
    tokenizer, limit, size = model.require_tokenizer(), model.config.max_positions, model.config.vocab_size
    for name in ("forget", "retain", "probe"):
        rows = getattr(data, name) or []
        names = [f"{getattr(sources, name)}: row {i + 1} (id {r.id!r})" for i, r in enumerate(rows)]
        # The probe's answers are short; the evaluation gives it less room than the official rows.
        room = 0 if name == "probe" else max_new_tokens
        if rows:
            check_rows(tokenizer([r.input for r in rows])["input_ids"], size, limit, room, names)
    for name in ("members", "nonmembers"):
        documents = getattr(data, name) or []
        names = [f"{getattr(sources, name)}: document {i + 1} (id {d.id!r})" for i, d in enumerate(documents)]
        if documents:
            check_rows(tokenizer([d.document for d in documents])["input_ids"], size, limit, 0, names)


def describe_data(sources: Sources, data: Data) -> dict[str, Any]:
    """Source, number of rows and fingerprint of each set, for the report."""
    out = {}
    for name in ("forget", "retain", "members", "nonmembers", "probe"):
        items = getattr(data, name)
        if items is not None:
            source = getattr(sources, name)
            # A path tells a reader of the report nothing beyond the file's name, and may be private.
            label = Path(source).name if Path(source).exists() else source
            out[name] = {"source": label, "rows": len(items), "sha256": fingerprint(items)}
    return out


def hyperparameters(candidates: Sequence[Candidate], updates: Sequence[int]) -> Hyperparameters:
    """The candidates' settings as arrays; lengths in updates come from the plan."""
    rows = []
    for c, total in zip(candidates, updates, strict=True):
        rows.append(
            {
                "learning_rate": c.learning_rate,
                "weight_decay": c.weight_decay,
                "warmup_updates": round(c.warmup_ratio * int(total)),
                "total_updates": int(total),
                "schedule": SCHEDULES.index(c.schedule),
                "max_grad_norm": float("inf") if c.max_grad_norm is None else c.max_grad_norm,
                "term_weights": c.objective,
                "beta": c.beta,
                "lora_alpha": c.alpha,
                "lora_rank": c.rank,
                "dropout": c.dropout,
                "init_seed": c.init_seed,
            }
        )
    return stack(rows)


def prepare(recipe: Recipe, model: LanguageModel, data: Data, sources: Sources) -> Prepared:
    """Tokenize and plan.

    Raises:
      UserError: a row longer than the model's context (file and row), or an empty answer.
    """
    tokenizer = model.require_tokenizer()
    terms = {name for c in recipe.candidates for name, w in dict(c.objective).items() if w != 0}  # type: ignore[arg-type]
    wanted = objective(terms)
    texts = {"forget": (data.forget, sources.forget), "retain": (data.retain, sources.retain)}
    eos = model.config.eos_token_ids[0] if model.config.eos_token_ids else tokenizer.eos_token_id
    sides = {
        side: tokenize(rows, tokenizer, max_length=model.config.max_positions, eos_token_id=eos, source=source)
        for side, (rows, source) in texts.items()
    }
    paces = [Pace(c.micro_batch, c.accumulation, c.epochs, c.order_seed) for c in recipe.candidates]
    training = recipe.training
    schedule = plan(
        {s: sides[s] for s in wanted.sides}, paces, buckets=training.buckets, order=training.order, seed=training.seed
    )
    return Prepared(wanted, sides, schedule, hyperparameters(recipe.candidates, schedule.updates.tolist()))
