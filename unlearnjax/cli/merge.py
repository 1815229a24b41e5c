"""`unlearnjax merge`: model folders into one, by options or by a mergekit YAML."""

import argparse
import dataclasses
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unlearnjax.errors import UserError

if TYPE_CHECKING:
    from unlearnjax.merging.job import Job

# Every number, flag and choice that some method takes. Written out, so that --help need not load the methods.
NUMBERS = ("alpha", "density", "eps", "epsilon", "gamma", "lambda", "max_iter", "r", "rho", "scale", "select_topk", "t",
           "tol")  # fmt: skip
FLAGS = ("exact_k", "filter_wise", "normalize", "normalize_weights", "nuslerp_flatten", "nuslerp_row_wise", "rescale")
CHOICES = ("average", "majority_sign_method", "merge_func", "origin")
OWN = {"scale"}  # what the method calls scale is --passthrough-scale: --scale is the step's length


def add_options(p: argparse.ArgumentParser) -> None:
    """The command's options."""
    p.add_argument("recipe", nargs="?", metavar="RECIPE", help="a mergekit YAML (whole models); then no other options")
    p.add_argument("--base", metavar="B", help="the model that the others were made from: a folder or hub id")
    p.add_argument("--models", nargs="+", metavar="M", help="the models to merge, or PEFT adapters")
    p.add_argument("--method", metavar="NAME", help="see `unlearnjax methods`")
    p.add_argument("--semantics", metavar="S", help="which definition of the method (default: its first)")
    p.add_argument("--weights", nargs="+", type=float, metavar="W", help="one per model")
    for name in NUMBERS:
        option = "--passthrough-scale" if name in OWN else f"--{name.replace('_', '-')}"
        p.add_argument(option, nargs="+", type=float, dest=f"set_{name}", metavar="X", help=argparse.SUPPRESS)
    for name in FLAGS:
        option = f"--{name.replace('_', '-')}"
        p.add_argument(
            option, action=argparse.BooleanOptionalAction, dest=f"set_{name}", default=None, help=argparse.SUPPRESS
        )
    for name in CHOICES:
        p.add_argument(f"--{name.replace('_', '-')}", dest=f"set_{name}", metavar="X", help=argparse.SUPPRESS)
    p.add_argument("--negate", action="store_true", help="subtract the merged delta from the base: unlearning")
    p.add_argument("--scale", type=float, default=1.0, help="what the merged delta is multiplied by (default: 1)")
    p.add_argument("--dtype", metavar="D", help="of the result (default: the base's)")
    p.add_argument("--seed", type=int, default=0, help="of random drops (default: 0)")
    p.add_argument("--space", choices=("delta", "core", "factors"), help="of adapters (default: delta)")
    p.add_argument("--rank", type=int, metavar="R", help="of the merged adapter (default: what it takes; see README)")
    p.add_argument("--compress", type=int, metavar="R", help="space core: directions of the shared bases to keep")
    p.add_argument("--out", metavar="OUT", help="a new or empty folder for the merged model")
    p.add_argument("--max-shard-size", type=float, default=5.0, metavar="GB", help="of a weight file (default: 5)")
    p.add_argument("--dry-run", action="store_true", help="check everything, print the plan, read no tensor")
    p.epilog = "A method's own parameters are options too: --density 0.8, --rho 0.9, --no-normalize (see `methods`)."


def job_of(a: argparse.Namespace) -> "Job":
    """The merge that the command line asks for.

    Raises:
      UserError: options that contradict each other, or one that is missing.
    """
    from unlearnjax.merging.job import Input, Job
    from unlearnjax.merging.mergekit import load_mergekit

    given = {name.removeprefix("set_"): value for name, value in vars(a).items() if name.startswith("set_")}
    given = {name: value for name, value in given.items() if value is not None}
    if a.recipe is not None:
        others = [n for n in ("base", "models", "method", "semantics", "weights", "dtype") if getattr(a, n) is not None]
        if others or given:
            raise UserError(f"merge: --{[*others, *given][0]} and a recipe: say it in {a.recipe}")
        job = load_mergekit(a.recipe)
    else:
        for name in ("models", "method"):
            if getattr(a, name) is None:
                raise UserError(f"merge: --{name} is missing; give it, or a recipe")
        for name, values in (("weights", a.weights), *((n, v) for n, v in given.items() if isinstance(v, list))):
            if values is not None and len(values) not in (1, len(a.models)):
                raise UserError(f"merge: {len(values)} {name} for {len(a.models)} models; give one for each")
        job = Job(
            a.method, tuple(Input(m, _own(a, given, i)) for i, m in enumerate(a.models)), base=a.base,
            semantics=a.semantics, settings={k: v for k, v in given.items() if not isinstance(v, list)}, dtype=a.dtype,
        )  # fmt: skip
    return _stepped(job, a)


def _own(a: argparse.Namespace, given: dict[str, Any], i: int) -> dict[str, Any]:
    """What the lists among the options say for model i."""
    lists = {name: value for name, value in given.items() if isinstance(value, list)}
    if a.weights is not None:
        lists["weight"] = a.weights
    return {name: value[0] if len(value) == 1 else value[i] for name, value in lists.items()}


def _stepped(job: "Job", a: argparse.Namespace) -> "Job":
    return dataclasses.replace(job, factor=-a.scale if a.negate else a.scale, seed=a.seed)


def merge(a: argparse.Namespace) -> None:
    """Merge, or print the plan."""
    from unlearnjax.io.huggingface import resolve
    from unlearnjax.io.peft_raw import is_adapter
    from unlearnjax.merging.api import find_rule
    from unlearnjax.merging.disk import plan
    from unlearnjax.merging.folders import merge_folders, show

    job = job_of(a)
    kinds = [is_adapter(resolve(source.model)) for source in job.inputs]
    if any(kinds):
        if not all(kinds):
            raise UserError(f"merge: {job.inputs[kinds.index(False)].model} is no adapter, and others are")
        _merge_adapters(a, job)
        return
    for name in ("space", "rank", "compress"):
        if getattr(a, name) is not None:
            raise UserError(f"merge: --{name} is for adapters, and these are models")
    if job.semantics is None and job.base is None and "mergekit" in find_rule(job.method, None)[0].semantics:
        job = dataclasses.replace(job, semantics="mergekit")  # the one that knows models without a base
    found = plan(job)
    print(show(found))
    if a.dry_run:
        return
    if a.out is None:
        raise UserError("merge: --out is missing: a new folder for the merged model, or --dry-run")
    from tqdm import tqdm

    recipe = None if a.recipe is None else Path(a.recipe).expanduser().read_text("utf-8")
    total = found.bytes_read * found.passes
    with tqdm(total=total, unit="B", unit_scale=True, desc="merging", disable=a.quiet) as bar:
        merge_folders(
            found, a.out, recipe=recipe, command=shlex.join(a.command_line),
            max_shard_bytes=int(a.max_shard_size * 1e9), progress=bar.update,
            say=lambda message: tqdm.write(f"unlearnjax: {message}", file=sys.stderr),
        )  # fmt: skip
    print(f"model:   {a.out}")


def _merge_adapters(a: argparse.Namespace, job: "Job") -> None:
    """LoRA in, LoRA out."""
    from unlearnjax.io.atomic import require_free, staged_folder
    from unlearnjax.io.card import merge_card
    from unlearnjax.io.huggingface import resolve
    from unlearnjax.io.peft_raw import read_adapter, write_adapter
    from unlearnjax.merging.adapters import check_adapters, describe_adapters, merge_adapters
    from unlearnjax.merging.folders import job_yaml

    if a.dtype is not None:
        raise UserError("merge: --dtype is for models; a merged adapter is float32")
    adapters = [read_adapter(resolve(source.model)) for source in job.inputs]
    check_adapters(adapters)
    ranks = [max(m.a.shape[0] for m in adapter.modules.values()) for adapter in adapters]
    for adapter, rank in zip(adapters, ranks, strict=True):
        print(f"adapter: {adapter.folder} (rank {rank}, {len(adapter.modules)} modules)")
    if a.dry_run:
        return
    if a.out is None:
        raise UserError("merge: --out is missing: a new folder for the merged adapter, or --dry-run")
    require_free(a.out)
    space = a.space or "delta"
    found = merge_adapters(job, adapters, space, rank=a.rank, compress=a.compress)
    method = describe_adapters(job, space, found, [adapter.folder for adapter in adapters])
    print(f"method:  {method}")
    recipe = job_yaml(job) + f"space: {space}\n"
    sources = [source.model for source in job.inputs]
    base = adapters[0].config.get("base_model_name_or_path")
    card = merge_card(
        title=Path(a.out).name, base_model=[base] if base else sources, method=f"{method} Of: {', '.join(sources)}.",
        recipe=recipe, arguments=shlex.join(a.command_line), library="peft",
    )  # fmt: skip
    with staged_folder(a.out) as staged:
        write_adapter(staged, adapters[0], found.modules, card)
        (staged / "merge.yml").write_text(recipe, "utf-8")
    print(f"adapter: {a.out}")
