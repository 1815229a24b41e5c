"""`merge`: checks what was given, then runs the rule in one compiled program."""

import functools
import math
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree
from unlearnjax_kernels.threshold import api as threshold

from unlearnjax.distributed.processes import fetch
from unlearnjax.errors import UserError, nearest
from unlearnjax.merging import arithmetic, engine, host, ram, sce, spherical, swaps
from unlearnjax.merging.consensus import CONFLICT_ONLY, CONSENSUS
from unlearnjax.merging.linear import LINEAR, UNIFORM
from unlearnjax.merging.magmax import MAGMAX
from unlearnjax.merging.product import Product, is_product, largest_possible
from unlearnjax.merging.product import finite as product_finite
from unlearnjax.merging.protocol import Hyperparameter, MergeMethod, Rule, Settings, State
from unlearnjax.merging.ties import TIES


def methods() -> dict[str, MergeMethod]:
    """Every merge method by name."""
    found = (
        LINEAR, UNIFORM, *arithmetic.METHODS, TIES, CONSENSUS, CONFLICT_ONLY, MAGMAX, *spherical.METHODS, sce.SCE,
        *ram.METHODS, *swaps.METHODS,
    )  # fmt: skip
    return {method.name: method for method in found}


def merge(
    deltas: PyTree[Float[Array, "N ..."]],
    method: str | MergeMethod,
    *,
    weights: Float[Array, "N"] | None = None,
    semantics: str | None = None,
    key: Array | None = None,
    base: PyTree[Float[Array, "..."]] | None = None,
    **hyperparameters: Any,
) -> PyTree[Float[Array, "..."]]:
    """Merges N candidates' deltas into one.

    Pure: it may be called inside jit, and under vmap over `weights` and over numeric hyperparameters. Other weights or
    numbers do not compile again. Sharded arrays stay sharded.

    Args:
        deltas: a pytree whose leaves have a leading axis N, one entry per candidate; floating dtypes.
        method: a name from `methods()`, or a `MergeMethod` of your own.
        weights: [N]; None takes the rule's default (1/N each, or 1 each where the semantics is a code that has no
            normalisation: PEFT's and mergekit's).
        semantics: which definition of the method; None is the first one it lists.
        key: a JAX key, for methods that draw random numbers. Each leaf folds in its own path.
        base: a pytree like `deltas` without N, for methods that work on weights rather than deltas.
        **hyperparameters: the rule's own; density, gamma and epsilon are one number or one per candidate. A Python
            keyword takes a trailing underscore: `lambda_=0.5`.

    Returns:
        A pytree like `deltas` without N; each leaf in its own dtype (float64 as float32 unless x64 is on), computed in
        float32.

    Raises:
        UserError: unknown method, semantics or hyperparameter; one missing or (concrete) out of range; weights of
            another shape, or not finite; no leaves, N = 0, or leaves that disagree on N; a leaf that is not floating,
            or holds NaN or Inf (concrete arrays only); a missing key or base, or a base of another structure.
    """
    return merge_stacked(
        deltas, method, weights=weights, semantics=semantics, key=key, base=base, stacked=0, **hyperparameters
    )


def merge_stacked(
    deltas: PyTree[Float[Array, "N ..."]],
    method: str | MergeMethod,
    *,
    stacked: int,
    weights: Float[Array, "N"] | None = None,
    semantics: str | None = None,
    key: Array | None = None,
    base: PyTree[Float[Array, "..."]] | None = None,
    **hyperparameters: Any,
) -> PyTree[Float[Array, "..."]]:
    """`merge` for leaves whose `stacked` axes after N stack separate tensors (layers): a trim per tensor is then one
    per layer's matrix, as the codes that keep layers apart compute it.

    Leaves may be `Product`s, whose deltas are formed one layer at a time, in each pass over the data again. Only where
    a CPU merges by statistics of the whole tree are all of them formed at once: there the host finds thresholds faster
    than passes do, and memory is what it costs.
    """
    method, rule = find_rule(method, semantics)
    paths, leaves, treedef = _leaves(deltas, stacked)
    n = leaves[0].shape[0]
    check_count(method, rule, n)
    settings = check_hyperparameters(method, rule, hyperparameters)
    check_each(method, rule, settings, n)
    weights = _weights(method, rule, weights, n, settings)
    if not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(leaves)):
        _check_finite(paths, leaves)
    bases = _bases(method, rule.wants_base(settings), base, paths, leaves, treedef)
    if rule.needs_key and key is None:
        raise UserError(f"merge: {method.name} draws random numbers; pass key=jax.random.key(seed)")
    keys = [None if key is None else jax.random.fold_in(key, zlib.crc32(path.encode())) for path in paths]
    static = {p.name: settings[p.name] for p in rule.hyperparameters if p.static}
    numbers = {p.name: jnp.asarray(settings[p.name], jnp.float32) for p in rule.hyperparameters if not p.static}
    starts = _starts(rule, leaves, n, settings, stacked)
    if stacked == 0 or rule.scope == "tree":
        if host.settles(rule, leaves, starts):
            leaves = [leaf.all_layers() if isinstance(leaf, Product) else leaf for leaf in leaves]
        starts = host.settle(rule, leaves, starts, settings)
    merged = _compiled(rule, tuple(static.items()), stacked)(leaves, weights, starts, keys, bases, numbers)
    return jax.tree.unflatten(treedef, merged)


@functools.lru_cache(maxsize=256)
def _compiled(rule: Rule, static: tuple[tuple[str, Any], ...], stacked: int) -> Any:
    def program(leaves: list, weights: Array, starts: list, keys: list, bases: list, numbers: dict) -> list:
        return engine.run(rule, leaves, weights, starts, keys, bases, {**numbers, **dict(static)}, stacked=stacked)

    return jax.jit(program)


def _starts(rule: Rule, leaves: list[Any], n: int, settings: Settings, stacked: int) -> list[State]:
    if rule.scope == "tree":
        return [rule.start(sum(leaf.size for leaf in leaves) // n, n, settings)]
    return [rule.start(math.prod(leaf.shape[1 + stacked :]), n, settings) for leaf in leaves]


def find_rule(method: str | MergeMethod, semantics: str | None) -> tuple[MergeMethod, Rule]:
    """The method and the rule of these names. Raises UserError with the nearest valid name."""
    if isinstance(method, str):
        known = methods()
        if method == "greedy":
            raise UserError("merge: greedy needs a score of the merged model; call unlearnjax.greedy(deltas, score)")
        if method not in known:
            raise UserError(f"merge: unknown method {method!r}{nearest(method, known)}")
        method = known[method]
    if semantics is not None and semantics not in method.semantics:
        hint = nearest(str(semantics), method.semantics)
        raise UserError(f"merge: {method.name} has no semantics {semantics!r}{hint}")
    return method, method.rule(semantics)


def _leaves(deltas: PyTree, stacked: int) -> tuple[list[str], list[Any], Any]:
    flat, treedef = jax.tree_util.tree_flatten_with_path(deltas, is_leaf=is_product)
    if not flat:
        raise UserError("merge: the deltas are an empty tree; give at least one array")
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") or "the array" for path, _ in flat]
    leaves: list[Any] = []
    for path, (_, leaf) in zip(paths, flat, strict=True):
        if not isinstance(leaf, (np.ndarray, jax.Array, Product)):
            leaf = np.asarray(leaf)
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise UserError(f"merge: {path} is {leaf.dtype}, and only floating deltas are merged; leave it out")
        if leaf.ndim < 1 + stacked:
            raise UserError(f"merge: {path} has shape {leaf.shape} and lacks the leading axis of candidates")
        leaves.append(leaf if isinstance(leaf, Product) else jnp.asarray(leaf))
    n = leaves[0].shape[0]
    for path, leaf in zip(paths, leaves, strict=True):
        if leaf.shape[0] != n:
            raise UserError(f"merge: {path} has {leaf.shape[0]} candidates and {paths[0]} has {n}; stack the same ones")
        if n and math.prod(leaf.shape[1 + stacked :]) > threshold.MAX_LEAF:
            raise UserError(f"merge: {path} has 2**31 entries or more per candidate; split it along an axis")
    if n == 0:
        raise UserError("merge: there are no candidates (the leading axis has length 0)")
    return paths, leaves, treedef


def checked_leaves(deltas: PyTree) -> list[Array]:
    """The candidates' leaves. Raises UserError where `merge` would: see there."""
    paths, leaves, _ = _leaves(deltas, 0)
    if not any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        _check_finite(paths, leaves)
    return leaves


def check_count(method: MergeMethod, rule: Rule, n: int) -> None:
    """Raises UserError where the rule does not merge n candidates."""
    if n < rule.least or (rule.most is not None and n > rule.most):
        wanted = f"exactly {rule.least}" if rule.least == rule.most else f"at least {rule.least}"
        raise UserError(f"merge: {method.name} merges {wanted} candidates, and there are {n}")


def check_each(method: MergeMethod, rule: Rule, settings: Settings, n: int) -> None:
    """Raises UserError where a hyperparameter is given per candidate, and not for each of the n."""
    for parameter in rule.hyperparameters:
        if np.ndim(settings[parameter.name]) and np.shape(settings[parameter.name]) != (n,):
            count = np.shape(settings[parameter.name])[0]
            raise UserError(
                f"merge: {method.name}: {count} values of {parameter.name} for {n} candidates; give each its own"
            )


def check_hyperparameters(method: MergeMethod, rule: Rule, given: Mapping[str, Any]) -> dict[str, Any]:
    """All of the rule's hyperparameters by their real names, defaults filled in. Raises UserError for bad ones."""
    known = {parameter.name: parameter for parameter in rule.hyperparameters}
    values: dict[str, Any] = {}
    where = f"merge: {method.name}" + (f" ({rule.semantics} semantics)" if len(method.rules) > 1 else "")
    for raw, value in given.items():
        name = raw[:-1] if raw.endswith("_") else raw
        if name not in known:
            raise UserError(f"{where} has no hyperparameter {raw!r}{nearest(name, known)}")
        values[name] = _checked(where, known[name], value)
    for name, parameter in known.items():
        if name not in values and parameter.required:
            raise UserError(f"{where} needs {name} in {parameter.range}: {parameter.summary}; it has no default")
        values.setdefault(name, parameter.default)
    return values


def _checked(where: str, parameter: Hyperparameter, value: Any) -> Any:
    """The value if it is valid; traced numbers are taken on trust."""
    if parameter.choices:
        if value not in parameter.choices:
            raise UserError(f"{where}: {parameter.name} is {value!r}{nearest(str(value), parameter.choices)}")
        return value
    if parameter.static:
        if not isinstance(value, (bool, np.bool_)):
            raise UserError(f"{where}: {parameter.name} is {value!r} and must be {parameter.range}")
        return bool(value)
    if parameter.per_candidate and not isinstance(value, str) and np.ndim(value) == 1:
        if isinstance(value, jax.core.Tracer):
            return value
        if isinstance(value, jax.Array):
            for one in np.asarray(value):
                _checked(where, parameter, float(one))
            return value
        return tuple(_checked(where, parameter, one) for one in value)
    if isinstance(value, (bool, str)) or value is None or np.ndim(value) != 0:
        per = " or one per candidate" if parameter.per_candidate else ""
        given = f"an array of shape {np.shape(value)}" if np.ndim(value) else repr(value)
        raise UserError(
            f"{where}: {parameter.name} must be one number{per} (map over several with jax.vmap), not {given}"
        )
    if isinstance(value, jax.core.Tracer):
        return value
    number = float(value)
    inside = (number > parameter.low if parameter.low_open else number >= parameter.low) and number <= parameter.high
    if not (inside and math.isfinite(number)):
        raise UserError(f"{where}: {parameter.name} is {number:g} and must be in {parameter.range}")
    return number if isinstance(value, (int, float)) else value


def _weights(method: MergeMethod, rule: Rule, weights: Any, n: int, settings: Settings) -> Array:
    if weights is None:
        return jnp.full(n, 1.0 / n if rule.default_weight == "mean" else 1.0, jnp.float32)
    if not isinstance(weights, jax.core.Tracer):
        try:
            weights = np.asarray(weights, np.float32)
        except (TypeError, ValueError) as error:
            raise UserError(f"merge: weights must be {n} numbers, not {weights!r}") from error
    if weights.shape != (n,):
        raise UserError(f"merge: weights have shape {weights.shape} for {n} candidates; give {n} numbers")
    if isinstance(weights, np.ndarray):
        if not np.isfinite(weights).all():
            raise UserError(f"merge: weights {weights.tolist()} are not all finite")
        problem = rule.check_weights(weights, settings)
        if problem:
            raise UserError(f"merge: weights {weights.tolist()} do not suit {method.name}: {problem}")
    return jnp.asarray(weights, jnp.float32)


@jax.jit
def _finite(leaves: list[Array]) -> list[Bool[Array, "N"]]:
    return [jnp.stack([jnp.isfinite(leaf[i]).all() for i in range(leaf.shape[0])]) for leaf in leaves]


def _check_finite(paths: list[str], leaves: list[Any]) -> None:
    with jax.ensure_compile_time_eval():  # concrete arrays may be merged inside a trace
        arrays = [leaf for leaf in leaves if not isinstance(leaf, Product)]
        own = iter(host.all_finite(arrays) or _finite(arrays))
        found = [_finite_product(leaf) if isinstance(leaf, Product) else next(own) for leaf in leaves]
    for path, finite in zip(paths, found, strict=True):
        bad = np.flatnonzero(~np.asarray(fetch(finite)))
        if bad.size:
            raise UserError(f"merge: {path} of candidate {bad[0]} holds NaN or Inf; leave that candidate out")


def _finite_product(leaf: Product) -> Any:
    """Which candidates' deltas are finite: by their factors, and only where these may be too large by the deltas."""
    sure = np.asarray(fetch(largest_possible(leaf))) < np.finfo(np.float32).max / 2
    return sure if sure.all() else product_finite(leaf)


def _bases(
    method: MergeMethod, wanted: bool, base: PyTree | None, paths: list[str], leaves: list[Any], treedef: Any
) -> list[Array | None]:
    if base is None:
        if wanted:
            raise UserError(f"merge: {method.name} works on weights; pass base, the weights the deltas belong to")
        return [None] * len(leaves)
    found, base_treedef = jax.tree.flatten(base)
    if base_treedef != treedef:
        raise UserError("merge: base has another tree structure than the deltas; give it the same keys")
    for path, leaf, array in zip(paths, leaves, found, strict=True):
        if np.shape(array) != leaf.shape[1:]:
            raise UserError(f"merge: base {path} has shape {np.shape(array)} and the deltas {leaf.shape[1:]}")
    # Rules on deltas do not read it: it is checked, and not sent through the program.
    return [jnp.asarray(array) for array in found] if wanted else [None] * len(leaves)
