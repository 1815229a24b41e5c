"""The layers that `layers: auto` stands for: those that tracing the user's own forget set recommends."""

import contextlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from unlearnjax.data.rows import fingerprint
from unlearnjax.errors import UserError
from unlearnjax.evaluation.journal import digest
from unlearnjax.io.atomic import staged_file
from unlearnjax.models.language_model import LanguageModel
from unlearnjax.recipes.groups import AUTO
from unlearnjax.recipes.prepare import Data, Sources
from unlearnjax.recipes.resume import CHECKPOINTS, model_fingerprint
from unlearnjax.recipes.schema import Recipe
from unlearnjax.recipes.trace import run_trace
from unlearnjax.report.trace import FILE, read_trace
from unlearnjax.tracing.effects import SUBJECT, best_range, default_width
from unlearnjax.tracing.trace import Settings
from unlearnjax.training.interrupt import Stop

FOLDER = "trace"  # in the run's folder
BASIS = "traced.json"  # beside the checkpoints: what the trace was made from
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

    Returns:
      The layers by `modules`: the contiguous ones with the largest effect at the subject's last token, of the number
      that `default_width` gives.

    Raises:
      UserError: no fact is left to trace (see `run_trace`); the hint says what to do.
      Interrupted: `stop` asked for it; the trace goes on with the run.
    """
    wanted = sorted({c.modules for c in recipe.candidates if c.layers == AUTO})
    if not wanted:
        return {}
    settings = Settings(kinds=tuple(KINDS[modules] for modules in wanted))
    folder, basis = out / FOLDER, out / CHECKPOINTS / BASIS
    known = digest({"forget": fingerprint(data.forget), "kinds": settings.kinds, **model_fingerprint(model.params)})
    basis.parent.mkdir(parents=True, exist_ok=True)
    if not basis.exists() or json.loads(basis.read_text("utf-8")) != known:
        shutil.rmtree(folder, ignore_errors=True)
        with staged_file(basis) as beside:
            beside.write_text(json.dumps(known), "utf-8")
    if (folder / FILE).exists():
        report: dict[str, Any] = read_trace(folder / FILE)
    else:
        try:
            report = run_trace(
                model, sources.forget, folder, settings, by=settings.kinds[0], command=command, progress=progress,
                resume=folder.exists(), stop=stop, say=say,
            )  # fmt: skip
        except UserError as error:
            # Nothing is left behind that would have to be resumed.
            shutil.rmtree(folder, ignore_errors=True)
            basis.unlink()
            with contextlib.suppress(OSError):  # not empty: something else is there
                basis.parent.rmdir()
                out.rmdir()
            hint = "layers: auto traces the forget set's questions; give layers as a list, or last-<count>"
            raise UserError(f"{error}; {hint}") from None
    width = default_width(model.config.layers)
    found = {}
    for modules in wanted:
        first = best_range(report["effects"]["kinds"][KINDS[modules]][SUBJECT]["mean"], width)
        found[modules] = tuple(range(first, first + width))
    return found
