"""Does rounding the weights bring back what was forgotten?

An update that is small against the steps of a quantised weight can be rounded away: methods that keep utility kept 21%
of the forgotten knowledge at full precision and 83% after 4-bit quantisation (2410.16454), and a LoRA merged into
bfloat16 weights may lie below their resolution. So W + B A is formed in float32, rounded, and asked again; `full` is
the model as it was trained, its adapter beside weights that were not touched:

    bfloat16   the cast
    int8       symmetric, round to nearest, one scale per output channel
    int4       the same with one scale per 128 inputs of a channel (or the whole channel where that is no multiple)

    gap = score(rounded) - score(full)                changed = share of codes that differ from the original model's

Linear weights of the layers are rounded; embeddings, head and norms stay. Weights are dequantised in their own dtype,
as a kernel for quantised weights would do on the fly.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8, PyTree

from unlearnjax.adapters.lora import lora_weights
from unlearnjax.data.rows import Row
from unlearnjax.evaluation.full.asked import Asking, knowledge
from unlearnjax.models.protocol import Model

GROUP = 128
BITS = {"int8": 8, "int4": 4}


def codes(weight: Float[Array, "... out in"], bits: int) -> tuple[Int8[Array, "... out groups size"], Array]:
    """A weight's codes in [-(2^(bits - 1) - 1), 2^(bits - 1) - 1], and the scales (float32 [..., out, groups, 1])."""
    inner = weight.shape[-1]
    size = GROUP if bits < 8 and inner % GROUP == 0 else inner
    grouped = weight.astype(jnp.float32).reshape(*weight.shape[:-1], inner // size, size)
    most = 2.0 ** (bits - 1) - 1
    scale = jnp.max(jnp.abs(grouped), axis=-1, keepdims=True) / most
    found = jnp.round(grouped / jnp.where(scale > 0, scale, 1.0))
    return jnp.clip(found, -most, most).astype(jnp.int8), scale


def rounded(weight: Float[Array, "... out in"], kind: str) -> Float[Array, "... out in"]:
    """The weight as a model of that kind (`bfloat16`, `int8`, `int4`) computes with it, in its own dtype."""
    if kind == "bfloat16":
        return weight.astype(jnp.bfloat16).astype(weight.dtype)
    found, scale = codes(weight, BITS[kind])
    return (found.astype(jnp.float32) * scale).reshape(weight.shape).astype(weight.dtype)


def merged(params: PyTree[Array], lora: PyTree[Array] | None, block: str, name: str) -> Float[Array, "layers out in"]:
    """W + B A of one linear of every layer, float32: in the weights' dtype a small update would be lost before it is
    rounded."""
    weight = params["layers"][block][name]["weight"].astype(jnp.float32)
    pair = None if lora is None else lora["layers"].get(block, {}).get(name)
    return weight if pair is None else weight + lora_weights(pair)["weight"]


def quantised(model: Model, params: PyTree[Array], kind: str, lora: PyTree[Array] | None = None) -> PyTree[Array]:
    """The parameters with every linear of the layers `merged` and `rounded`, in the dtype it had."""
    layers = {
        block: dict(modules) if isinstance(modules, dict) else modules for block, modules in params["layers"].items()
    }
    for name, (block, _, _) in model.config.linears.items():
        own = layers[block][name]
        weight = rounded(merged(params, lora, block, name), kind).astype(own["weight"].dtype)
        layers[block][name] = {**own, "weight": weight}
    return {**params, "layers": layers}


def changed_share(
    model: Model, before: PyTree[Array], after: PyTree[Array], kind: str, lora: PyTree[Array] | None = None
) -> float:
    """The share of linear weights whose code differs between two models, the second with an adapter merged into it."""
    differing = total = 0
    for name, (block, _, _) in model.config.linears.items():
        weights = merged(before, None, block, name), merged(after, lora, block, name)
        own = [codes(weight, BITS[kind])[0] for weight in weights]
        differing += int(jnp.sum(own[0] != own[1]))
        total += own[0].size
    return differing / total


def quantisation(
    model: Model,
    params: PyTree[Array],
    lora: PyTree[Array] | None,
    rows: Sequence[Row],
    asking: Asking,
    original: PyTree[Array],
    *,
    progress: Callable[[int], None] | None = None,
) -> list[dict[str, Any]]:
    """The scores of N candidates on forget rows at full precision (all at once) and rounded (one model at a time).

    Args:
      lora: adapters stacked to [N, ...] with the scale folded into `b`; None is `params` alone.
      rows: forget rows. original: the parameters before unlearning, for `changed`.
      progress: called with 1 for each candidate that is done.

    Returns:
      Per candidate full, bfloat16, int8 and int4, each {leak, nll} (see `knowledge`); gap {kind: {leak, nll}}, None
      where one of the two is; changed {int8, int4}.
    """
    quantise = jax.jit(lambda params, lora, kind: quantised(model, params, kind, lora), static_argnames="kind")
    results = []
    for n, full in enumerate(knowledge(model, params, lora, rows, asking)):
        own = None if lora is None else jax.tree.map(lambda x, n=n: x[n], lora)
        found: dict[str, Any] = {"full": full}
        for kind in ("bfloat16", *BITS):
            found[kind] = knowledge(model, quantise(params, own, kind), None, rows, asking)[0]
        gap = {kind: _difference(found[kind], found["full"]) for kind in ("bfloat16", *BITS)}
        changed = {kind: changed_share(model, original, params, kind, own) for kind in BITS}
        results.append({**found, "gap": gap, "changed": changed})
        if progress is not None:
            progress(1)
    return results


def _difference(value: dict[str, float | None], full: dict[str, float | None]) -> dict[str, float | None]:
    pairs = {name: (value[name], full[name]) for name in full}
    return {name: None if a is None or b is None else a - b for name, (a, b) in pairs.items()}
