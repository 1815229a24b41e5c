"""One suite for every method and semantics: what a rule declares is what it is held to."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from unlearnjax_kernels.dare.api import Part

from unlearnjax.merging import engine, merge, methods, spherical
from unlearnjax.merging.protocol import MergeMethod, Rule

RULES = [pytest.param(m, r, id=f"{m.name}-{r.semantics}") for m in methods().values() for r in m.rules]
every_rule = pytest.mark.parametrize(("method", "rule"), RULES)
SHAPES = {"a": (8, 6), "b": {"c": (16,)}}


def random_deltas(n: int, seed: int = 0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    draw = lambda shape: rng.normal(size=(n, *shape)).astype(np.float32)  # noqa: E731
    return jax.tree.map(lambda shape: jnp.asarray(draw(shape), dtype), SHAPES, is_leaf=is_shape)


def few(rule: Rule, n: int = 3) -> int:
    """As many candidates as the rule merges, n if it can."""
    return min(n, rule.most or n)


def weights_of(rule: Rule, *values: float):
    """The first ones, as many as there are candidates, where the rule takes weights."""
    return np.array(values[: few(rule, len(values))], np.float32) if rule.properties.weighted else None


def required(rule: Rule) -> dict[str, float]:
    """A value inside the range for each hyperparameter that must be given."""
    return {p.name: 0.6 * p.low + 0.4 * min(p.high, 1.0) for p in rule.hyperparameters if p.required}


def options(rule: Rule) -> dict:
    base = jax.tree.map(lambda x: x[0], random_deltas(1, seed=9)) if rule.needs_base else None
    return {"semantics": rule.semantics, "key": jax.random.key(3) if rule.needs_key else None, "base": base}


def run(method: MergeMethod, rule: Rule, deltas, weights=None, **settings):
    return merge(deltas, method, weights=weights, **options(rule), **{**required(rule), **settings})


def close(found, expected, rtol=1e-5, atol=1e-6):
    jax.tree.map(lambda f, e: np.testing.assert_allclose(f, e, rtol=rtol, atol=atol), found, expected)


def equal(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@every_rule
def test_identity_at_one_candidate(method, rule):
    if rule.properties.identity is None or rule.least > 1:
        pytest.skip("declares none")
    deltas = random_deltas(1)
    found = run(method, rule, deltas, **dict(rule.properties.identity))
    equal(found, jax.tree.map(lambda x: x[0], deltas))


@every_rule
def test_zero_weight_is_absence_exactly_where_declared(method, rule):
    if not rule.properties.weighted or few(rule) < 3:
        pytest.skip("has no weights, or too few candidates")
    deltas, kept = random_deltas(3), np.array([0, 2])
    with_it = run(method, rule, deltas, weights=[1.0, 0.0, 0.5])
    without = run(method, rule, jax.tree.map(lambda x: x[kept], deltas), weights=[1.0, 0.5])
    same = all(np.allclose(f, e, atol=1e-6) for f, e in zip(jax.tree.leaves(with_it), jax.tree.leaves(without)))
    assert same == rule.properties.zero_weight_is_absence


@every_rule
def test_permutation(method, rule):
    if not rule.properties.permutation_invariance:
        pytest.skip("declares none")
    n = few(rule)
    deltas, order = random_deltas(n), np.roll(np.arange(n), 1)
    weights = weights_of(rule, 1.0, 0.3, -0.5)
    turned = None if weights is None else weights[order]
    found = run(method, rule, jax.tree.map(lambda x: x[order], deltas), weights=turned)
    close(found, run(method, rule, deltas, weights=weights))


@every_rule
def test_negation(method, rule):
    if rule.properties.negation == "never":
        pytest.skip("declares none")
    deltas = random_deltas(few(rule))  # continuous: no sum cancels exactly
    negated = run(method, rule, jax.tree.map(jnp.negative, deltas))
    close(negated, jax.tree.map(jnp.negative, run(method, rule, deltas)))


@every_rule
def test_scale_equivariance(method, rule):
    if not rule.properties.scale_equivariance:
        pytest.skip("declares none")
    deltas = random_deltas(few(rule))
    scaled = run(method, rule, jax.tree.map(lambda x: 3.7 * x, deltas))
    close(scaled, jax.tree.map(lambda x: 3.7 * x, run(method, rule, deltas)), rtol=2e-5, atol=1e-5)


@every_rule
def test_lambda_scales_the_result(method, rule):
    deltas = random_deltas(few(rule))
    half = jax.tree.map(lambda x: 0.5 * x, run(method, rule, deltas, lambda_=1.0))
    close(run(method, rule, deltas, lambda_=0.5), half)
    equal(run(method, rule, deltas, **{"lambda": 0}), jax.tree.map(jnp.zeros_like, half))


@every_rule
def test_dtype_is_kept_and_the_work_is_float32(method, rule):
    deltas = random_deltas(few(rule), dtype=jnp.bfloat16)
    found = run(method, rule, deltas)
    exact = run(method, rule, jax.tree.map(lambda x: x.astype(jnp.float32), deltas))
    assert {x.dtype for x in jax.tree.leaves(exact)} == {jnp.dtype(jnp.float32)}
    equal(found, jax.tree.map(lambda x: x.astype(jnp.bfloat16), exact))


@every_rule
def test_jit_equals_eager(method, rule):
    deltas, weights = random_deltas(few(rule)), weights_of(rule, 1.0, 0.5, 0.25)
    with jax.disable_jit():
        eager = run(method, rule, deltas, weights=weights)
    close(run(method, rule, deltas, weights=weights), eager)
    close(jax.jit(lambda d, w: run(method, rule, d, weights=w))(deltas, weights), eager)


@every_rule
def test_mapped_over_weights(method, rule):
    if not rule.properties.weighted:
        pytest.skip("has no weights")
    n = few(rule)
    deltas, weights = random_deltas(n), jnp.array([[1.0, 1.0, 1.0], [0.2, 0.5, 1.5], [1.0, 0.2, -0.5]])[:, :n]
    mapped = jax.vmap(lambda w: run(method, rule, deltas, weights=w))(weights)
    for i, w in enumerate(weights):
        close(jax.tree.map(lambda x, i=i: x[i], mapped), run(method, rule, deltas, weights=w))


@every_rule
def test_mapped_over_numbers(method, rule):
    deltas = random_deltas(few(rule))
    values = {}
    for p in (p for p in rule.hyperparameters if not p.static):
        low, high = max(p.low, 0.0), min(p.high, 2.0)
        if p.name == "rho":
            low = p.low
        values[p.name] = jnp.linspace(low + 0.1 * (high - low), high, 4, dtype=jnp.float32)
    mapped = jax.vmap(lambda v: run(method, rule, deltas, **v))(values)
    for i in range(4):
        one = run(method, rule, deltas, **{name: v[i] for name, v in values.items()})
        close(jax.tree.map(lambda x, i=i: x[i], mapped), one)


@every_rule
def test_sharded_equals_unsharded(method, rule):
    auto = jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((2, 4), ("candidate", "cut"), axis_types=(auto, auto))
    deltas = random_deltas(few(rule, 2))
    cut = "candidate" if few(rule, 2) == 2 else None
    sharded = jax.device_put(deltas, NamedSharding(mesh, PartitionSpec(cut, "cut")))
    assert len(jax.tree.leaves(sharded)[0].sharding.device_set) == 8
    found, expected = run(method, rule, sharded), run(method, rule, deltas)
    close(found, expected, rtol=1e-6)
    if rule.properties.elementwise and not rule.needs_key and method not in spherical.METHODS:  # norms sum over entries
        equal(found, expected)


@every_rule
def test_shards_that_only_see_their_part(method, rule):
    """Inside a shard_map each device holds an eighth of every tensor; partials psum and combine stays local."""
    if not rule.properties.elementwise:
        pytest.skip("needs whole tensors")
    mesh = jax.make_mesh((8,), ("cut",), axis_types=(jax.sharding.AxisType.Auto,))
    n = few(rule)
    deltas, given = random_deltas(n), options(rule)
    leaves, bases = jax.tree.leaves(deltas), jax.tree.leaves(given["base"])
    settings = {p.name: p.default for p in rule.hyperparameters} | required(rule)
    sizes = [sum(x[0].size for x in leaves)] if rule.scope == "tree" else [x[0].size for x in leaves]
    starts = [rule.start(size, n, settings) for size in sizes]
    weights = jnp.full(n, 1.0 if rule.default_weight == "one" else 1 / n, jnp.float32)
    key = given["key"]
    keys = [None if key is None else jax.random.fold_in(key, zlib.crc32(path)) for path in (b"a", b"b/c")]

    def local(parts, bases):
        psum = lambda partials: jax.lax.psum(partials, "cut")  # noqa: E731
        at = jax.lax.axis_index("cut")
        places = [Part(x.shape[1:], (at * (x.shape[1] // 8), *(0,) * (x.ndim - 2))) for x in leaves]
        bases = bases or [None] * len(parts)
        return engine.run(rule, parts, weights, starts, keys, bases, settings, reduce=psum, parts=places)

    cut, own = PartitionSpec(None, "cut"), PartitionSpec("cut")
    found = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(cut, own), out_specs=own))(leaves, bases)
    close(found, jax.tree.leaves(run(method, rule, deltas)), rtol=2e-6)


@every_rule
def test_streamed_candidates_equal_those_in_memory(method, rule):
    assert rule.properties.streamable == (rule.accumulator is not None)
    if rule.accumulator is None:
        pytest.skip("needs all candidates at once")
    deltas = random_deltas(4)["a"]
    weights = jnp.array([1.0, 0.5, 0.25, -0.3]) if rule.properties.weighted else jnp.ones(4)
    settings = {p.name: p.default for p in rule.hyperparameters} | required(rule)
    carry = rule.accumulator.start(deltas.shape[1:], settings)
    for delta, weight in zip(deltas, weights):
        carry = rule.accumulator.add(carry, delta, weight, settings)
    close(rule.accumulator.finish(carry, settings), run(method, rule, deltas, weights=weights))


@every_rule
def test_stacked_layers_equal_separate_tensors(method, rule):
    from unlearnjax.merging.api import merge_stacked

    if rule.needs_key:
        pytest.skip("draws other numbers for other tensors")
    stack = random_deltas(few(rule))["a"][:, :3]  # [N, L, ...]
    given = options(rule)
    base = None if given.pop("base") is None else random_deltas(1, seed=4)["a"][0, :3]
    each = None if base is None else {str(i): base[i] for i in range(3)}
    whole = None if base is None else {"w": base}
    together = merge_stacked({"w": stack}, method, stacked=1, base=whole, **given, **required(rule))["w"]
    apart = merge({str(i): stack[:, i] for i in range(3)}, method, base=each, **given, **required(rule))
    close(together, jnp.stack([apart[str(i)] for i in range(3)]), rtol=1e-6)


@every_rule
def test_other_numbers_do_not_compile_again(method, rule):
    traces = []

    def counting(*args):
        traces.append(1)
        return rule.combine(*args)

    counted = MergeMethod("counted", "", (rule._replace(combine=counting),))
    deltas = random_deltas(few(rule))
    run(counted, rule, deltas)
    once = len(traces)
    assert once == len(jax.tree.leaves(deltas))
    numbers = [p for p in rule.hyperparameters if not p.static]
    for share in (0.6, 0.7, 1.0):
        run(counted, rule, deltas, weights=weights_of(rule, share, 1.0, 2.0), **{p.name: share for p in numbers})
        run(counted, rule, deltas, **{p.name: jnp.float32(share) for p in numbers})
    assert len(traces) == once
    if few(rule) > rule.least:  # another N is another program: the counter can count
        run(counted, rule, jax.tree.map(lambda x: x[: few(rule) - 1], deltas))
        assert len(traces) == 2 * once
