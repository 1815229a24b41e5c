"""The job that `unlearnjax trace` does: where a model's facts live, by causal mediation, with a page that shows it."""

import dataclasses
import datetime
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

import unlearnjax
from unlearnjax.distributed.mesh import choose_mesh, mesh_of
from unlearnjax.distributed.processes import require_same
from unlearnjax.errors import UserError, check_known
from unlearnjax.evaluation.journal import Journal, recorded
from unlearnjax.evaluation.protocol import stage
from unlearnjax.io.atomic import remove_left_overs, staged_file
from unlearnjax.io.huggingface import check_dtype, load_params, resolve
from unlearnjax.io.locks import lock_for_all
from unlearnjax.models.abstract import weight_bytes
from unlearnjax.models.language_model import LanguageModel
from unlearnjax.recipes.describe import describe_hardware
from unlearnjax.recipes.prepare import without_weights
from unlearnjax.recipes.progress import bars, say_by_warning
from unlearnjax.recipes.resume import Kind, claim, model_fingerprint
from unlearnjax.report.schema import write_json
from unlearnjax.report.trace import FILE, complete, render_trace_html
from unlearnjax.tracing.effects import SEMANTICS, check_width, default_width, doubt, effects, recommend
from unlearnjax.tracing.facts import load_facts
from unlearnjax.tracing.tokens import locate
from unlearnjax.tracing.trace import Settings, Traced, Tracer, traced
from unlearnjax.training.interrupt import Stop

TRACE = Kind("trace", "journal", FILE)
FACTS = "facts.jsonl"


class NothingToTrace(UserError):
    """No fact is left: no subject was found, or the model knows none."""


def run_trace(
    model: str | LanguageModel,
    facts: str,
    out: str | Path,
    settings: Settings | None = None,
    *,
    semantics: str = "rome",
    by: str | None = None,
    width: int | None = None,
    most: int | None = None,
    dtype: str = "float32",
    command: Sequence[str] = (),
    progress: bool = True,
    resume: bool = False,
    stop: Stop | None = None,
    say: Callable[[str], None] | None = None,
    mesh: Mesh | Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Trace a model's facts.

    Args:
      model: a folder, a hub id, or a loaded model. facts: see `unlearnjax.tracing.facts.load_facts`.
      out: a new or empty folder. It gets facts.jsonl (each traced fact's tokens and scores), trace.html, and last
        trace.json: average effects, what was skipped and why, and `recommended`, the layers to unlearn in.
      semantics: how effects are averaged, `rome` or `sha256` (see `unlearnjax.tracing.effects`).
      by: the kind of activation whose effect the layers are recommended by; default: mlp, or where that is not traced
        the first kind. width: how many layers; default: 3 of 8.
      most: trace the first so many of the facts that the model knows. Default: all.
      resume: go on with the unfinished trace in `out`: facts that were traced are not traced again.
      say: receives lines about a journal that could not be used or written, and about what speaks against the layers
        recommended (see `doubt`); default: Python warnings.
      mesh: the devices that share the work, or their number along each axis (see `unlearnjax.distributed.mesh`), when
        `model` is a name. A loaded model uses those that it lies on.

    Returns:
      What trace.json holds.

    Raises:
      NothingToTrace: facts that are skipped while others are left are reported.
      UserError: bad input.
      Interrupted: `stop` asked for it; the trace can be resumed.
    """
    settings = settings or Settings()
    out = claim(out, resume, TRACE)
    check_dtype(dtype)
    check_known([semantics], SEMANTICS, "semantics", "trace")
    if by is None:
        by = "mlp" if "mlp" in settings.kinds else settings.kinds[0]
    check_known([by], settings.kinds, "kind among those traced", "trace: recommend by")
    if most is not None and most < 1:
        raise UserError(f"trace: most must be at least 1, not {most}")
    found, skipped = load_facts(facts)
    # The weights are read last: everything else about the input is cheap to check.
    folder = resolve(model) if isinstance(model, str) else None
    lm = without_weights(folder, str(model)) if folder is not None else model
    assert isinstance(lm, LanguageModel)
    layers = lm.config.layers
    width = default_width(layers) if width is None else width
    check_width(width, layers)
    located, missing = locate(found, lm.require_tokenizer(), lm.config.max_positions)
    skipped += missing
    _check_left(located, skipped, facts)
    require_same({"facts": [[*x.ids, x.begin, x.end] for x in located], "settings": dataclasses.asdict(settings)})

    if folder is not None:
        mesh = choose_mesh(mesh, 1, weight_bytes(lm.config, dtype))
        lm = dataclasses.replace(lm, params=load_params(folder, lm.config, dtype, mesh))
    tracer = Tracer(lm, located, settings, mesh=mesh_of(lm.params))
    fingerprint = {**model_fingerprint(lm.params), "settings": dataclasses.asdict(settings)}
    journal = Journal(out / TRACE.meanwhile, fingerprint, say or say_by_warning)
    journal.folder.mkdir(parents=True, exist_ok=True)
    lock = lock_for_all(journal.folder)
    try:
        remove_left_overs(out)
        with bars(progress, "tracing", stop) as bar:
            known, wrong = tracer.known(stage(bar, "which facts are known", len(located)))
            skipped += wrong
            _check_left(known, skipped, facts)
            counts = {"known": len(known), "wrong": len(wrong), "skipped": len(skipped) - len(wrong)}
            known = known[:most]
            traces = _traced(tracer, known, journal, stage(bar, "facts", len(known)))
        report = complete(
            {
                "title": f"Where {Path(lm.source).name} keeps {len(traces)} facts",
                "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                "unlearnjax": unlearnjax.__version__,
                "command": list(command),
                "hardware": describe_hardware(),
                "model": lm.source,
                "layers": layers,
                "settings": {**dataclasses.asdict(settings), "window": tracer.window, "sigma": tracer.sigma},
                "counts": {"given": sum(counts.values()), **counts, "traced": len(traces)},
                "skipped": [s._asdict() for s in skipped],
                "effects": effects(traces, semantics),
                "recommended": recommend(traces, by, width),
            }
        )  # fmt: skip
        with staged_file(out / FACTS) as path:
            path.write_text("".join(json.dumps(t.plain()) + "\n" for t in traces), encoding="utf-8")
        with staged_file(out / "trace.html") as path:
            path.write_text(render_trace_html(report, traces), encoding="utf-8")
        write_json(out / FILE, report)
        journal.remove()
        against = doubt(report["effects"], report["recommended"])
        if against is not None:
            (say or say_by_warning)(f"{out}: {against}")
    finally:
        if lock >= 0:
            os.close(lock)
    return report


def _check_left(left: Sequence[Any], skipped: Sequence[Any], facts: str) -> None:
    if not left:
        first = f"; the first: {skipped[0].id!r}: {skipped[0].reason}" if skipped else ""
        raise NothingToTrace(f"{facts}: no fact is left to trace ({len(skipped)} skipped{first})")


def _traced(
    tracer: Tracer, known: Sequence[int], journal: Journal, report: Callable[[int], None] | None
) -> list[Traced]:
    """All facts' traces in the order of the facts; calls that the journal has are not made again."""
    records = journal.records("facts", facts=[[*x.ids, x.begin, x.end] for x in tracer.located])
    found: dict[int, Traced] = {}
    for group in tracer.groups(known):
        own = recorded(records, group, lambda g: [t.plain() for t in tracer.run(g)])
        found |= zip(group.places, map(traced, own), strict=True)
        if report is not None:
            report(len(group.places))
    return [found[place] for place in known]
