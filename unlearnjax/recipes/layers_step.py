"""The layers that `layers: auto` stands for: those that tracing the user's own forget set recommends."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from unlearnjax.data.rows import fingerprint
from unlearnjax.errors import UserError
from unlearnjax.evaluation.journal import digest
from unlearnjax.io.atomic import staged_file
from unlearnjax.io.locks import lock_for_all
from unlearnjax.models.language_model import LanguageModel
from unlearnjax.recipes.groups import AUTO
from unlearnjax.recipes.prepare import Data, Sources
from unlearnjax.recipes.resume import CHECKPOINTS, model_fingerprint
from unlearnjax.recipes.schema import Recipe
from unlearnjax.recipes.trace import NothingToTrace, run_trace
from unlearnjax.report.trace import FILE, read_trace
from unlearnjax.tracing.effects import SUBJECT, best_range, default_width
from unlearnjax.tracing.trace import Settings
from unlearnjax.training.interrupt import Stop
from unlearnjax.training.keeper import FINGERPRINT, PLACE

FOLDER = "trace"  # in the run's folder
BASIS = "traced.json"  # beside the checkpoints: what the trace was made from
MOST = 125  # facts, as many as Selective Amnesia's; one place of each is read here
KINDS = {"mlp": "mlp", "self_attn": "attention", "all": "hidden"}  # by `modules`, whose effect tells the layers


def traced_layers(
    model: LanguageModel,
    recipe: Recipe,
    data: Data,
    sources: Sources,
    out: Path,
    *,
    command: Sequence[str] = (),
    progress: bool = False,
    stop: Stop | None = None,
    say: Callable[[str], None] | None = None,
) -> dict[str, tuple[int, ...]]:
    """Trace the forget set's questions into `out`/trace, unless that is done, and choose layers for each `modules` that
    a candidate with `layers: auto` has. Nothing is done where there is none.

    At most MOST facts that the model knows are traced.

    Returns:
      The layers by `modules`: the contiguous ones with the largest effect at the subject's last token, of the number
      that `default_width` gives.

    Raises:
      UserError: no fact is left to trace (see `run_trace`), or no layer has an effect, and nothing stays; a folder of
        another run, or one where another process works.
      Interrupted: `stop` asked for it; the trace goes on with the run.
    """
    wanted = sorted({c.modules for c in recipe.candidates if c.layers == AUTO})
    if not wanted:
        return {}
    settings = Settings(kinds=tuple(KINDS[modules] for modules in wanted))
    folder, basis = out / FOLDER, out / CHECKPOINTS / BASIS
    made_from = {"forget": fingerprint(data.forget), "kinds": settings.kinds, **model_fingerprint(model.params)}
    del made_from[PLACE]  # layers found elsewhere hold here too
    known = digest(made_from)
    basis.parent.mkdir(parents=True, exist_ok=True)
    lock = lock_for_all(basis.parent)
    try:
        report = _report(model, sources, folder, basis, known, settings, command, progress, stop, say)
        width, found = default_width(model.config.layers), {}
        for modules in wanted:
            curve = report["effects"]["kinds"][KINDS[modules]][SUBJECT]["mean"]
            first = best_range(curve, width)
            # Not of a run whose training has begun: its checkpoints would go with the trace.
            if sum(curve[first : first + width]) <= 0 and not (basis.parent / FINGERPRINT).exists():
                raise NothingToTrace(
                    f"{sources.forget}: no range of {width} layers gives any of the answers' probability back, by "
                    f"{KINDS[modules]}"
                )
            found[modules] = tuple(range(first, first + width))
    except NothingToTrace as error:
        # Nothing is left behind that would have to be resumed.
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(basis.parent)
        with contextlib.suppress(OSError):  # not empty: something else is there
            out.rmdir()
        hint = "layers: auto traces the forget set's questions; give layers as a list, or last-<count>"
        raise UserError(f"{error}; {hint}") from None
    finally:
        if lock >= 0:
            os.close(lock)
    return found


def _report(
    model: LanguageModel,
    sources: Sources,
    folder: Path,
    basis: Path,
    known: str,
    settings: Settings,
    command: Sequence[str],
    progress: bool,
    stop: Stop | None,
    say: Callable[[str], None] | None,
) -> dict[str, Any]:
    """The trace in `folder`, made or gone on with; one of other facts or of another model is made anew."""
    if not basis.exists() or json.loads(basis.read_text("utf-8")) != known:
        if (basis.parent / FINGERPRINT).exists():  # layers were chosen by it, and training has begun
            raise UserError(
                f"{folder.parent}: is of another run: its layers were found by tracing other facts, or another model; "
                "give what that run was started with, or a new folder"
            )
        shutil.rmtree(folder, ignore_errors=True)
        with staged_file(basis) as beside:
            beside.write_text(json.dumps(known), "utf-8")
    if (folder / FILE).exists():
        return read_trace(folder / FILE)
    return run_trace(
        model,
        sources.forget,
        folder,
        settings,
        by=settings.kinds[0],
        most=MOST,
        command=command,
        progress=progress,
        resume=folder.exists(),
        stop=stop,
        say=say,
    )
