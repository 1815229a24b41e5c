"""Between a tree of weights by module and a checkpoint's flat names, by a table of the modules' names."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from unlearnjax.errors import UserError
from unlearnjax.io.safetensors import Checkpoint, Entry

Names = Mapping[tuple[str, ...], str]
"""Our path of a module (or a weight) -> its name; what lies below is named as here, joined by dots."""


def checkpoint_name(path: tuple[str, ...], names: Names) -> str:
    """The name in checkpoints of the weight at our `path`."""
    for split in range(len(path), 0, -1):
        if path[:split] in names:
            return ".".join([names[path[:split]], *path[split:]])
    raise KeyError(path)


def read(
    checkpoint: Checkpoint, names: Names, abstract: PyTree[jax.ShapeDtypeStruct], ignored: Sequence[str] = ()
) -> PyTree[Array]:
    """The tree's weights in float32.

    Args:
      ignored: endings of names that are no weights of the model.

    Raises:
      UserError: a tensor that is missing, left over, or of another shape than `abstract` says; before any is read.
    """
    flat, treedef = jax.tree_util.tree_flatten_with_path(abstract)
    wanted = {checkpoint_name(_keys(path), names): like.shape for path, like in flat}
    there = {name for name in checkpoint.files if not name.endswith(tuple(ignored))}
    for name in sorted(wanted.keys() ^ there):
        what = "is missing" if name in wanted else "is no part of this model"
        raise UserError(f"{checkpoint.folder}: tensor {name!r} {what}; config.json and weights do not fit")
    for name, shape in wanted.items():
        if checkpoint.shape(name) != shape:
            raise UserError(
                f"{checkpoint.folder}: tensor {name!r} is {list(checkpoint.shape(name))}, and config.json wants "
                f"{list(shape)}"
            )
    return jax.tree.unflatten(treedef, [jnp.asarray(checkpoint.read(name), jnp.float32) for name in wanted])


def entries(tree: PyTree[Array], names: Names) -> Iterator[Entry]:
    """The tree's weights under their names in checkpoints, float32."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        value = functools.partial(np.asarray, leaf, np.float32)
        yield Entry(checkpoint_name(_keys(path), names), leaf.shape, np.float32, value)


def _keys(path: Any) -> tuple[str, ...]:
    return tuple(key.key for key in path)
