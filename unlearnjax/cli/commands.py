"""What each command does: call the library, print the score table. Imports wait until a command runs."""

import argparse
import json
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unlearnjax.distributed.processes import follows

if TYPE_CHECKING:
    from unlearnjax.recipes.prepare import Sources


def _sources(a: argparse.Namespace) -> "Sources":
    from unlearnjax.recipes.prepare import Sources

    return Sources(a.forget, a.retain, a.members, a.nonmembers, a.probe)


def mesh_sizes(a: argparse.Namespace) -> dict[str, int] | None:
    """What --mesh says: sizes by axis."""
    from unlearnjax.distributed.mesh import parse_mesh

    return None if a.mesh is None else parse_mesh(a.mesh)


def say(message: str) -> None:
    """One line on stderr, of the process that speaks for all."""
    if not follows():
        print(f"unlearnjax: {message}", file=sys.stderr)


def _warn(message: str) -> None:
    say(f"warning: {message}")


def interrupted(a: argparse.Namespace | None, error: KeyboardInterrupt) -> int:
    """Say that a command was stopped and how to go on with it; returns the exit status, 128 + the signal's number."""
    from unlearnjax.training.interrupt import Interrupted

    number, note = (error.signum, error.note) if isinstance(error, Interrupted) else (int(signal.SIGINT), "")
    by = "" if number == signal.SIGINT else f" by {signal.Signals(number).name}"
    line = f"interrupted{by}{' ' if note else ''}{note}"
    # A demo's folder is there once its model is made, a run's once its input was checked.
    if getattr(a, "resume", None) is not None and Path(a.out).expanduser().is_dir():  # type: ignore[union-attr]
        again = a.command_line if a.resume else [*a.command_line, "--resume"]  # type: ignore[union-attr]
        line += f"; go on with: {shlex.join(again)}"
    say(line)
    return 128 + number


def _show(report: dict[str, Any], out: Path) -> None:
    from unlearnjax.errors import UserError
    from unlearnjax.report.scores import render_markdown_table

    print(render_markdown_table(report))
    for warning in report["warnings"]:
        _warn(warning)
    print(f"report: {out / 'report.html'}")
    if "exported" in report:
        what = "merge" if report["recipe"]["merges"] else "candidate"
        print(f"model:  {out / 'model'} (the {what} {report['exported']})")
    else:
        curves = out / "report.html"
        if any(candidate["status"] == "diverged" for candidate in report["candidates"]):
            why = f"candidates diverged; lower learning_rate (curves: {curves})"
        else:
            why = "no merge could be made; see the warnings"
        raise UserError(f"no model was written, because {why}")


IMAGE_OPTIONS = ("data", "test", "forget_test", "validation", "resize")
TEXT_OPTIONS = ("retain", "members", "nonmembers", "probe", "mmlu_data", "evaluate", "mesh", "dtype")


def run(a: argparse.Namespace) -> None:
    """`unlearnjax run`."""
    from unlearnjax.errors import UserError
    from unlearnjax.recipes.images.subjects import is_image_model

    if is_image_model(a.model):
        _run_images(a)
        return
    from unlearnjax.recipes.load import load_recipe, with_suite
    from unlearnjax.recipes.run import run

    _refuse(a, IMAGE_OPTIONS, "is for image models, and this is a language model")
    if a.retain is None:
        raise UserError("the following arguments are required: --retain (see unlearnjax run --help)")
    recipe = with_suite(load_recipe(a.recipe), a.evaluate)
    report = run(
        a.model, _sources(a), a.out, recipe, gold=a.gold, mmlu_data=a.mmlu_data, mmlu_shots=a.mmlu_shots,
        dtype=dtype_of(a), command=a.command_line, progress=not a.quiet, resume=a.resume,
        checkpoint_every=a.checkpoint_every, stop=a.stop, say=say, mesh=mesh_sizes(a),
    )  # fmt: skip
    _show(report, Path(a.out))


def _refuse(a: argparse.Namespace, options: Sequence[str], why: str) -> None:
    from unlearnjax.errors import UserError

    for name in options:
        if getattr(a, name):
            raise UserError(f"--{name.replace('_', '-')} {why}")


def dtype_of(a: argparse.Namespace) -> str:
    """Of the base weights: what is asked for, else what the machine is made for."""
    import jax

    return a.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")


def _run_images(a: argparse.Namespace) -> None:
    from unlearnjax.distributed.processes import APART, several
    from unlearnjax.errors import UserError
    from unlearnjax.recipes.images.data import ImageSources
    from unlearnjax.recipes.images.run import run_images
    from unlearnjax.recipes.load import load_image_recipe
    from unlearnjax.report.images import render_images_markdown

    _refuse(a, TEXT_OPTIONS, "is for language models, and this is an image model")
    if several():
        raise UserError(f"a run of image models is one process, and this job has several; {APART}")
    if a.data is None or a.test is None:
        raise UserError("an image model needs --data and --test (see unlearnjax run --help)")
    recipe = load_image_recipe(a.recipe, a.model)
    sources = ImageSources(a.data, a.forget, a.test, a.validation, a.forget_test, a.resize)
    report = run_images(
        a.model, sources, a.out, recipe, gold=a.gold, command=a.command_line, progress=not a.quiet, resume=a.resume,
        stop=a.stop,
    )  # fmt: skip
    print(render_images_markdown(report))
    for warning in report["warnings"]:
        _warn(warning)
    print(f"report: {Path(a.out) / 'report.html'}")
    if "exported" not in report:
        raise UserError("no model was written: the rule forbids every lambda of every merge (see the warnings)")
    print(f"model:  {Path(a.out) / 'model'} (the merge {report['exported']}, subtracted)")


def demo(a: argparse.Namespace) -> None:
    """`unlearnjax demo`."""
    from unlearnjax.errors import UserError
    from unlearnjax.recipes.demo import demo
    from unlearnjax.recipes.load import load_recipe, with_suite

    if not 0 <= a.seed < 2**32:
        raise UserError(f"--seed must be from 0 to 2^32 - 1, not {a.seed}")
    recipe = with_suite(load_recipe(a.recipe), a.evaluate)
    report = demo(
        a.out, recipe=recipe, seed=a.seed, command=a.command_line, progress=not a.quiet, resume=a.resume,
        checkpoint_every=a.checkpoint_every, stop=a.stop, say=say, mesh=mesh_sizes(a),
    )  # fmt: skip
    _show(report, Path(a.out) / "result")


def evaluate(a: argparse.Namespace) -> None:
    """`unlearnjax evaluate`."""
    from unlearnjax.recipes.evaluate import evaluate

    scores = evaluate(
        a.model, _sources(a), a.out, adapter=a.adapter, mmlu_file=a.mmlu, mmlu_data=a.mmlu_data,
        mmlu_shots=a.mmlu_shots, suite=a.evaluate or "official", original=a.original, gold=a.gold, dtype=dtype_of(a),
        max_new_tokens=a.max_new_tokens, batch_size=a.batch_size, progress=not a.quiet, warn=_warn, resume=a.resume,
        stop=a.stop, say=say, mesh=mesh_sizes(a),
    )  # fmt: skip
    print(json.dumps(scores, indent=1))


def score(a: argparse.Namespace) -> None:
    """`unlearnjax score`."""
    from unlearnjax.evaluation.semeval import score_folder

    print(json.dumps(score_folder(a.folder, a.mmlu, warn=_warn), indent=1))


def methods(a: argparse.Namespace) -> None:
    """List the merge methods, or describe one."""
    from unlearnjax.cli.methods import details, overview
    from unlearnjax.merging.api import methods as known

    print(overview(known()) if a.name is None else details(known(), a.name))
