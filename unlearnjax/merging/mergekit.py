"""mergekit's YAML, the part of it that merges whole models: read into a `Job`, everything else refused by its name."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unlearnjax.errors import UserError, check_known, nearest
from unlearnjax.merging.api import methods
from unlearnjax.merging.job import Input, Job

KEYS = ("models", "merge_method", "base_model", "parameters", "dtype", "out_dtype", "tokenizer_source")
REFUSED = {
    "slices": "list whole models under models",
    "modules": "list whole models under models",
    "tokenizer": "the base model's tokenizer is kept",
    "chat_template": "the base model's is kept",
}
WEIGHTED = ("linear", "task_arithmetic", "ties", "dare_linear", "dare_ties", "della", "della_linear", "breadcrumbs",
            "breadcrumbs_ties", "nuslerp", "multislerp")  # fmt: skip
MODELS_THEMSELVES = ("linear", "karcher", "passthrough")  # the base model, if one is named, is one of them
IGNORED = ("int8_mask",)  # how mergekit saves memory: it changes no result


def load_mergekit(path: str | Path) -> Job:
    """Read a merge configuration.

    mergekit's own semantics and defaults hold (density 1, weights required where it requires them); a method that
    mergekit lacks has ours. Everything is computed in float32, whatever `dtype` says; the result has `out_dtype`, or
    else `dtype`.

    Raises:
      UserError: no such file, broken YAML, or a key, method, parameter or model reference that is not supported (named,
        with what to do).
    """
    import yaml

    try:
        raw = yaml.safe_load(Path(path).expanduser().read_text("utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: broken YAML: {' '.join(str(error).split())}") from None
    return parse_mergekit(raw, str(path))


def parse_mergekit(raw: Any, where: str) -> Job:
    """`load_mergekit` for plain data; `where` names it in errors."""
    if not isinstance(raw, Mapping):
        raise UserError(f"{where}: must be a mapping with merge_method and models")
    for key, instead in REFUSED.items():
        if raw.get(key) is not None:
            raise UserError(f"{where}: {key} is not supported; {instead}")
    check_known(raw, KEYS, "key", where)
    if raw.get("tokenizer_source") not in (None, "base"):
        raise UserError(f"{where}: tokenizer_source {raw['tokenizer_source']!r} is not supported; only base is")
    known = methods()
    if raw.get("merge_method") not in known:
        raise UserError(
            f"{where}: unknown merge_method {raw.get('merge_method')!r}{nearest(str(raw.get('merge_method')), known)}"
        )
    method = known[raw["merge_method"]]
    semantics = "mergekit" if "mergekit" in method.semantics else None
    base = raw.get("base_model")
    listed = raw.get("models")
    if not isinstance(listed, list) or not listed:
        raise UserError(f"{where}: models must be a list of models to merge")
    inputs = [_input(entry, f"{where}: model {i}") for i, entry in enumerate(listed, start=1)]
    if base is not None:
        _check_reference(base, f"{where}: base_model")
    own = method.rule(semantics).hyperparameters
    names = {p.name for p in own} | {"weight"} | set(IGNORED)
    settings = _parameters(raw.get("parameters"), names, where)
    for source in inputs:
        check_known(source.settings, names, "parameter", f"{where}: {source.model}")
    if method.name == "slerp":
        inputs, base = _slerp(inputs, base, where)
    elif method.name not in MODELS_THEMSELVES:
        inputs = [source for source in inputs if source.model != base]
    for source in inputs:
        if method.name in WEIGHTED and "weight" not in settings and "weight" not in source.settings:
            raise UserError(f"{where}: {source.model} has no weight, which {method.name} needs")
    defaults: dict[str, Any] = {"density": 1.0} if "density" in names else {}
    if "origin" in names and method.name != "slerp":
        defaults["origin"] = "base" if base is not None and method.name not in MODELS_THEMSELVES else "zero"
    return Job(
        method.name, tuple(inputs), base=base, semantics=semantics,
        settings={k: v for k, v in settings.items() if k not in IGNORED}, defaults=defaults,
        dtype=raw.get("out_dtype") or raw.get("dtype"),
    )  # fmt: skip


def _parameters(raw: Any, names: set[str], where: str) -> dict[str, Any]:
    if raw is None:
        return {}
    if not isinstance(raw, Mapping):
        raise UserError(f"{where}: parameters must be a mapping")
    check_known(raw, names, "parameter", where)
    return dict(raw)


def _input(raw: Any, where: str) -> Input:
    if not isinstance(raw, Mapping):
        raise UserError(f"{where}: must be a mapping with the key model")
    check_known(raw, ("model", "parameters"), "key", where)
    _check_reference(raw.get("model"), where)
    settings = raw.get("parameters") or {}
    if not isinstance(settings, Mapping):
        raise UserError(f"{where}: parameters must be a mapping")
    return Input(raw["model"], {k: v for k, v in settings.items() if k not in IGNORED})


def _check_reference(raw: Any, where: str) -> None:
    if not isinstance(raw, str) or not raw:
        raise UserError(f"{where}: must be a folder or hub id, not {raw!r}")
    if "+" in raw and not Path(raw).expanduser().exists():
        raise UserError(f"{where}: {raw!r}: a model with an adapter on it is not supported; merge the adapters instead")


def _slerp(inputs: list[Input], base: str | None, where: str) -> tuple[list[Input], str]:
    """mergekit's goes from the base model, which is one of the two, to the other."""
    if base is None or len(inputs) != 2 or base not in [source.model for source in inputs]:
        raise UserError(f"{where}: slerp needs two models, of which base_model is one")
    first, second = sorted(inputs, key=lambda source: source.model != base)
    return [first, second], base
