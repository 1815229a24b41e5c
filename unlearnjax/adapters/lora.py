"""Low-rank adapters (LoRA, 2106.09685, section 4.1): W + (alpha / rank) B A on the chosen linears of every layer.

Candidates of different ranks share one program: arrays are padded to the largest rank, and the padding, zero in both
factors, gets no gradient and stays zero.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from unlearnjax.adapters.protocol import Adapter
from unlearnjax.errors import UserError, check_known
from unlearnjax.models.abstract import name_key
from unlearnjax.models.config import ModelConfig
from unlearnjax.models.decoder import layer_of
from unlearnjax.models.protocol import Variables
from unlearnjax.training.hyperparameters import Hyperparameters


def resolve_targets(targets: str | Sequence[str], config: ModelConfig, where: str = "adapter") -> tuple[str, ...]:
    """`all` or names of linears (`q`, or Hugging Face's `q_proj`) to ours, in the layer's order.

    The name of a linear that the family fuses (Phi-3's `qkv_proj`) stands for all that it holds.

    Raises:
      UserError: an unknown name; the output and input embeddings are not linears of a layer and are refused.
    """
    if isinstance(targets, str):
        targets = list(config.linears) if targets in ("all", "all-linear") else [targets]
    short = [t.removesuffix("_proj") for t in targets]
    names = [name for t in short for name in config.fused.get(t, (t,))]
    for name in names:
        if name in ("lm_head", "embed_tokens", "head", "embed"):
            raise UserError(f"{where}: a LoRA on {name!r} is not supported; choose among {', '.join(config.linears)}")
    check_known(names, config.linears, "linear", where)
    if not names:
        raise UserError(f"{where}: no linear is targeted; choose among {', '.join(config.linears)}, or all")
    return tuple(n for n in config.linears if n in names)


def check_layers(layers: Sequence[int], total: int, where: str = "adapter") -> list[int]:
    """Layers in their order.

    Raises:
      UserError: no layer, one that a model of `total` layers does not have, or one given twice.
    """
    if not layers:
        raise UserError(f"{where}: layers names no layer; give at least one")
    for layer in layers:
        if not 0 <= layer < total:
            raise UserError(f"{where}: layer {layer} of a model with {total}; give 0 to {total - 1}")
    if len(set(layers)) < len(layers):
        raise UserError(f"{where}: layers names a layer twice: {', '.join(map(str, layers))}")
    return sorted(layers)


def lora(config: ModelConfig, targets: Sequence[str], rank: int, layers: Sequence[int] | None = None) -> Adapter:
    """A LoRA adapter.

    Args:
      config: the decoder's sizes. targets: linears as `resolve_targets` gives them. rank: the largest candidate's.
      layers: which have one, counted from 0 (`check_layers`); None: all.

    The trainable tree is {"layers": {block: {linear: {"a": [L, rank, in], "b": [L, out, rank]}}}}, L the number of
    adapted layers. A starts uniform in +-1/sqrt(in) (PEFT's default: Kaiming with a = sqrt 5), B at zero. Row j of A
    depends on the seed, the linear, the layer and j alone, so that a candidate does not change with the others' ranks.

    With `layers`, `apply` gives layers taken apart, for a model whose layers are unrolled: there is no backward pass
    below the lowest adapted one.
    """
    rows = None if layers is None else np.asarray(check_layers(layers, config.layers), np.int32)

    def init(key: Array, params: PyTree, h: Hyperparameters) -> PyTree:
        tree: dict[str, dict[str, dict[str, Array]]] = {}
        for name in targets:
            block, out, inner = config.linears[name]
            own_key = name_key(key, name)
            row_keys = jax.vmap(lambda j, k=own_key: jax.random.fold_in(k, j))(jnp.arange(rank))
            bound = inner**-0.5
            draw = lambda k, n=inner, b=bound: jax.random.uniform(k, (config.layers, n), jnp.float32, -b, b)  # noqa: E731
            a = jax.vmap(draw, out_axes=1)(row_keys)
            a = a if rows is None else a[rows]
            live = jnp.arange(rank, dtype=jnp.int32) < h.lora_rank
            a = jnp.where(live[None, :, None], a, 0.0)
            b = jnp.zeros((len(a), out, rank), jnp.float32)
            tree.setdefault(block, {})[name] = {"a": a, "b": b}
        return {"layers": tree}

    def scale(h: Hyperparameters) -> Float[Array, ""]:
        return h.lora_alpha / h.lora_rank.astype(jnp.float32)

    def apply(params: PyTree, trainable: PyTree, h: Hyperparameters) -> Variables:
        own = scaled(trainable, scale(h))
        if rows is None:
            return Variables(params, own)
        place = {int(layer): j for j, layer in enumerate(rows)}
        apart = [layer_of(own["layers"], place[i]) if i in place else {} for i in range(config.layers)]
        return Variables(params, {"layers": tuple(apart)})

    def delta(params: PyTree, trainable: PyTree, h: Hyperparameters) -> PyTree:
        own = trainable if rows is None else widened(trainable, rows, config.layers)
        return lora_weights(scaled(own, scale(h)))

    return Adapter("lora", init, apply, delta, trains_head=False)


def widened(tree: PyTree[Array], layers: Sequence[int] | np.ndarray, total: int) -> PyTree[Array]:
    """A tree of some layers (the first axis of every leaf) as one of all `total`, zero elsewhere."""
    rows = np.asarray(layers, np.int32)
    return jax.tree.map(lambda x: jnp.zeros((total, *x.shape[1:]), x.dtype).at[rows].set(x), tree)


def _is_pair(x: object) -> bool:
    return isinstance(x, dict) and set(x) == {"a", "b"}


def scaled(lora_tree: PyTree, scale: Array | float) -> PyTree:
    """The adapter with `scale` folded into every b; `scale` is a scalar, or one number per candidate of a stack."""

    def pair(p: dict[str, Array]) -> dict[str, Array]:
        s = jnp.asarray(scale, jnp.float32)
        return {"a": p["a"], "b": p["b"] * s.reshape(s.shape + (1,) * (p["b"].ndim - s.ndim))}

    return jax.tree.map(pair, lora_tree, is_leaf=_is_pair)


def lora_weights(lora_tree: PyTree) -> PyTree:
    """B A for every linear (scale already folded in): {"layers": {block: {linear: {"weight": [..., out, in]}}}}."""
    product = lambda p: {"weight": jnp.einsum("...or,...ri->...oi", p["b"], p["a"], precision="highest")}  # noqa: E731
    return jax.tree.map(product, lora_tree, is_leaf=_is_pair)
