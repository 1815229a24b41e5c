"""LoRA adapters as PEFT stores them: adapter_config.json and adapter_model.safetensors, in and out.

Where a family's checkpoints have several of our linears in one (Phi-3's qkv_proj), so has the adapter: written, its A
is ours one below the other and its B block-diagonal, of the sum of their ranks; read, each of ours has the common A and
its own rows of B. Both are exact.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from unlearnjax.distributed.processes import fetch, follows
from unlearnjax.errors import UserError, check_known
from unlearnjax.io.atomic import staged_folder
from unlearnjax.io.card import model_card
from unlearnjax.io.huggingface import aligned_empty, read_json
from unlearnjax.io.safetensors import PICKLED, Entry, TensorFile, open_file, write_file
from unlearnjax.models.config import ModelConfig
from unlearnjax.models.families import fused_rows, modules

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_ROOT = "base_model.model."  # PEFT's wrapper around the transformers model
_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")
_PEFT_VERSION = "0.21.2"  # the version whose files these are

# Keys that change what the adapter computes, with the value that changes nothing. Each other value is refused.
_PLAIN: dict[str, Any] = {
    "bias": "none",
    "fan_in_fan_out": False,
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "use_dora": False,
    "megatron_core": "megatron.core",  # a module's name, only used with megatron_config
    "qalora_group_size": 16,  # only used with use_qalora
}
# Keys whose value is read here or has no effect on a loaded adapter.
_READ = {
    "peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode",
    "peft_version", "r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "exclude_modules",
    "layers_to_transform", "layers_pattern", "init_lora_weights", "runtime_config",
}  # fmt: skip
# Ways to initialise that leave the base model's weights alone. The others (pissa, olora, loftq, corda, ...) train
# against a base they have changed, so that their factors mean nothing on the original.
_SAFE_INITS = (True, False, None, "gaussian", "eva", "orthogonal")


class LoadedAdapter(NamedTuple):
    """An adapter read from disk: the weight change of a linear is (alpha / rank) * b @ a."""

    lora: PyTree[Array]  # {"layers": {block: {name: {"a": [L, r, in], "b": [L, out, r]}}}}, float32
    alpha: float
    rank: int
    targets: tuple[str, ...]  # among q k v o gate up down


def save_adapter(
    folder: str | Path,
    lora: PyTree[Array],
    *,
    config: ModelConfig,
    rank: int,
    alpha: float,
    base_model: str,
    targets: Sequence[str],
    dropout: float = 0.0,
    card_text: str | None = None,
) -> None:
    """Write one candidate's adapter as a folder that `peft` loads unchanged. It appears whole or not at all. Of a job's
    processes, which must all call this, the first writes.

    With n targets in one fused module, all modules get rank n * rank (zeros where they need less) and alpha n * alpha.

    Args:
      folder: a new or empty folder.
      lora: {"layers": {block: {name: {"a": [L, r, in], "b": [L, out, r]}}}}, r >= rank. What lies beyond `rank` is
        padding and is cut off.
      rank, alpha: the adapter's own; PEFT scales b @ a by alpha / rank.
      base_model: the folder or hub id that the adapter belongs to, written into the files.
      targets: the linears it changes, among q k v o gate up down.
      dropout: what it was trained with; no effect on the loaded adapter.
      card_text: README.md, or None for a short default.

    Raises:
      UserError: the folder is taken, an unknown target, or a rank larger than the factors have.
      ValueError: the part beyond `rank` is not padding (its product b @ a is not zero).
    """
    check_known(targets, config.linears, "linear", "targets")
    where = modules(config)
    groups: dict[str, list[str]] = {}
    for name in (n for n in config.linears if n in targets):
        groups.setdefault(where[name], []).append(name)
    joined = max((len(names) for names in groups.values()), default=1)
    entries = []
    for pattern, names in groups.items():
        pairs = {name: _factors(folder, lora, config, name, rank) for name in names}
        a, b = _join(config, pairs, rank, rank * joined)
        for layer in range(config.layers):
            for factor, value in (("A", a[layer]), ("B", b[layer])):
                key = factor_key(pattern.format(layer), factor)
                entries.append(Entry(key, value.shape, value.dtype, value))
    if follows():
        return
    rank, alpha = rank * joined, alpha * joined
    raw: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "revision": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else float(alpha),
        "lora_dropout": float(dropout),
        "target_modules": [pattern.rsplit(".", 1)[1] for pattern in groups],
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": False,
        "use_dora": False,
        "peft_version": _PEFT_VERSION,
    }
    if card_text is None:
        card_text = model_card(title=Path(folder).name, base_model=base_model, library="peft")
    with staged_folder(folder) as staged:
        (staged / CONFIG).write_text(json.dumps(raw, indent=2) + "\n", "utf-8")
        write_file(staged / WEIGHTS, entries)
        (staged / "README.md").write_text(card_text, "utf-8")


def _factors(
    folder: str | Path, lora: PyTree[Array], config: ModelConfig, name: str, rank: int
) -> tuple[np.ndarray, np.ndarray]:
    """One linear's factors cut to `rank`, float32."""
    pair = fetch(lora["layers"][config.linears[name][0]][name])
    a, b = (np.asarray(pair[factor], np.float32) for factor in "ab")
    if not 0 < rank <= a.shape[1]:
        raise UserError(f"{folder}: rank {rank} does not fit factors of rank {a.shape[1]}")
    if np.any(b[:, :, rank:] @ a[:, rank:]):
        raise ValueError(f"{name}: the factors go on beyond rank {rank}, so cutting them would change the adapter")
    return a[:, :rank], b[:, :, :rank]


def _join(
    config: ModelConfig, pairs: Mapping[str, tuple[np.ndarray, np.ndarray]], rank: int, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """The factors of one module from those of the linears in it, of rank `width`."""
    first = next(iter(pairs))
    out, inner = config.linears[first][1:]
    rows = fused_rows(config, first)
    a = np.zeros((config.layers, width, inner), np.float32)
    b = np.zeros((config.layers, out if rows is None else rows[2], width), np.float32)
    for at, (name, (own_a, own_b)) in enumerate(pairs.items()):
        columns = slice(at * rank, (at + 1) * rank)
        start, stop, _ = fused_rows(config, name) or (0, out, out)
        a[:, columns], b[:, start:stop, columns] = own_a, own_b
    return a, b


def factor_key(module: str, factor: str) -> str:
    """The tensor's name of one factor, A or B."""
    return f"{_ROOT}{module}.lora_{factor}.weight"


def check_adapter_config(raw: Mapping[str, Any], path: Path) -> None:
    """Raise `UserError` for what is not a plain LoRA adapter, by its name."""
    if raw.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type {raw.get('peft_type')!r} is not supported; supported: LORA")
    for key, value in raw.items():
        # Keys of other versions of PEFT are harmless while they say nothing.
        plain = _PLAIN.get(key)
        if key in _READ or value == plain or (not value and not plain):
            continue
        raise UserError(f"{path}: {key} = {json.dumps(value)} is not supported; only plain LoRA adapters are")
    inits = raw.get("init_lora_weights", True)
    if inits not in _SAFE_INITS:
        raise UserError(
            f"{path}: init_lora_weights = {inits!r} changes the base model's weights and is not supported; convert the "
            "adapter with PEFT (save_pretrained with path_initial_model_for_weight_conversion)"
        )


def _matches(raw: Mapping[str, Any], module: str) -> bool:
    """Whether the configuration asks for an adapter on a linear of the layers, by PEFT's rules."""

    def named(names: Sequence[str]) -> bool:
        return any(module == n or module.endswith("." + n) for n in names)

    target, exclude = raw.get("target_modules"), raw.get("exclude_modules")
    if exclude and (re.fullmatch(exclude, module) if isinstance(exclude, str) else named(exclude)):
        return False
    if target == "all-linear":
        return True
    if isinstance(target, str):
        return re.fullmatch(target, module) is not None
    if not named(target or ()):
        return False
    layers, patterns = raw.get("layers_to_transform"), raw.get("layers_pattern") or [r"[^.]*"]
    if layers is None or layers == []:
        return True
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        found = re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", module)
        if found:
            return int(found[1]) in ([layers] if isinstance(layers, int) else layers)
    return False


def open_weights(folder: Path) -> TensorFile:
    if not (folder / WEIGHTS).exists():
        pickled = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLED)
        if pickled:
            raise UserError(
                f"{folder / pickled[0]}: pickled weights can run code when loaded and are refused; if you trust them "
                'convert them once in that folder: python -c "import torch, safetensors.torch as s; '
                f"s.save_file(torch.load('{pickled[0]}', weights_only=True), '{WEIGHTS}')\""
            )
        raise UserError(f"{folder}: holds no {WEIGHTS}; give a folder that PEFT saved")
    return open_file(folder / WEIGHTS)


def modules_of(file: TensorFile) -> Iterator[str]:
    """The modules that the file has both factors of; anything else in the file is refused by its name."""
    for name in file.slots:
        found = _KEY.fullmatch(name)
        if found is None:
            raise UserError(f"{file.path}: tensor {name!r} is no factor of a plain LoRA adapter and is not supported")
        other = factor_key(found["module"], "B" if found["factor"] == "A" else "A")
        if other not in file.slots:
            raise UserError(f"{file.path}: tensor {other!r} is missing beside {name!r}")
        if found["factor"] == "A":
            yield found["module"]


def load_adapter(folder: str | Path, config: ModelConfig) -> LoadedAdapter:
    """Read a LoRA adapter that PEFT (or `save_adapter`) wrote.

    Rank-stabilised scaling (alpha / sqrt(rank), 2312.03732) is turned into the equivalent alpha. Layers that the
    configuration leaves out get zero factors, which change nothing.

    Args:
      folder: holds adapter_config.json and adapter_model.safetensors.
      config: the base model's.

    Raises:
      UserError: missing, broken or pickled files; anything but plain LoRA on the layers' linears (DoRA, biases,
        modules_to_save, rank or alpha patterns, embeddings, the head, ...), each by its name; factors that are
        missing, or of another shape than the base model's.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    path = folder / CONFIG
    raw = read_json(path)
    check_adapter_config(raw, path)
    alpha = raw.get("lora_alpha", 8)
    if type(alpha) not in (int, float) or not math.isfinite(alpha):
        raise UserError(f"{path}: lora_alpha must be a number, not {alpha!r}")
    rank = raw.get("r", 8)
    if type(rank) is not int or rank < 1:
        raise UserError(f"{path}: r must be a whole number of at least 1, not {rank!r}")
    file = open_weights(folder)
    where = modules(config)
    ours = {pattern.format(i) for pattern in where.values() for i in range(config.layers)}
    present = set(modules_of(file))
    for module in sorted(present - ours):
        raise UserError(
            f"{file.path}: changes module {module!r}, which is not supported; supported in each layer: "
            + ", ".join(dict.fromkeys(p.rsplit(".", 1)[1] for p in where.values()))
        )
    wanted = {module for module in ours if _matches(raw, module)}
    for module in sorted(wanted ^ present):
        what = "is missing, though" if module in wanted else "is there, though not among what"
        raise UserError(f"{file.path}: the adapter of {module!r} {what} {CONFIG} asks for")
    if not present:
        raise UserError(f"{path}: target_modules {raw.get('target_modules')!r} name no linear of the model")
    targets = tuple(n for n in config.linears if any(where[n].format(i) in present for i in range(config.layers)))
    lora: dict[str, Any] = {}
    for name in targets:
        block, out, inner = config.linears[name]
        start, stop, rows = fused_rows(config, name) or (0, out, out)
        lora.setdefault(block, {})[name] = {
            "a": _stack(file, config, name, "A", (rank, inner)),
            "b": _stack(file, config, name, "B", (rows, rank))[:, start:stop],
        }
    # With alpha * sqrt(r) in alpha's place, alpha / r is the alpha / sqrt(r) that was meant.
    effective = alpha * math.sqrt(rank) if raw.get("use_rslora") else float(alpha)
    return LoadedAdapter({"layers": lora}, effective, rank, targets)


def _stack(
    file: TensorFile, config: ModelConfig, name: str, factor: str, shape: tuple[int, int]
) -> Float[Array, "layers rows columns"]:
    stacked = aligned_empty((config.layers, *shape), jnp.float32)
    for layer in range(config.layers):
        key = factor_key(modules(config)[name].format(layer), factor)
        if key not in file.slots:
            stacked[layer] = 0.0
            continue
        if file.slots[key].shape != shape:
            raise UserError(
                f"{file.path}: tensor {key!r} has shape {list(file.slots[key].shape)}, the base model and {CONFIG} "
                f"ask for {list(shape)}"
            )
        stacked[layer] = file.read(key)
    return jax.device_put(stacked)
