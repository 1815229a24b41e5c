"""Trees of LoRA adapters, {"a": [(N,) L, r, in], "b": [(N,) L, out, r]} per linear: their linears by path, checked."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float32, PyTree

from unlearnjax.errors import UserError


def linears_of(
    tree: PyTree, names: tuple[str, ...] = ("a", "b"), ndim: int | None = None
) -> dict[str, dict[str, Array]]:
    """The linears of a nested dict by path, each a dict with exactly these names."""
    found: dict[str, dict[str, Array]] = {}

    def walk(node: Any, path: str) -> None:
        where = path or "the tree"
        if not isinstance(node, dict) or not node:
            raise UserError(f"{where} is not a dict of linears with {' and '.join(names)}")
        if set(node) != set(names) or any(isinstance(value, dict) for value in node.values()):
            for name, child in node.items():
                walk(child, f"{path}/{name}" if path else name)
            return
        shapes = {name: tuple(value.shape) for name, value in node.items()}
        ranks_fit = "a" not in names or shapes["a"][-2] == shapes["b"][-1]
        if len({len(shape) for shape in shapes.values()}) != 1 or not ranks_fit:
            raise UserError(f"{where}: shapes {shapes} do not fit; a is [..., L, r, in] and b [..., L, out, r]")
        if ndim is not None and any(len(shape) != ndim for shape in shapes.values()):
            raise UserError(f"{where}: shapes {shapes} must have {ndim} axes")
        found[path] = {name: jnp.asarray(value) for name, value in node.items()}

    walk(tree, "")
    return found


def stack_of(lora: PyTree) -> dict[str, dict[str, Array]]:
    """The linears of a stack of candidates."""
    linears = linears_of(lora, ndim=4)
    counts = {path: (pair["a"].shape[0], pair["b"].shape[0]) for path, pair in linears.items()}
    if len({count for pair in counts.values() for count in pair}) != 1:
        raise UserError(f"merge: the linears hold different numbers of candidates (a, b): {counts}")
    return linears


def per_candidate(name: str, values: Any, linears: dict[str, dict[str, Array]]) -> Float32[Array, "N"]:
    count = next(iter(linears.values()))["a"].shape[0]
    array = jnp.asarray(values, jnp.float32)
    if array.shape != (count,):
        raise UserError(f"merge: {name} has shape {array.shape} for {count} candidates; give {count} numbers")
    return array


def nest(flat: dict[str, Any]) -> PyTree:
    """{"layers/mlp/up": x} as {"layers": {"mlp": {"up": x}}}; the path of a bare linear is ""."""
    if "" in flat:
        return flat[""]
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, last = path.split("/")
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = value
    return tree
