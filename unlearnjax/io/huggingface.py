"""Hugging Face model folders: safetensors straight into stacked arrays, and back, without torch."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from unlearnjax.distributed.processes import fetch
from unlearnjax.errors import UserError, nearest
from unlearnjax.io.atomic import staged_folder
from unlearnjax.io.safetensors import Checkpoint, Entry, conversion, open_folder, write_sharded
from unlearnjax.io.sharded import load_on
from unlearnjax.models.abstract import abstract_params
from unlearnjax.models.config import ModelConfig
from unlearnjax.models.config_json import config_from_hf, config_to_hf
from unlearnjax.models.families import Source, ignored, sources

DTYPES: dict[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
# What a hub download fetches: never pickled weights, code, or the other formats a repository keeps in subfolders.
PATTERNS = ("model*.safetensors", "*.json", "tokenizer*", "*.model", "*.txt", "*.jinja")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_ALIGNMENT = 64  # what jax asks of a numpy array to use it on CPU in place


def check_dtype(name: str) -> np.dtype:
    """The numpy dtype called `name`: float32, bfloat16 or float16.

    Raises:
      UserError: another name.
    """
    if name not in DTYPES:
        raise UserError(f"dtype {name!r} is not supported for weights{nearest(str(name), DTYPES)}")
    return DTYPES[name]


def resolve(model: str | Path) -> Path:
    """The folder of a model: `model` itself, or the local copy of a hub repository (downloaded where needed).

    Raises:
      UserError: neither a folder nor a hub id that can be fetched (offline, unknown, private, pickled weights only).
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"{model}: is a file; give the model's folder")
    if not _HUB_ID.fullmatch(str(model)):
        raise UserError(f"{model}: no such folder")
    path = _fetched(model, PATTERNS)
    if not any(path.glob("*.safetensors")):
        target = f"{str(model).replace('/', '-')}-safetensors"
        raise UserError(
            f"{model}: the hub has no safetensors weights of it, and pickled ones, which can run code when loaded, are "
            f"refused; if you trust them convert them once: {conversion(str(model), target)}"
        )
    return path


def resolve_config(model: str | Path) -> Path:
    """As `resolve`, but of a hub repository only its configuration is fetched.

    Raises:
      UserError: neither a folder nor a hub id that can be fetched.
    """
    if Path(model).expanduser().exists() or not _HUB_ID.fullmatch(str(model)):
        return resolve(model)
    return _fetched(model, ("config.json", "generation_config.json"))


def _fetched(model: str | Path, patterns: Sequence[str]) -> Path:
    """The local copy of a hub repository's files of these names."""
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(str(model), allow_patterns=list(patterns), ignore_patterns=["*/*"]))
    except Exception as error:  # the hub client raises many kinds: network, permission, unknown names
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{model}: no such folder here, and not to be had from the hub ({lines[0]})") from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
      UserError: no such file, broken JSON (with its line), or something other than an object.
    """
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give the folder that holds it") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: broken JSON at line {error.lineno}, column {error.colno}: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: broken JSON: {str(error).splitlines()[0]}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: must hold a JSON object")
    return value


def load_config(folder: str | Path) -> ModelConfig:
    """The sizes in a model folder's config.json (and, for the end tokens, its generation_config.json).

    Raises:
      UserError: no or broken config.json, or a model that is not supported (see `config_from_hf`).
    """
    path = Path(folder) / "config.json"
    raw = read_json(path)
    generation = Path(folder) / "generation_config.json"
    if generation.exists():
        # What `generate` of transformers stops at; chat models list more end tokens here than in config.json.
        ends = read_json(generation).get("eos_token_id")
        raw = raw if ends is None else raw | {"eos_token_id": ends}
    return config_from_hf(raw, str(path))


def load_tokenizer(folder: str | Path) -> Any:
    """The folder's transformers tokenizer, or None when the folder has none of a tokenizer's files.

    Raises:
      UserError: tokenizer files that transformers cannot load, or that need code from the folder to be run.
    """
    folder = Path(folder)
    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises whatever the broken file led to
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{folder}: its tokenizer cannot be loaded ({lines[0]})") from None


def aligned_empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An uninitialised array that starts on a 64-byte boundary, so that jax can use it on CPU without a copy."""
    dtype = np.dtype(dtype)
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def _check(checkpoint: Checkpoint, config: ModelConfig, wanted: list[Source]) -> None:
    """Compare the checkpoint's names and shapes with the abstract tree before anything is read."""
    expected = {name: source for source in wanted for name in source.names}
    missing = [name for name in expected if name not in checkpoint.files]
    if missing:
        raise UserError(f"{checkpoint.folder}: {_several(missing)} missing, though config.json describes such a model")
    for name, source in expected.items():
        path, shape = checkpoint.files[name].path, checkpoint.shape(name)
        if shape != source.shape:
            raise UserError(f"{path}: tensor {name!r} has shape {list(shape)}, config.json says {list(source.shape)}")
        if checkpoint.dtype(name) not in (*DTYPES.values(), np.float64):
            raise UserError(
                f"{path}: tensor {name!r} has dtype {checkpoint.dtype(name)}; quantized weights are not supported, "
                "give the model in float32, bfloat16 or float16"
            )
    unexpected = [n for n in checkpoint.files if n not in expected and not ignored(config, n)]
    if unexpected:
        raise UserError(f"{checkpoint.folder}: {_several(unexpected)} unexpected, config.json describes no such tensor")


def _several(names: list[str]) -> str:
    if len(names) == 1:
        return f"tensor {names[0]!r} is"
    return f"{len(names)} tensors ({', '.join(map(repr, names[:3]))}{', ...' if len(names) > 3 else ''}) are"


def load_params(
    folder: str | Path, config: ModelConfig, dtype: str = "float32", mesh: Mesh | None = None
) -> PyTree[Array]:
    """A model folder's weights as the decoder's parameter tree, on jax's default device or on a mesh.

    Each array is filled layer by layer from the mapped files, so no more than one of our (layer-stacked) arrays is
    ever held twice; on CPU jax takes the filled buffer as it is.

    Args:
      folder: safetensors weights, single or sharded, in any float dtype.
      config: the folder's config (`load_config`).
      dtype: the dtype of the result: float32, bfloat16 or float16.
      mesh: lay the arrays on it; each process then reads its own devices' parts alone.

    Raises:
      UserError: an unknown dtype, a broken or pickled checkpoint (see `safetensors.open_folder`), missing or
        unexpected tensors, or a tensor of another shape than the config says.
    """
    kind = check_dtype(dtype)
    checkpoint = open_folder(folder)
    wanted = sources(config, abstract_params(config, kind))
    _check(checkpoint, config, wanted)
    params: dict[str, Any] = {}
    if mesh is not None:
        for source, array in zip(wanted, load_on(mesh, checkpoint, wanted), strict=True):
            _set(params, source.path, array)
        return params
    for source in wanted:
        buffer = aligned_empty(source.info.shape, kind)
        for index, name in enumerate(source.names):
            part = buffer[index] if source.stacked else buffer
            tensor = checkpoint.read(name)
            part[...] = tensor if source.rows is None else tensor[source.rows[0] : source.rows[1]]
        _set(params, source.path, jax.device_put(buffer))
    return params


def _set(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value


def _get(tree: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def _entries(params: PyTree[Array], config: ModelConfig, dtype: np.dtype) -> Iterator[Entry]:
    def entry(leaves: list[Any], name: str, shape: tuple[int, ...], index: int | None) -> Entry:
        def value() -> np.ndarray:
            # One layer leaves the device at a time, never the whole stack.
            parts = [np.asarray(fetch(leaf if index is None else leaf[index])) for leaf in leaves]
            return (parts[0] if len(parts) == 1 else np.concatenate(parts)).astype(dtype, copy=False)

        return Entry(name, shape, dtype, value)

    # Linears that are one tensor in the checkpoint come together, in the order of their rows.
    tensors: dict[tuple[str, ...], list[Source]] = {}
    for source in sources(config, abstract_params(config, dtype)):
        tensors.setdefault(source.names, []).append(source)
    for names, parts in tensors.items():
        leaves = [_get(params, s.path) for s in sorted(parts, key=lambda s: s.rows or (0, 0, 0))]
        for index, name in enumerate(names):
            yield entry(leaves, name, parts[0].shape, index if parts[0].stacked else None)


def save_folder(
    params: PyTree[Array],
    config: ModelConfig,
    folder: str | Path,
    tokenizer: Any = None,
    dtype: str | None = None,
    card_text: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write a folder that transformers loads: config, generation config, safetensors, tokenizer and README.md.

    The folder appears whole or not at all.

    Args:
      params: the decoder's parameter tree.
      folder: a new or empty folder.
      tokenizer: a transformers tokenizer, or None to write none.
      dtype: the dtype on disk, by default that of the embeddings.
      card_text: README.md (see `unlearnjax.io.card`), or None to write none.
      max_shard_bytes: the largest size of a weight file.

    Raises:
      UserError: the folder is taken, or an unknown dtype.
    """
    dtype = str(params["embed"]["weight"].dtype) if dtype is None else dtype
    kind = check_dtype(dtype)
    raw = config_to_hf(config, dtype)
    if tokenizer is not None:
        raw["bos_token_id"] = tokenizer.bos_token_id
    generation = {"_from_model_config": True} | {k: raw[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
    with staged_folder(folder) as staged:
        for name, content in (("config.json", raw), ("generation_config.json", generation)):
            (staged / name).write_text(json.dumps(content, indent=2) + "\n", "utf-8")
        write_sharded(staged, _entries(params, config, kind), max_shard_bytes)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(staged))
        if card_text is not None:
            (staged / "README.md").write_text(card_text, "utf-8")
