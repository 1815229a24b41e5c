"""The official protocol on a model folder, with or without a PEFT adapter; MMLU with it where its data is given."""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from unlearnjax.adapters.lora import scaled
from unlearnjax.distributed.mesh import choose_mesh
from unlearnjax.errors import UserError, check_known
from unlearnjax.evaluation.generate import stack_of_one
from unlearnjax.evaluation.journal import Journal
from unlearnjax.evaluation.mmlu import SHOTS, MmluScores
from unlearnjax.evaluation.protocol import evaluate_candidates
from unlearnjax.evaluation.semeval import read_mmlu
from unlearnjax.io.atomic import remove_left_overs, staged_file
from unlearnjax.io.huggingface import check_dtype, load_params, resolve
from unlearnjax.io.locks import lock_for_all
from unlearnjax.io.peft import load_adapter
from unlearnjax.models.abstract import weight_bytes
from unlearnjax.recipes.evaluate_step import Group, evaluate_full, measure_mmlu, write_mmlu
from unlearnjax.recipes.parse import SUITES
from unlearnjax.recipes.prepare import (
    Sources,
    check_evaluation,
    load_data,
    load_prompts,
    load_reference,
    without_weights,
)
from unlearnjax.recipes.progress import bars, say_by_warning
from unlearnjax.recipes.resume import SCORING, claim, model_fingerprint, weights_digest
from unlearnjax.recipes.schema import Evaluation
from unlearnjax.training.interrupt import Stop


def evaluate(
    model: str,
    sources: Sources,
    out: str | Path,
    *,
    adapter: str | None = None,
    mmlu_file: str | None = None,
    mmlu_data: str | None = None,
    mmlu_shots: int = SHOTS,
    suite: str = "official",
    original: str | None = None,
    gold: str | None = None,
    dtype: str = "float32",
    max_new_tokens: int = 256,
    batch_size: int = 32,
    progress: bool = True,
    warn: Callable[[str], None] | None = None,
    resume: bool = False,
    stop: Stop | None = None,
    say: Callable[[str], None] | None = None,
    mesh: Mesh | Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Generate, attack and score; writes the official CSVs and scores.json under `out`, and returns the scores.

    MMLU is read from `mmlu_file`, or measured on `mmlu_data` (see `load_mmlu`), whose result goes into mmlu.json too.
    With the suite `full`, full.json has what the score hides (see `unlearnjax.evaluation.full.suite`), of the model and
    of the gold model, whose generations are in `out`/gold.

    Args:
      suite: `official` or `full`.
      original: the model before unlearning, which the full suite compares with. With an adapter it is `model` itself.
      gold: a model that never saw the forget rows, for the full suite.
      out: a new or empty folder; scores.json comes last, and while the evaluation is going on its journal is there.
      resume: go on with the unfinished evaluation in `out`, if there is one: batches that it finished are not computed
        again, where model, data and settings are the same.
      stop: looked at after each batch.
      say: receives lines about a journal that could not be used or written; default: Python warnings.
      mesh: the devices that share the work, or their number along each axis (see `unlearnjax.distributed.mesh`).

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
    check_known([suite], SUITES, "suite", "evaluate")
    if suite == "full" and (original is None) == (adapter is None):
        raise UserError(
            "--evaluate full compares with the model before unlearning: give it as --original; with --adapter it is "
            "the model itself, and --original is left out"
        )
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
    held = 1 + (original is not None) + (gold is not None)
    mesh = choose_mesh(mesh, 1, held * weight_bytes(lm.config, dtype), batch_size)
    params = load_params(folder, lm.config, dtype, mesh)
    lm = dataclasses.replace(lm, params=params)
    before = lm if original is None else load_reference(original, lm, dtype, "model before unlearning", mesh)
    reference = None if gold is None else load_reference(gold, lm, dtype, "gold model", mesh)
    known = {**model_fingerprint(params), "adapter": weights_digest(stack)}
    journal = Journal(out / SCORING.meanwhile, known, say or say_by_warning)
    journal.folder.mkdir(parents=True, exist_ok=True)
    lock = lock_for_all(journal.folder)
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
        if suite == "full":
            settings = Evaluation(max_new_tokens=max_new_tokens, batch_size=batch_size, suite=suite)
            groups = [Group(lambda: params, stack, ["model"], ["candidate"], journal.within("model"))]
            models, folders = [{"name": "model", "scores": scores}], {"model": out}
            if reference is not None:
                its = reference.params
                own = journal.within("gold", gold=weights_digest(its))
                groups.insert(0, Group(lambda: its, None, ["gold"], ["gold"], own))
                folders["gold"] = out / "gold"
                with bars(progress, "evaluating gold", stop) as bar:
                    (of_gold,) = evaluate_candidates(
                        lm.model, its, None, lm.require_tokenizer(), *data, max_new_tokens=max_new_tokens,
                        batch_size=batch_size, out_folders=[out / "gold"], progress=bar, journal=own,
                        warn=lambda *_: None,
                    )  # fmt: skip
                models.append({"name": "gold", "scores": of_gold})
            found = evaluate_full(before, groups, models, settings, data, folders, progress=progress, stop=stop)
            with staged_file(out / "full.json") as path:
                path.write_text(json.dumps(found, indent=1), encoding="utf-8")
        with staged_file(out / SCORING.last) as path:
            path.write_text(json.dumps(scores, indent=1), encoding="utf-8")
        journal.remove()
    finally:
        if lock >= 0:
            os.close(lock)
    return dict(scores)
