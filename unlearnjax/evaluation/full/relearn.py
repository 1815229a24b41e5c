"""Relearning: how few steps on a handful of forget rows bring the others back?

Forgetting that a few steps undo was hiding (2406.13356, 2505.16831). A fresh LoRA is trained on top of each candidate,
whose own adapter is frozen, on the answers of a few forget rows (plain likelihood, AdamW at a constant rate): the same
initialisation, rows and order for all, in one program. At some steps the rows of other documents are asked:

    R(s) = [S(s) - S(0)] / [S_0 - S(0)]        S: the score, S_0: the original model's before unlearning

1 is all that had been forgotten, back after s steps. `area` is the mean of R over the steps (trapezoids), `half` the
first step measured with R >= 1/2. A model that never saw the rows (gold) learns them too: compare with its curve.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from unlearnjax.adapters.lora import lora as low_rank
from unlearnjax.adapters.lora import scaled
from unlearnjax.adapters.protocol import Adapter
from unlearnjax.data.rows import Row
from unlearnjax.data.schedule import Pace, plan
from unlearnjax.data.tokens import to_device, tokenize
from unlearnjax.errors import UserError
from unlearnjax.evaluation.full.asked import Asking, knowledge
from unlearnjax.evaluation.full.leak import document_of
from unlearnjax.evaluation.full.sampled import spread
from unlearnjax.models.config import ModelConfig
from unlearnjax.models.protocol import Model, Variables
from unlearnjax.objectives.objective import objective
from unlearnjax.training.hyperparameters import Hyperparameters, stack
from unlearnjax.training.loop import Clock, Curve, Snapshot, fresh_states, train
from unlearnjax.training.state import State
from unlearnjax.training.step import Task

STEPS = (0, 1, 2, 4, 8, 16, 32)
# A smaller loss of knowledge is none: of the NLL, other programs' rounding alone makes a part of it (bfloat16).
LEAST = {"leak": 1e-6, "nll": 0.01}


class Attack(NamedTuple):
    """Steps of `batch` rows of `rows` attacked ones, with a LoRA of rank `rank` (alpha = rank)."""

    rows: int = 16
    batch: int = 4
    steps: Sequence[int] = STEPS
    learning_rate: float = 1e-3
    rank: int = 16
    seed: int = 0


def split_rows(rows: Sequence[Row], attacked: int, most: int) -> tuple[list[Row], list[Row]]:
    """At most `attacked` rows of at most half of the documents, and at most `most` rows of the others.

    Documents are taken evenly in the order of their tasks, rows evenly of every task and kind.

    Raises:
      UserError: there are not two documents.
    """
    known = spread(rows, len(rows))
    documents = list(dict.fromkeys(document_of(row.id) for row in sorted(known, key=lambda row: row.task)))
    if len(documents) < 2:
        raise UserError(
            "relearning needs forget rows of several documents, with ids that end in sc<digit> or qa<digit>; "
            f"there are {len(documents)}"
        )
    count = min(len(documents) // 2, -(-attacked * len(documents) // len(known)))
    chosen = {documents[int((i + 0.5) * len(documents) / count)] for i in range(count)}
    own, others = ([row for row in known if (document_of(row.id) in chosen) == inside] for inside in (True, False))
    return spread(own, attacked), spread(others, most)


def _below(lora: PyTree[Array] | None) -> PyTree[Array]:
    return {"layers": {}} if lora is None else lora


def join(below: PyTree[Array], fresh: PyTree[Array]) -> PyTree[Array]:
    """One adapter that adds what both add: their factors side by side."""
    layers: dict[str, dict[str, Any]] = {}
    for block in {**below["layers"], **fresh["layers"]}:
        one, two = below["layers"].get(block, {}), fresh["layers"].get(block, {})
        for name in {**one, **two}:
            pairs = [tree[name] for tree in (one, two) if name in tree]
            a = jnp.concatenate([pair["a"] for pair in pairs], axis=-2)
            b = jnp.concatenate([pair["b"] for pair in pairs], axis=-1)
            layers.setdefault(block, {})[name] = {"a": a, "b": b}
    return {"layers": layers}


def on_top(config: ModelConfig, below: PyTree[Array], rank: int) -> Adapter:
    """A LoRA on all linears that is trained on top of a frozen adapter.

    The frozen one is part of the trainable tree, so that it can differ between candidates, but gets no gradient.

    Args:
      below: gives its structure and shapes; it starts as zeros.
    """
    inner = low_rank(config, tuple(config.linears), rank)

    def init(key: Array, params: PyTree[Array], h: Hyperparameters) -> PyTree[Array]:
        return {"fresh": inner.init(key, params, h), "below": jax.tree.map(jnp.zeros_like, below)}

    def apply(params: PyTree[Array], trainable: PyTree[Array], h: Hyperparameters) -> Variables:
        frozen = jax.lax.stop_gradient(trainable["below"])
        return Variables(
            params, join(frozen, scaled(trainable["fresh"], h.lora_alpha / h.lora_rank.astype(jnp.float32)))
        )

    return Adapter("relearning", init, apply, inner.delta, trains_head=False)


def relearn(
    model: Model,
    params: PyTree[Array],
    lora: PyTree[Array] | None,
    rows: Sequence[Row],
    asking: Asking,
    attack: Attack,
    *,
    most: int = 32,
    before: Sequence[dict[str, float | None]] | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[dict[str, Any]]:
    """Attack N candidates.

    Args:
      model, params: the decoder and its base weights. lora: adapters [N, ...], the scale folded into `b`, or None.
      rows: forget rows. most: rows asked at each step, of those attacked and of the others.
      before: {leak, nll} of the original model for the attacked rows and for the others (what `original_knowledge`
        returns). None: the first candidate is the original model.
      progress: called with 1 for each step that is measured.

    Returns:
      Per candidate attacked_rows, other_rows, steps, learning_rate, rank, and `attacked` and `others`: each leak and
      nll (a value per step), recovery ({leak, nll}: a list of R, None where nothing had been forgotten), area and half
      (of the leak).

    Raises:
      UserError: see `split_rows`; a row longer than the context.
    """
    if list(attack.steps) != sorted(set(attack.steps)) or attack.steps[0] != 0:
        raise UserError(f"relearning: the steps must rise from 0, not {list(attack.steps)}")
    attacked, others = split_rows(rows, attack.rows, most)
    asked = spread(attacked, most)
    below = _below(lora)
    count = 1 if lora is None else jax.tree.leaves(lora)[0].shape[0]
    eos = asking.eos_token_ids[0] if asking.eos_token_ids else None
    sides = {"retain": tokenize(attacked, asking.tokenizer, model.config.max_positions, eos, source="forget rows")}
    epochs = -(-attack.steps[-1] * attack.batch // len(attacked))
    schedule = plan(sides, [Pace(attack.batch, 1, epochs, attack.seed)] * count, buckets=1, seed=attack.seed)
    schedule = schedule._replace(steps=schedule.steps[: attack.steps[-1]])
    own = {
        "learning_rate": attack.learning_rate, "weight_decay": 0.0, "warmup_updates": 0,
        "total_updates": len(schedule.steps), "schedule": 0, "max_grad_norm": 1.0, "term_weights": {"gdr": 1.0},
        "beta": 0.1, "lora_alpha": float(attack.rank), "lora_rank": attack.rank, "dropout": 0.0,
        "init_seed": attack.seed,
    }  # fmt: skip
    h = stack([own] * count)
    task = Task(
        model, on_top(model.config, jax.tree.map(lambda x: x[0], below), attack.rank), objective(["gdr"]), False
    )
    states = fresh_states(task, params, h)
    # A copy: on a mesh training takes over what it starts from.
    states = states._replace(trainable={**states.trainable, "below": jax.tree.map(jnp.copy, below)})
    curves = [Curve([], [], {"gdr": []}, []) for _ in range(count)]
    start = Snapshot(0, states, curves, [{} for _ in range(count)], [None] * count, Clock())
    measured: list[list[list[dict[str, float | None]]]] = []  # by step, (attacked, others), candidate

    def measure(stack: PyTree[Array] | None) -> None:
        measured.append([knowledge(model, params, stack, part, asking) for part in (asked, others)])
        if progress is not None:
            progress(1)

    def after_step(done: int, states: State) -> None:
        if done in attack.steps:
            # Copies: the next step takes over the states' buffers.
            now = jax.tree.map(lambda x: x + 0, states.trainable)
            measure(join(now["below"], now["fresh"]))

    measure(lora)
    train(task, params, {"retain": to_device(sides["retain"])}, schedule, h, start=start, after_step=after_step)
    goal = [part[0] for part in measured[0]] if before is None else list(before)
    return [
        {
            "attacked_rows": len(attacked),
            "other_rows": len(others),
            "steps": list(attack.steps),
            "learning_rate": attack.learning_rate,
            "rank": attack.rank,
            "attacked": recovery([at[0][n] for at in measured], goal[0], attack.steps),
            "others": recovery([at[1][n] for at in measured], goal[1], attack.steps),
        }
        for n in range(count)
    ]


def original_knowledge(
    model: Model, params: PyTree[Array], rows: Sequence[Row], asking: Asking, attack: Attack, *, most: int = 32
) -> list[dict[str, float | None]]:
    """What `relearn` takes as `before`: {leak, nll} of the model before unlearning, attacked rows first."""
    attacked, others = split_rows(rows, attack.rows, most)
    return [knowledge(model, params, None, part, asking)[0] for part in (spread(attacked, most), others)]


def recovery(
    curve: Sequence[dict[str, float | None]], goal: dict[str, float | None], steps: Sequence[int]
) -> dict[str, Any]:
    """Leak and NLL by step, the shares of what was forgotten that are back, and their area and half (of the leak).

    The shares are None where no more than `LEAST` had been forgotten: so too where more leaks than of the original.
    """
    back: dict[str, list[float | None] | None] = {}
    for name in ("leak", "nll"):
        values = [at[name] for at in curve]
        first, last = values[0], goal[name]
        forgotten = 0.0 if first is None or last is None else last - first if name == "leak" else first - last
        if first is None or last is None or forgotten < LEAST[name]:
            back[name] = None
        else:
            back[name] = [None if x is None else (x - first) / (last - first) for x in values]
    area = half = None
    shares = back["leak"]
    if shares is not None and len(steps) > 1:
        known = [0.0 if x is None else x for x in shares]
        area = float(np.trapezoid(known, steps) / (steps[-1] - steps[0]))
        half = next((step for step, share in zip(steps, known, strict=True) if share >= 0.5 - 1e-9), None)
    return {
        "leak": [at["leak"] for at in curve],
        "nll": [at["nll"] for at in curve],
        "recovery": back,
        "area": area,
        "half": half,
    }
