"""Where each of our arrays lies in a family's Hugging Face checkpoint: one table per family."""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from jaxtyping import PyTree

from unlearnjax.models.abstract import ArrayInfo
from unlearnjax.models.config import ModelConfig

Path = tuple[str, ...]  # keys from the root of the parameter tree, such as ("layers", "mlp", "up", "weight")

_LINEARS: dict[Path, str] = {
    ("layers", "attention", "q", "weight"): "model.layers.{}.self_attn.q_proj.weight",
    ("layers", "attention", "k", "weight"): "model.layers.{}.self_attn.k_proj.weight",
    ("layers", "attention", "v", "weight"): "model.layers.{}.self_attn.v_proj.weight",
    ("layers", "attention", "o", "weight"): "model.layers.{}.self_attn.o_proj.weight",
    ("layers", "mlp", "gate", "weight"): "model.layers.{}.mlp.gate_proj.weight",
    ("layers", "mlp", "up", "weight"): "model.layers.{}.mlp.up_proj.weight",
    ("layers", "mlp", "down", "weight"): "model.layers.{}.mlp.down_proj.weight",
}
_ENDS: dict[Path, str] = {("embed", "weight"): "model.embed_tokens.weight", ("head", "weight"): "lm_head.weight"}
_NORMS: dict[Path, str] = {
    ("layers", "attention_norm", "scale"): "model.layers.{}.input_layernorm.weight",
    ("layers", "mlp_norm", "scale"): "model.layers.{}.post_attention_layernorm.weight",
    ("norm", "scale"): "model.norm.weight",
}

# Our path -> Hugging Face's name; {} stands for the layer's number.
NAMES: dict[str, dict[Path, str]] = {"olmo": _ENDS | _LINEARS, "llama": _ENDS | _LINEARS | _NORMS}

# In checkpoints but not parameters: buffers that older versions of transformers saved.
BUFFERS = re.compile(r"(^|\.)(rotary_emb\.inv_freq|self_attn\.(masked_)?bias)$")


class Source(NamedTuple):
    """One of our arrays and the checkpoint tensors that fill it: one per layer where `stacked`, else a single one."""

    path: Path
    info: ArrayInfo
    names: tuple[str, ...]
    stacked: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of each checkpoint tensor."""
        return self.info.shape[1:] if self.stacked else self.info.shape


def _leaves(tree: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _leaves(value, (*path, key))
    else:
        yield path, tree


def sources(config: ModelConfig, abstract: PyTree[ArrayInfo]) -> list[Source]:
    """Every parameter of the abstract tree with the names of its tensors in a Hugging Face checkpoint."""
    table = NAMES[config.family]
    found = []
    for path, info in _leaves(abstract):
        stacked = path[0] == "layers"
        names = tuple(table[path].format(i) for i in range(config.layers)) if stacked else (table[path],)
        found.append(Source(path, info, names, stacked))
    return found


def ignored(config: ModelConfig, name: str) -> bool:
    """Whether a checkpoint's tensor is none of the parameters and may be passed over."""
    return bool(BUFFERS.search(name)) or (config.tie_embeddings and name == NAMES[config.family]["head", "weight"])


def modules(config: ModelConfig) -> dict[str, str]:
    """Our linears' names -> the module's path in the family's transformers model, with {} for the layer's number.

    For example `q` -> `model.layers.{}.self_attn.q_proj`.
    """
    table = NAMES[config.family]
    blocks = {name: block for name, (block, _, _) in config.linears.items()}
    return {name: table["layers", block, name, "weight"].removesuffix(".weight") for name, block in blocks.items()}
