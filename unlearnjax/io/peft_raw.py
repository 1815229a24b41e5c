"""LoRA adapters by the names of their modules, without the model they belong to: for merging adapters with adapters."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32

from unlearnjax.errors import UserError
from unlearnjax.io.huggingface import read_json
from unlearnjax.io.peft import CONFIG, WEIGHTS, check_adapter_config, factor_key, modules_of, open_weights
from unlearnjax.io.safetensors import Entry, write_file

PATTERNS = ("rank_pattern", "alpha_pattern")


class Module(NamedTuple):
    """One module's factors and scale: its weight changes by scale * b @ a."""

    a: Float32[np.ndarray, "r in"]
    b: Float32[np.ndarray, "out r"]
    scale: float


class RawAdapter(NamedTuple):
    """An adapter as its files have it."""

    folder: Path
    config: dict[str, Any]
    modules: dict[str, Module]


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter rather than a model."""
    return (folder / CONFIG).is_file()


def read_adapter(folder: str | Path) -> RawAdapter:
    """Read a plain LoRA adapter that PEFT wrote, rank and alpha patterns and rank-stabilised scaling included.

    Raises:
      UserError: missing, broken or pickled files; anything but plain LoRA (DoRA, biases, modules_to_save, ...), each by
        its name; factors that do not fit each other or their rank; NaN or Inf.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    path = folder / CONFIG
    config = read_json(path)
    check_adapter_config({k: v for k, v in config.items() if k not in PATTERNS}, path)
    file = open_weights(folder)
    found = {}
    for module in sorted(modules_of(file)):
        a, b = (file.read(factor_key(module, factor)) for factor in "AB")
        rank = _by_pattern(config.get("rank_pattern"), module, config.get("r", 8))
        if a.ndim != 2 or b.ndim != 2 or not a.shape[0] == b.shape[1] == rank:
            shapes = f"{list(a.shape)} and {list(b.shape)}"
            raise UserError(f"{file.path}: the factors of {module!r} are {shapes}, and its rank is {rank}")
        alpha = _by_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", 8))
        if type(alpha) not in (int, float) or not math.isfinite(alpha):
            raise UserError(f"{path}: the alpha of {module!r} must be a number, not {alpha!r}")
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        a, b = a.astype(np.float32), b.astype(np.float32)
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            raise UserError(f"{file.path}: the factors of {module!r} hold NaN or Inf; leave that adapter out")
        found[module] = Module(a, b, scale)
    if not found:
        raise UserError(f"{file.path}: holds no adapter")
    return RawAdapter(folder, config, found)


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that the module's name ends with, as a regular expression."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def write_adapter(folder: Path, like: RawAdapter, modules: Mapping[str, Module], card_text: str) -> None:
    """Write an adapter of scale 1 into an existing folder (stage it), its configuration that of `like` but for the
    ranks."""
    ranks = {name: module.a.shape[0] for name, module in modules.items()}
    rank = max(ranks.values())
    other = {name: r for name, r in ranks.items() if r != rank}
    config = like.config | {
        "r": rank, "lora_alpha": rank, "rank_pattern": {re.escape(name): r for name, r in other.items()},
        "alpha_pattern": {re.escape(name): r for name, r in other.items()}, "use_rslora": False, "lora_dropout": 0.0,
        "inference_mode": True,
    }  # fmt: skip
    entries = [
        Entry(factor_key(name, factor), value.shape, value.dtype, value)
        for name, module in modules.items()
        for factor, value in (("A", module.a), ("B", module.b * np.float32(module.scale)))
    ]
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    write_file(folder / WEIGHTS, entries)
    (folder / "README.md").write_text(card_text, "utf-8")
