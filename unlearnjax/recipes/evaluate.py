"""The official protocol on a model folder, with or without a PEFT adapter; MMLU with it where its data is given."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from unlearnjax.adapters.lora import scaled
from unlearnjax.errors import UserError
from unlearnjax.evaluation.generate import stack_of_one
from unlearnjax.evaluation.journal import Journal
from unlearnjax.evaluation.mmlu import SHOTS, MmluScores
from unlearnjax.evaluation.protocol import evaluate_candidates
from unlearnjax.evaluation.semeval import read_mmlu
from unlearnjax.io.atomic import remove_left_overs, staged_file
from unlearnjax.io.huggingface import check_dtype, load_params, resolve
from unlearnjax.io.peft import load_adapter
from unlearnjax.recipes.evaluate_step import measure_mmlu, write_mmlu
from unlearnjax.recipes.prepare import Sources, check_evaluation, load_data, load_prompts, without_weights
from unlearnjax.recipes.progress import bars, say_by_warning
from unlearnjax.recipes.resume import SCORING, claim, model_fingerprint, weights_sha256
from unlearnjax.training.interrupt import Stop
from unlearnjax.training.keeper import lock_folder


def evaluate(
    model: str,
    sources: Sources,
    out: str | Path,
    *,
    adapter: str | None = None,
    mmlu_file: str | None = None,
    mmlu_data: str | None = None,
    mmlu_shots: int = SHOTS,
    dtype: str = "float32",
    max_new_tokens: int = 256,
    batch_size: int = 32,
    progress: bool = True,
    warn: Callable[[str], None] | None = None,
    resume: bool = False,
    stop: Stop | None = None,
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Generate, attack and score; writes the official CSVs and scores.json under `out`, and returns the scores.

    MMLU is read from `mmlu_file`, or measured on `mmlu_data` (see `load_mmlu`), whose result goes into mmlu.json too.

    Args:
      out: a new or empty folder; scores.json comes last, and while the evaluation is going on its journal is there.
      resume: go on with the unfinished evaluation in `out`, if there is one: batches that it finished are not computed
        again, where model, data and settings are the same.
      stop: looked at after each batch.
      say: receives lines about a journal that could not be used or written; default: Python warnings.

    Raises:
      UserError: any bad input, before anything is computed or written.
      Interrupted: `stop` asked for it; the evaluation can be resumed.
    """
    out = claim(out, resume, SCORING)
    if mmlu_file is not None and mmlu_data is not None:
        raise UserError("MMLU is either measured (--mmlu-data) or read from a file (--mmlu); give one of them")
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise UserError(f"{name} must be at least 1, not {value}")
    check_dtype(dtype)
    mmlu = None if mmlu_file is None else [read_mmlu(mmlu_file)]
    data = load_data(sources)
    folder = resolve(model)
    lm = without_weights(folder, model)
    check_evaluation(lm, data, sources, max_new_tokens)
    prompts = None if mmlu_data is None else load_prompts(lm, mmlu_data, mmlu_shots)
    stack = None
    if adapter is not None:
        loaded = load_adapter(adapter, lm.config)
        stack = stack_of_one(scaled(loaded.lora, loaded.alpha / loaded.rank))
    params = load_params(folder, lm.config, dtype)
    known = {**model_fingerprint(params), "adapter": weights_sha256(stack)}
    journal = Journal(out / SCORING.meanwhile, known, say or say_by_warning)
    journal.folder.mkdir(parents=True, exist_ok=True)
    lock = lock_folder(journal.folder)
    try:
        remove_left_overs(out)
        measured: list[MmluScores] = []
        with bars(progress, "evaluating", stop) as bar:
            if prompts is not None:
                measured = measure_mmlu(lm, params, stack, prompts, batch_size, bar, journal)
                mmlu = [measured[0].average.accuracy]
            (scores,) = evaluate_candidates(
                lm.model, params, stack, lm.require_tokenizer(), *data, mmlu=mmlu, max_new_tokens=max_new_tokens,
                batch_size=batch_size, out_folders=[out], progress=bar, journal=journal,
                warn=None if warn is None else lambda _, message: warn(message),
            )  # fmt: skip
            for one in measured:
                write_mmlu(out, one)
        with staged_file(out / SCORING.last) as path:
            path.write_text(json.dumps(scores, indent=1), encoding="utf-8")
        journal.remove()
    finally:
        if lock >= 0:
            os.close(lock)
    return dict(scores)
