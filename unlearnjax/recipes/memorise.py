"""Making a model that knows a corpus: full training on whole rows. The demo and the experiments start from one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxtyping import PyTree

from unlearnjax.adapters.full import full
from unlearnjax.data.rows import Row, fingerprint
from unlearnjax.data.schedule import Pace, plan
from unlearnjax.data.tokens import to_device, tokenize
from unlearnjax.models.protocol import Model
from unlearnjax.objectives.objective import objective
from unlearnjax.recipes.progress import say_by_warning
from unlearnjax.recipes.resume import model_fingerprint
from unlearnjax.training.hyperparameters import index, stack
from unlearnjax.training.keeper import open_keeper
from unlearnjax.training.loop import abstract_states, train
from unlearnjax.training.step import Task

EVERY = 120.0  # seconds between checkpoints


def memorise(
    model: Model,
    params: PyTree,
    tokenizer: Any,
    rows: Sequence[Row],
    *,
    epochs: int,
    learning_rate: float = 2e-3,
    batch_size: int = 16,
    buckets: int = 4,
    seed: int = 0,
    progress: bool = False,
    label: str = "memorising",
    checkpoints: Path | None = None,
) -> tuple[PyTree, list[float]]:
    """Train every weight on every token of `rows` (prompt, answer and end of text).

    AdamW, cosine schedule, a tenth of the updates as warmup, gradient norm clipped at 1.

    Args:
      checkpoints: a folder that gets a checkpoint every two minutes; training goes on from the newest one there, if it
        is of the same training. The folder is removed at the end.

    Returns:
      The trained parameters, in the dtype of `params`, and the loss of each update.

    Raises:
      RuntimeError: the training diverged.
    """
    tokens = tokenize(
        rows, tokenizer, max_length=model.config.max_positions, eos_token_id=tokenizer.eos_token_id,
        source="corpus to memorise", whole=True,
    )  # fmt: skip
    sides = {"retain": tokens}
    schedule = plan(sides, [Pace(batch_size, 1, epochs, seed)], buckets=buckets, seed=seed)
    updates = int(schedule.updates[0])
    h = stack(
        [
            {
                "learning_rate": learning_rate, "weight_decay": 0.0, "warmup_updates": updates // 10,
                "total_updates": updates, "schedule": 2, "max_grad_norm": 1.0, "term_weights": {"gdr": 1.0},
                "beta": 0.1, "lora_alpha": 1.0, "lora_rank": 1, "dropout": 0.0, "init_seed": seed,
            }
        ]
    )  # fmt: skip
    adapter = full()
    task = Task(model, adapter, objective(["gdr"]), use_dropout=False)
    keeper, start = None, None
    if checkpoints is not None:
        known = {"rows": fingerprint(rows), "settings": [epochs, learning_rate, batch_size, buckets, seed]}
        known |= model_fingerprint(params)
        keeper = open_keeper(checkpoints, known, every=EVERY, say=say_by_warning, resume=True)
        start = keeper.restore(abstract_states(task, params, h))
    stores = {"retain": to_device(tokens)}
    try:
        result = train(task, params, stores, schedule, h, progress=progress, label=label, start=start, keeper=keeper)
        if keeper is not None:
            keeper.remove()
    finally:
        if keeper is not None:
            keeper.close()
    if result.diverged_at[0] is not None:
        raise RuntimeError(f"memorising diverged after {result.diverged_at[0]} updates; lower the learning rate")
    return adapter.apply(params, index(result.states.trainable, 0), index(h, 0)).params, result.curves[0].loss
