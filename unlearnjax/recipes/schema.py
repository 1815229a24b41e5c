"""A recipe: candidates, objective, adapter, merges and evaluation, as frozen plain data."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from unlearnjax.models.config import Remat

if TYPE_CHECKING:
    from unlearnjax.merging.protocol import MergeMethod, Rule

SCHEDULES = ("constant", "linear", "cosine", "steps")
EACH, SEARCH = "each", "search"  # what a merge's `of` and `scale` may say in place of names and a number


@dataclass(frozen=True)
class Candidate:
    """One candidate's settings. Everything here may differ between the candidates of a run; those that are alike in
    what trains and in how rows come train in one program, others after them.

    Attributes:
      objective: a shorthand (`npo`, `graddiff`, ...) or {term: weight}.
      learning_rate, weight_decay, max_grad_norm (null: no clipping), schedule, warmup_ratio (share of the updates),
        warmup_epochs (in its place: rows / (micro_batch accumulation) updates for each, rounded down).
      epochs: passes over the forget set. micro_batch: rows per micro-batch. accumulation: micro-batches per update.
      beta: NPO's inverse temperature. parameters: of the other terms that have some, as {term: {name: value}}.
      rank, alpha, dropout: of the LoRA (scale alpha / rank).
      init_seed, order_seed: of the adapter (and its dropout), and of the order of rows.
      adapter: `lora`, or `full`: the weights themselves, of `modules` of `layers`; never embeddings, head, final norm.
      layers: `all`, a list (counted from 0), `last-K`, or `auto`: the range that tracing the forget set recommends.
      modules: `mlp`, `self_attn` or `all` of a layer; a LoRA has those of the run's targets that lie in them.
      order: of rows: null, as `Training.order` says, in micro-batches of forget and retain rows side by side; or, for
        objectives of micro-batches that mix them, `mixed`, `chunked` or `annealed` (see `unlearnjax.data.sequences`),
        with `order_parameters` {name: value}.
      separator: between prompt and answer. append_eos: the answer ends with the end of text.
      chat_template: the prompt goes into the tokenizer's chat template, as a user's turn.
    """

    name: str
    objective: str | Mapping[str, float] = "zjuklab"
    learning_rate: float = 1e-4
    weight_decay: float = 0.01
    max_grad_norm: float | None = None
    schedule: str = "linear"
    warmup_ratio: float = 0.1
    warmup_epochs: float | None = None
    epochs: int = 5
    micro_batch: int = 2
    accumulation: int = 4
    beta: float = 0.1
    parameters: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    rank: int = 32
    alpha: float = 32.0
    dropout: float = 0.05
    init_seed: int = 42
    order_seed: int = 42
    adapter: str = "lora"
    layers: str | Sequence[int] = "all"
    modules: str = "all"
    order: str | None = None
    order_parameters: Mapping[str, Any] = field(default_factory=dict)
    separator: str = ""
    append_eos: bool = True
    chat_template: bool = False


@dataclass(frozen=True)
class AdapterSpec:
    """What a LoRA adapts. `targets`: `all` linears of a layer, or a list of names."""

    type: str = "lora"
    targets: str | Sequence[str] = "all"


@dataclass(frozen=True)
class Training:
    """How the candidates run together. `order`: `bucketed` or `published`; `buckets`: compiled widths at most.

    `prompt_tokens`, `row_tokens`: of a longer prompt only its last tokens are kept, and of a longer row its first ones
    (null: rows are never cut, and one beyond the model's context is an error).
    `layer`: whose output RMU acts on, counted from 1 (null: a quarter of the way up).
    `idk`: a text file of answers, one per line, that IDK and DPO prefer on the forget prompts (null: a built-in list).
    `waypoints`: how often on the way the adapters are kept and scored (on `Evaluation.waypoint_rows`); 0: not at all.
    `keep_best`: every so many updates of a candidate its own loss is measured on `best_rows` rows of each set, and it
    is kept as it was when that was lowest (null: as it is at the end).
    `remat`: what the backward pass of a LoRA on all layers recomputes: `none`, `linears` (what lies between them) or
    `full` (whole layers). `tokens_at_once`: candidates go through the model in groups of at most so many tokens, so
    that less of their activations is kept. (null for either: the fastest that fits the devices' memory by a closed
    form; on a CPU `none` up to 8 layers and `full` beyond, and small groups.)
    `candidates_at_once`: so many candidates train together at most, and then the next ones (null: as many as a closed
    form says will fit the memory of the devices, or all where that is not known, as on a CPU).
    """

    order: str = "bucketed"
    buckets: int = 8
    seed: int = 0
    prompt_tokens: int | None = None
    row_tokens: int | None = None
    layer: int | None = None
    idk: str | None = None
    waypoints: int = 0
    keep_best: int | None = None
    best_rows: int = 500
    remat: Remat | None = None
    tokens_at_once: int | None = None
    candidates_at_once: int | None = None


@dataclass(frozen=True)
class Merge:
    """One merge to compare. `hyperparameters` are the method's own.

    `of`: the names of the candidates to merge (null: all). `weights`: one for each of them, in that order.

    `length`: rescale the merged delta to so many times the candidates' mean length (null: as the method makes it).
    Merges differ in length by factors, and a longer step forgets more: at one length their directions are compared.

    `negate`: subtract the merged delta from the base, for candidates that were trained to know the forget set better.
    `scale`: what multiplies the delta last (NegMerge's lambda; a method's own `lambda` multiplies before `length`), or
    `search`, which tries those of `Search` and chooses. With `search`, `of` may be `each`: every candidate is merged by
    itself, and the best pair of candidate and scale is kept.

    `compress`, in space core: keep so many directions of the shared bases, before the merge.
    """

    method: str
    space: str = "delta"
    semantics: str | None = None
    of: Sequence[str] | str | None = None
    weights: Sequence[float] | None = None
    name: str = ""
    rank: int | None = None  # of the exported adapter; default: the candidates' largest, in space core what it takes
    compress: int | None = None
    length: float | None = None
    negate: bool = False
    scale: float | str = 1.0
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)


def _lambdas() -> tuple[float, ...]:
    from unlearnjax.merging.search import LAMBDAS

    return LAMBDAS


@dataclass(frozen=True)
class Search:
    """How a merge's scale is chosen, by NegMerge's rule (2410.05583, section 4.1): the lowest forget score among the
    scales that keep the retain score; of equal ones the smaller scale.

    A score is the mean over tasks of the official regurgitation and knowledge, on a sample of the split's rows.

    `scales`: what is tried; default: NegMerge's 21 points from 0 to 1. `keep`: the share of the base's retain score, on
    the same rows, that must be left. `rows`: of each split that are asked each time, evenly of tasks and kinds.
    """

    scales: Sequence[float] = field(default_factory=_lambdas)
    keep: float = 0.95
    rows: int = 96


@dataclass(frozen=True)
class Evaluation:
    """The official protocol's settings. `export`: the merge to write as a model: `best`, or its name.

    `suite`: `official`, or `full`, which measures what the score hides, on `full_rows` forget rows where they are asked
    again and again, with `full_draws` draws of each.
    `batch_size`: rows of each model at once; on accelerators fewer where so many do not fit.
    `waypoint_rows`: rows of each split that are asked at each of training's waypoints, evenly of tasks and kinds.
    `candidates`: which of them are evaluated beside base, gold and merges: `all`, `none`, or their names. (Waypoints
    are of all.)
    """

    semantics: str = "official"
    max_new_tokens: int = 256
    batch_size: int = 32
    waypoint_rows: int = 96
    suite: str = "official"
    full_rows: int = 32
    full_draws: int = 64
    export: str = "best"
    candidates: str | tuple[str, ...] = "all"

    def evaluates(self, candidate: str) -> bool:
        """Whether a candidate of this name is scored."""
        return candidate in self.candidates if not isinstance(self.candidates, str) else self.candidates == "all"


@dataclass(frozen=True)
class Recipe:
    name: str
    candidates: tuple[Candidate, ...]
    merges: tuple[Merge, ...]
    adapter: AdapterSpec = AdapterSpec()
    training: Training = Training()
    evaluation: Evaluation = Evaluation()
    search: Search = field(default_factory=Search)


def rule_of(merge: Merge) -> tuple["MergeMethod", "Rule"]:
    """The method, and which definition of it a merge uses: in space factors it is PEFT's unless another is named.

    Raises:
      UserError: an unknown method or semantics (with the nearest name).
    """
    from unlearnjax.merging.api import find_rule

    semantics = merge.semantics
    if semantics is None and merge.space == "factors" and "peft" in find_rule(merge.method, None)[0].semantics:
        semantics = "peft"
    return find_rule(merge.method, semantics)


def to_plain(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain data with every default written out; `recipe_from` reads it back."""
    plain = dataclasses.asdict(recipe)
    plain["candidates"] = list(plain["candidates"])
    plain["search"]["scales"] = list(plain["search"]["scales"])
    plain["merges"] = [
        {**{k: v for k, v in m.items() if k != "hyperparameters"}, **m["hyperparameters"]} for m in plain["merges"]
    ]
    return plain
