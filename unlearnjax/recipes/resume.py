"""Going on with work that was killed: which folder may be gone on with, and what must be the same for it."""

import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

import unlearnjax
from unlearnjax.data.rows import fingerprint as rows_fingerprint
from unlearnjax.data.schedule import Schedule
from unlearnjax.data.tokens import Tokens
from unlearnjax.distributed.digest import digest_of
from unlearnjax.distributed.processes import agreed, follows, require_same
from unlearnjax.errors import UserError
from unlearnjax.io.atomic import remove_left_overs, require_free
from unlearnjax.recipes.describe import describe_hardware
from unlearnjax.recipes.prepare import Data, Prepared
from unlearnjax.report.schema import FILE as REPORT
from unlearnjax.training.checkpoint import leaf_names

CHECKPOINTS = "checkpoints"
EVALUATION = "evaluation"  # in the folder of checkpoints: the journals of what has been evaluated
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")
IN_MEMORY = ("remat", "tokens_at_once")  # of a recipe's training
AFTERWARDS = ("merges", "search", "evaluation")  # of a recipe, what comes after training
SETTINGS = ("jax_enable_x64", "jax_default_matmul_precision", "jax_default_prng_impl", "jax_threefry_partitionable")


class Kind(NamedTuple):
    """What is made in a folder: what it is called, what is there only until it ends, and the file that comes last."""

    name: str
    meanwhile: str
    last: str


RUN = Kind("run", CHECKPOINTS, REPORT)
SCORING = Kind("evaluation", "journal", "scores.json")


def is_unfinished(out: Path, kind: Kind = RUN) -> bool:
    """Whether `out` holds work that was begun and did not end."""
    return (out / kind.meanwhile).is_dir() and not (out / kind.last).exists()


def check_interval(seconds: float) -> None:
    """Raise `UserError` for a time between checkpoints that is none."""
    if not seconds >= 0:
        raise UserError(f"checkpoint_every must be 0 seconds or more, not {seconds}")


def claim(out: str | Path, resume: bool, kind: Kind = RUN) -> Path:
    """Check that a run, or another kind of work, may write to `out`, without writing anything yet.

    Returns:
      The path with symbolic links resolved.

    Raises:
      UserError: the folder is taken (`require_free`); with `resume`, one that holds something else than an unfinished
        run: a finished one, or other files. In all processes of a job if it is so in the first.
    """
    found = agreed(lambda: str(_claim(out, resume, kind)))
    return _claim(out, resume, kind) if follows() else Path(found)


def _claim(out: str | Path, resume: bool, kind: Kind) -> Path:
    target = Path(out).expanduser().resolve()
    if not target.is_dir() or not any(target.iterdir()):
        return require_free(out)
    if not resume:
        if is_unfinished(target, kind):
            hint = "add --resume to go on with it, or give a new folder"
            raise UserError(f"{out}: holds an unfinished {kind.name}; {hint}")
        return require_free(out)
    if (target / kind.last).exists():
        shutil.rmtree(target / kind.meanwhile, ignore_errors=True)  # there if it was killed in its last moment
        raise UserError(f"{out}: this {kind.name} has finished, nothing is left to resume; see {Path(out) / kind.last}")
    if not is_unfinished(target, kind):
        raise UserError(f"{out}: is not empty and holds no unfinished {kind.name} to resume; give a new folder")
    if not os.access(target, os.W_OK | os.X_OK):
        raise UserError(f"{out}: no permission to write there")
    return target


def clear(out: Path) -> None:
    """Remove what the run makes again after its training, and what was left half-written; generations stay."""
    remove_left_overs(out)
    for name in ("candidates", "merges", "model"):
        shutil.rmtree(out / name, ignore_errors=True)


def data_fingerprint(data: Data) -> dict[str, str]:
    """A digest of each kind of rows that there is."""
    return {name: rows_fingerprint(items) for name, items in data._asdict().items() if items is not None}


def run_fingerprint(
    recipe: Mapping[str, Any], rows: Mapping[str, str], groups: Sequence[Prepared], model: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything that a run's candidates depend on, bit for bit, as plain data; arrays are given by digests. How
    they are merged and evaluated may change while a run goes on: journals of evaluation know what they are of.

    Args:
      rows: `data_fingerprint`. model: `model_fingerprint`.
    """
    return {
        "recipe": {key: _of_weights(key, own) for key, own in recipe.items() if key not in AFTERWARDS},
        "data": dict(rows),
        **model,
        "tokens": [{side: digest_of(_arrays(tokens)) for side, tokens in g.sides.items()} for g in groups],
        "schedule": [_schedule_digest(g.schedule) for g in groups],
        "layers": [[list(own) for own in g.group.layers] for g in groups],
    }


def _of_weights(key: str, own: Any) -> Any:
    """A part of a recipe without what changes the memory and the rounding of a step alone, as other devices do."""
    return {name: x for name, x in own.items() if name not in IN_MEMORY} if key == "training" else own


def model_fingerprint(params: PyTree) -> dict[str, Any]:
    """What a model's outputs depend on beside its input, bit for bit: its weights, and what computes."""
    device = jax.devices()[0]
    same = {
        "base weights": weights_digest(params),
        "packages": {"unlearnjax": unlearnjax.__version__, **{name: version(name) for name in PACKAGES}},
    }
    require_same(same)
    made = {
        **same,
        "device": {
            **{k: v for k, v in describe_hardware().items() if k in ("platform", "device", "device_count")},
            "processor": _processor(),
            "runtime": device.client.platform_version,
        },
        "settings": {
            **{name: str(getattr(jax.config, name, None)) for name in SETTINGS},
            "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
        },
    }
    return agreed(lambda: made)  # hosts of one job may have different processors


def weights_digest(tree: PyTree) -> str:
    """Of all leaves of a pytree with their names, dtypes and shapes."""
    return digest_of(leaf_names(tree).items())


def _arrays(tokens: Tokens) -> Iterable[tuple[str, Any]]:
    return ((name, x) for name, x in tokens._asdict().items() if x is not None)


def _schedule_digest(schedule: Schedule) -> str:
    def arrays() -> Iterable[tuple[str, Any]]:
        for step in schedule.steps:
            yield "shape", np.asarray([step.width, step.answers, step.epoch])
            yield from step.rows.items()
            yield from (("micro", step.micro), ("weight", step.micro_weight), ("update", step.update))
            more = (("share", step.share), ("restart", step.restart), ("epochs", step.epochs))
            yield from ((name, array) for name, array in more if array is not None)

    return digest_of(arrays())


def _processor() -> str:
    """The processor's name: XLA compiles for the very one it runs on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
