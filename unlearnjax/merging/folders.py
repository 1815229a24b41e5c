"""Merging model folders into a model folder: what `unlearnjax merge` does."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from unlearnjax.io.card import merge_card
from unlearnjax.io.huggingface import read_json
from unlearnjax.io.resumable import resumable_folder
from unlearnjax.merging.disk import STATISTICS, Plan, merge_to, written_files
from unlearnjax.merging.job import Job

# What a model folder holds besides weights: its configuration, tokenizer and chat template.
BESIDE = ("generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*",
          "merges.txt", "*.model", "chat_template*", "preprocessor_config.json")  # fmt: skip


def merge_folders(
    found: Plan,
    out: str | Path,
    *,
    recipe: str | None = None,
    command: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
    progress: Callable[[int], object] | None = None,
    say: Callable[[str], object] = lambda message: None,
) -> None:
    """Write the merge as a folder that transformers loads: weights, the base's configuration and tokenizer, a card and
    the recipe (merge.yml). The folder appears whole or not at all. After a crash, a full disk or Ctrl-C the same call
    goes on from the weight files that were finished (see `unlearnjax.io.resumable`).

    Args:
      recipe: the YAML that the job was read from; None writes the job as YAML.
      progress: called with the number of bytes read, piece by piece.
      say: told what an earlier try has left, and what this one leaves.

    Raises:
      UserError: `out` is taken or cannot be written to; an unfinished merge of other models or settings is there; NaN
        or Inf in a model (its tensor is named).
    """

    def left(folder: Path) -> list[str]:
        statistics = [STATISTICS] if (folder / STATISTICS).exists() else []
        return statistics + written_files(folder, found, max_shard_bytes)

    def worth_keeping(folder: Path) -> bool:
        names = left(folder)
        if names:
            say(f"kept: {', '.join(names)} in {folder}; the same command goes on from there")
        return bool(names)

    with resumable_folder(out, _fingerprint(found, max_shard_bytes), worth_keeping) as staged:
        if names := left(staged):
            say(f"going on with what an earlier run has left: {', '.join(names)}")
        merge_to(staged, found, max_shard_bytes=max_shard_bytes, progress=progress)
        source = found.base.folder
        for pattern in BESIDE:
            for path in sorted(source.glob(pattern)):
                shutil.copyfile(path, staged / path.name)
        config = read_json(source / "config.json")
        if found.job.dtype is not None:
            config.pop("torch_dtype", None)
            config["dtype"] = found.job.dtype
        (staged / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        text = recipe if recipe is not None else job_yaml(found.job)
        (staged / "merge.yml").write_text(text, "utf-8")
        card = merge_card(
            title=Path(out).name, base_model=_models(found.job), method=describe(found), recipe=text, arguments=command
        )
        (staged / "README.md").write_text(card, "utf-8")
        (staged / STATISTICS).unlink(missing_ok=True)


def _fingerprint(found: Plan, max_shard_bytes: int) -> dict[str, Any]:
    """What the weight files depend on: the job, each model's files (by size and time), versions, how JAX is set."""
    files = []
    for source in (found.base, *found.models):
        paths = sorted({file.path.resolve() for file in source.files.values()})
        files.append({str(path): f"{path.stat().st_size} bytes of {path.stat().st_mtime_ns} ns" for path in paths})
    return {
        "job": job_yaml(found.job),
        "semantics": found.rule.semantics,
        "files": files,
        "max_shard_bytes": max_shard_bytes,
        "versions": {name: version(name) for name in ("unlearnjax", "jax", "jaxlib", "numpy")},
        "jax": [jax.default_backend(), str(jax.random.key_impl(jax.random.key(0)))],
    }


def describe(found: Plan) -> str:
    """One paragraph on what is merged and how."""
    merged = [t for t in found.tensors if t.settings is not None]
    count = len(found.models)
    what = f"{found.method.name} ({found.rule.semantics} semantics: {found.rule.source}) of {count} models"
    left = len(found.tensors) - len(merged)
    kept = f" {left} tensors that are not floating are the base's." if left else ""
    factor = "" if found.job.factor == 1 else f" The merged delta is multiplied by {found.job.factor:g}."
    return f"{what}, {len(merged)} tensors.{kept}{factor} Computed in float32."


def show(found: Plan) -> str:
    """The plan in lines: what goes in, what is computed, bytes and memory."""
    gb = 1e9
    lines = [f"base:    {found.base.folder}"] if found.job.base is not None else []
    lines += [f"model:   {model.folder}" for model in found.models]
    lines += [
        f"method:  {describe(found)}",
        f"read:    {found.bytes_read * found.passes / gb:.3f} GB"
        + (f" (about {found.passes} times {found.bytes_read / gb:.3f})" if found.passes > 1 else ""),
        f"written: {found.bytes_written / gb:.3f} GB",
        f"memory:  at most {found.memory / gb:.3f} GB of tensors at a time",
    ]
    return "\n".join(lines)


def job_yaml(job: Job) -> str:
    """The job as YAML."""
    import yaml

    plain: dict[str, Any] = {k: v for k, v in dataclasses.asdict(job).items() if v not in (None, {}, ())}
    plain["models"] = [{"model": x.model, **({"settings": dict(x.settings)} if x.settings else {})} for x in job.inputs]
    plain.pop("inputs")
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)


def _models(job: Job) -> list[str]:
    return list(dict.fromkeys([*([job.base] if job.base else []), *(source.model for source in job.inputs)]))
