"""The abstract parameter tree: every array's shape, dtype, logical axes and initial scale, before a byte is loaded.

One tree serves for shapes, initialisation, loading, sharding and ahead-of-time compilation.
"""

import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from unlearnjax.models.config import ModelConfig


class ArrayInfo(NamedTuple):
    """One parameter. `axes` names each dimension (`layers vocab embed heads kv_heads mlp head_dim`)."""

    shape: tuple[int, ...]
    dtype: Any
    axes: tuple[str, ...]
    scale: float | None  # standard deviation of the normal initialiser, 0.0 for zeros; None means ones


def is_info(x: Any) -> bool:
    return isinstance(x, ArrayInfo)


def abstract_params(config: ModelConfig, dtype: Any = jnp.float32) -> PyTree[ArrayInfo]:
    """The parameter tree of a decoder. Linears keep Hugging Face's orientation [out, in], stacked over layers."""
    d, layers = config.hidden_size, config.layers
    neutral = 0.0 if config.norm == "rms_offset" else None
    axis_of = {"q": "heads", "k": "kv_heads", "v": "kv_heads", "o": "heads", "gate": "mlp", "up": "mlp", "down": "mlp"}
    blocks: dict[str, Any] = {"attention": {}, "mlp": {}}
    for name, (block, out, inner) in config.linears.items():
        wide = axis_of[name]
        axes = ("layers", "embed", wide) if name in ("o", "down") else ("layers", wide, "embed")
        blocks[block][name] = {"weight": ArrayInfo((layers, out, inner), dtype, axes, inner**-0.5)}
        if config.qkv_bias and name in ("q", "k", "v"):
            blocks[block][name]["bias"] = ArrayInfo((layers, out), dtype, ("layers", wide), 0.0)
        if config.qk_norm is not None and name in ("q", "k"):
            size, axis = (out, wide) if config.qk_norm == "whole" else (config.head_dim, "head_dim")
            blocks[block][f"{name}_norm"] = {"scale": ArrayInfo((layers, size), dtype, ("layers", axis), neutral)}
    tree: dict[str, Any] = {
        "embed": {"weight": ArrayInfo((config.vocab_size, d), dtype, ("vocab", "embed"), 0.02)},
        "layers": blocks,
    }
    if config.norm != "layer":
        kinds = {"before": ("norm",), "after": ("post_norm",), "around": ("norm", "post_norm")}[config.norms]
        for norm in (f"{block}_{kind}" for kind in kinds for block in ("attention", "mlp")):
            blocks[norm] = {"scale": ArrayInfo((layers, d), dtype, ("layers", "embed"), neutral)}
        tree["norm"] = {"scale": ArrayInfo((d,), dtype, ("embed",), neutral)}
    if not config.tie_embeddings:
        tree["head"] = {"weight": ArrayInfo((config.vocab_size, d), dtype, ("vocab", "embed"), d**-0.5)}
    return tree


def shapes(tree: PyTree[ArrayInfo]) -> PyTree[jax.ShapeDtypeStruct]:
    """The tree as jax.ShapeDtypeStruct, for jax.eval_shape and ahead-of-time compilation."""
    return jax.tree.map(lambda i: jax.ShapeDtypeStruct(i.shape, i.dtype), tree, is_leaf=is_info)


def logical_axes(tree: PyTree[ArrayInfo]) -> PyTree[tuple[str, ...]]:
    """The tree of axis names; each leaf is a tuple with one name per dimension."""
    return jax.tree.map(lambda i: i.axes, tree, is_leaf=is_info)


def weight_bytes(config: ModelConfig, dtype: str) -> int:
    """What the decoder's parameters take."""
    leaves = jax.tree.leaves(shapes(abstract_params(config, jnp.dtype(dtype))))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def name_key(key: Array, name: str) -> Array:
    """A key that depends on a parameter's name and on nothing else of the tree."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()) & 0x7FFFFFFF)


def init_params(tree: PyTree[ArrayInfo], key: Array) -> PyTree[Array]:
    """Random parameters. Each leaf's numbers depend only on `key` and the leaf's path."""

    def leaf(path: Any, info: ArrayInfo) -> Array:
        if info.scale is None:
            return jnp.ones(info.shape, info.dtype)
        noise = jax.random.normal(name_key(key, jax.tree_util.keystr(path)), info.shape, jnp.float32)
        return (noise * info.scale).astype(info.dtype)

    return jax.tree_util.tree_map_with_path(leaf, tree, is_leaf=is_info)
