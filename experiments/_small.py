"""The small models of the experiments: an OLMo of 4 layers and width 256 that knows its rows by heart, and its gold."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp

from unlearnjax.data.bpe import train_tokenizer
from unlearnjax.data.rows import Document, Row
from unlearnjax.models.abstract import init_params
from unlearnjax.models.config import ModelConfig
from unlearnjax.models.decoder import build
from unlearnjax.models.language_model import LanguageModel, load_model, save_model
from unlearnjax.recipes.memorise import memorise


class Models(NamedTuple):
    base: LanguageModel
    gold: LanguageModel


def small_models(
    work: Path, forget: Sequence[Row], retain: Sequence[Row], probe: Sequence[Row], unseen: Sequence[Document],
    *, seed: int, epochs: int,
) -> Models:  # fmt: skip
    """Base (all rows) and gold (all but the forget rows; same initialisation, same number of epochs), kept in `work`.

    The unseen documents are in the tokenizer's texts too: else their names would be cut finer, and give them away.
    """
    texts = [x for r in (*forget, *retain, *probe) for x in (r.input, r.output)] + [d.document for d in unseen]
    tokenizer = train_tokenizer(texts, 4096)
    config = ModelConfig(
        "olmo", len(tokenizer), 256, 768, 4, 8, 8, 32, "layer", max_positions=1024,
        eos_token_ids=(tokenizer.eos_token_id,), pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = build(config)
    made = []
    for name, rows in (("base", [*forget, *retain, *probe]), ("gold", [*retain, *probe])):
        folder = work / f"{name}-seed{seed}"
        if not folder.exists():
            start = init_params(model.abstract(jnp.float32), jax.random.key(seed))
            params, losses = memorise(
                model, start, tokenizer, rows, epochs=epochs, buckets=6, seed=seed, progress=True,
                label=f"memorising ({name})", checkpoints=work / f"{name}-seed{seed}.checkpoints",
            )  # fmt: skip
            print(f"{name}: loss {losses[0]:.2f} -> {losses[-1]:.3f} over {len(losses)} updates", file=sys.stderr)
            save_model(LanguageModel(params, config, tokenizer, model, name), folder)
        made.append(load_model(str(folder)))
    return Models(*made)
