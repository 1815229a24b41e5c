"""Sparse task vectors: a consensus delta is 5 to 30% dense, so only its kept entries are stored, moved and added.

In memory an entry is its place and its value; in a file (safetensors) a bit per entry says which are kept, and their
values follow in order: at 10% of float32 that is an eighth of the dense delta.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32, PyTree

from unlearnjax.errors import UserError
from unlearnjax.io.safetensors import Entry, open_file, write_file

FORMAT = "unlearnjax.packed"
MOST = 2**31 - 1  # entries of a tensor whose places fit int32


class Packed(NamedTuple):
    """The entries of one tensor that are not zero."""

    places: Int32[Array, "kept"]
    """In row-major order, ascending."""
    values: Float[Array, "kept"]
    shape: tuple[int, ...]


# The shape is no array: it stays out of jit's and vmap's way.
jax.tree_util.register_pytree_node(
    Packed, lambda p: ((p.places, p.values), p.shape), lambda shape, parts: Packed(*parts, shape)
)


def pack(delta: PyTree[Float[Array, "..."]]) -> dict[str, Packed]:
    """A delta's entries that are not zero, by the path of each leaf (`layers/0/kernel`). For concrete arrays.

    Raises:
      UserError: a leaf that is not floating, holds NaN or Inf, or has 2**31 entries or more; two leaves of one path.
    """
    found: dict[str, Packed] = {}
    for path, leaf in _named(delta):
        x = np.asarray(leaf)
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise UserError(f"pack: {path} is {x.dtype}, and only floating deltas are packed; leave it out")
        if x.size > MOST:
            raise UserError(f"pack: {path} has {x.size} entries; split it along an axis")
        if not np.isfinite(x.astype(np.float32)).all():
            raise UserError(f"pack: {path} holds NaN or Inf")
        if path in found:
            raise UserError(f"pack: two leaves are called {path}; rename one")
        places = np.flatnonzero(x)
        found[path] = Packed(jnp.asarray(places, jnp.int32), jnp.asarray(x.reshape(-1)[places]), x.shape)
    return found


def unpack(packed: Packed) -> Array:
    """The dense tensor."""
    size = int(np.prod(packed.shape))
    return jnp.zeros(size, packed.values.dtype).at[packed.places].set(packed.values).reshape(packed.shape)


def apply_packed(
    params: PyTree[Float[Array, "..."]], packed: dict[str, Packed], scale: float | Float32[Array, ""] = 1.0
) -> PyTree[Float[Array, "..."]]:
    """params + scale * delta: `scale=-0.9` unlearns by subtraction. Pure; may be jitted and mapped over `scale`.

    The sum is formed in float32 and rounded to each leaf's dtype; entries that are not in `packed` stay bit for bit
    what they are, and with scale 0 all do.

    Raises:
      UserError: a packed tensor that params lack or have in another shape.
    """
    flat, treedef = jax.tree_util.tree_flatten_with_path(params)
    named = [(_name(path), leaf) for path, leaf in flat]
    shapes = {name: tuple(leaf.shape) for name, leaf in named}
    for name, own in packed.items():
        if name not in shapes:
            raise UserError(f"apply_packed: the parameters have no {name}")
        if shapes[name] != tuple(own.shape):
            raise UserError(f"apply_packed: {name} is {shapes[name]} in the parameters and {own.shape} in the delta")
    factor = jnp.asarray(scale, jnp.float32)
    leaves = [_applied(leaf, packed[name], factor) if name in packed else leaf for name, leaf in named]
    return jax.tree.unflatten(treedef, leaves)


def _applied(leaf: Array, own: Packed, factor: Float32[Array, ""]) -> Array:
    flat = jnp.asarray(leaf).reshape(-1)
    before = flat.at[own.places].get(indices_are_sorted=True, unique_indices=True)
    after = (before.astype(jnp.float32) + factor * own.values.astype(jnp.float32)).astype(flat.dtype)
    after = jnp.where(factor == 0, before, after)  # -0 stays -0
    return flat.at[own.places].set(after, indices_are_sorted=True, unique_indices=True).reshape(leaf.shape)


def save_packed(packed: dict[str, Packed], path: str | Path) -> None:
    """Write a safetensors file, which appears whole or not at all. Its directory must exist."""
    entries = []
    for name, own in packed.items():
        mask = np.zeros(int(np.prod(own.shape)), bool)
        mask[np.asarray(own.places)] = True
        bits, values = np.packbits(mask), np.asarray(own.values)
        entries += [Entry(f"{name}.kept", bits.shape, bits.dtype, bits)]
        entries += [Entry(f"{name}.values", values.shape, values.dtype, values)]
    shapes = json.dumps({name: list(own.shape) for name, own in packed.items()})
    target = Path(path)
    beside = target.with_name(target.name + ".part")
    try:
        write_file(beside, entries, {"format": FORMAT, "shapes": shapes})
        beside.replace(target)
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror})") from None
    finally:
        beside.unlink(missing_ok=True)


def load_packed(path: str | Path) -> dict[str, Packed]:
    """Read what `save_packed` wrote.

    Raises:
      UserError: no such file, a truncated or tampered one, or one that is no packed delta.
    """
    file = open_file(path)
    if file.metadata.get("format") != FORMAT:
        raise UserError(f"{path}: is no packed delta; write one with save_packed")
    try:
        shapes = {name: tuple(int(d) for d in dims) for name, dims in json.loads(file.metadata["shapes"]).items()}
    except (KeyError, ValueError, TypeError, AttributeError):
        raise UserError(f"{path}: its shapes cannot be read; the file is broken") from None
    expected = {f"{name}.{part}" for name in shapes for part in ("kept", "values")}
    if expected != set(file.slots):
        other = sorted(expected ^ set(file.slots))
        raise UserError(f"{path}: tensors and shapes do not fit: {', '.join(other)}; the file is broken")
    found = {}
    for name, shape in shapes.items():
        size = int(np.prod(shape))
        bits, values = np.array(file.read(f"{name}.kept")), np.array(file.read(f"{name}.values"))
        if bits.dtype != np.uint8 or bits.shape != (-(-size // 8),):
            raise UserError(f"{path}: {name}.kept is {bits.dtype}{bits.shape} for {size} entries; the file is broken")
        places = np.flatnonzero(np.unpackbits(bits)[:size])
        if values.shape != places.shape or not np.isfinite(values.astype(np.float32)).all():
            raise UserError(f"{path}: {name} has {values.size} finite values for {places.size} entries; it is broken")
        found[name] = Packed(jnp.asarray(places, jnp.int32), jnp.asarray(values), shape)
    return found


def _named(tree: Any) -> list[tuple[str, Any]]:
    return [(_name(path), leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]]


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/") or "the array"
