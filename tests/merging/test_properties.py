"""One suite for every method and semantics: what a rule declares is what it is held to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from unlearnjax.merging import engine, merge, methods
from unlearnjax.merging.protocol import MergeMethod, Rule

RULES = [pytest.param(m, r, id=f"{m.name}-{r.semantics}") for m in methods().values() for r in m.rules]
every_rule = pytest.mark.parametrize(("method", "rule"), RULES)
SHAPES = {"a": (8, 6), "b": {"c": (16,)}}


def random_deltas(n: int, seed: int = 0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    draw = lambda shape: rng.normal(size=(n, *shape)).astype(np.float32)  # noqa: E731
    return jax.tree.map(lambda shape: jnp.asarray(draw(shape), dtype), SHAPES, is_leaf=is_shape)


def required(rule: Rule) -> dict[str, float]:
    """A value inside the range for each hyperparameter that must be given."""
    return {p.name: 0.6 * p.low + 0.4 * p.high for p in rule.hyperparameters if p.required}


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
    deltas = random_deltas(1)
    if rule.properties.identity is None:
        pytest.skip("declares none")
    equal(run(method, rule, deltas, **dict(rule.properties.identity)), jax.tree.map(lambda x: x[0], deltas))


@every_rule
def test_zero_weight_is_absence_exactly_where_declared(method, rule):
    deltas, kept = random_deltas(3), np.array([0, 2])
    with_it = run(method, rule, deltas, weights=[1.0, 0.0, 0.5])
    without = run(method, rule, jax.tree.map(lambda x: x[kept], deltas), weights=[1.0, 0.5])
    same = all(np.allclose(f, e, atol=1e-6) for f, e in zip(jax.tree.leaves(with_it), jax.tree.leaves(without)))
    assert same == rule.properties.zero_weight_is_absence


@every_rule
def test_permutation(method, rule):
    if not rule.properties.permutation_invariance:
        pytest.skip("declares none")
    deltas, order = random_deltas(3), np.array([2, 0, 1])
    weights = np.array([1.0, 0.3, -0.5], np.float32)
    found = run(method, rule, jax.tree.map(lambda x: x[order], deltas), weights=weights[order])
    close(found, run(method, rule, deltas, weights=weights))


@every_rule
def test_negation(method, rule):
    if rule.properties.negation == "never":
        pytest.skip("declares none")
    deltas = random_deltas(3)  # continuous: no sum cancels exactly
    negated = run(method, rule, jax.tree.map(jnp.negative, deltas))
    close(negated, jax.tree.map(jnp.negative, run(method, rule, deltas)))


@every_rule
def test_scale_equivariance(method, rule):
    if not rule.properties.scale_equivariance:
        pytest.skip("declares none")
    deltas = random_deltas(3)
    scaled = run(method, rule, jax.tree.map(lambda x: 3.7 * x, deltas))
    close(scaled, jax.tree.map(lambda x: 3.7 * x, run(method, rule, deltas)), rtol=2e-5, atol=1e-5)


@every_rule
def test_lambda_scales_the_result(method, rule):
    deltas = random_deltas(3)
    half = jax.tree.map(lambda x: 0.5 * x, run(method, rule, deltas))
    close(run(method, rule, deltas, lambda_=0.5), half)
    equal(run(method, rule, deltas, **{"lambda": 0}), jax.tree.map(jnp.zeros_like, half))


@every_rule
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_dtype_is_kept_and_the_work_is_float32(method, rule, dtype):
    deltas = random_deltas(3, dtype=dtype)
    found = run(method, rule, deltas)
    exact = run(method, rule, jax.tree.map(lambda x: x.astype(jnp.float32), deltas))
    equal(found, jax.tree.map(lambda x: x.astype(dtype), exact))


@every_rule
def test_jit_equals_eager(method, rule):
    deltas, weights = random_deltas(3)["b"], jnp.array([1.0, 0.5, 0.25])
    with jax.disable_jit():
        eager = run(method, rule, deltas, weights=weights)
    close(run(method, rule, deltas, weights=weights), eager)
    close(jax.jit(lambda d, w: run(method, rule, d, weights=w))(deltas, weights), eager)


@every_rule
def test_mapped_over_weights(method, rule):
    deltas, weights = random_deltas(3), jnp.array([[1.0, 1.0, 1.0], [0.2, 0.5, 1.5], [1.0, 0.0, -0.5]])
    mapped = jax.vmap(lambda w: run(method, rule, deltas, weights=w))(weights)
    for i, w in enumerate(weights):
        close(jax.tree.map(lambda x, i=i: x[i], mapped), run(method, rule, deltas, weights=w))


@every_rule
def test_mapped_over_numbers(method, rule):
    deltas = random_deltas(3)
    values = {}
    for p in (p for p in rule.hyperparameters if not p.static):
        low, high = max(p.low, 0.0), min(p.high, 2.0)
        values[p.name] = jnp.linspace(low + 0.1 * (high - low), high, 4, dtype=jnp.float32)
    mapped = jax.vmap(lambda v: run(method, rule, deltas, **v))(values)
    for i in range(4):
        one = run(method, rule, deltas, **{name: v[i] for name, v in values.items()})
        close(jax.tree.map(lambda x, i=i: x[i], mapped), one)


@every_rule
def test_sharded_equals_unsharded(method, rule):
    auto = jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((2, 4), ("candidate", "cut"), axis_types=(auto, auto))
    deltas = random_deltas(2)
    sharded = jax.device_put(deltas, NamedSharding(mesh, PartitionSpec("candidate", "cut")))
    assert len(jax.tree.leaves(sharded)[0].sharding.device_set) == 8
    close(run(method, rule, sharded), run(method, rule, deltas), rtol=1e-6)


@every_rule
def test_shards_that_only_see_their_part(method, rule):
    """Inside a shard_map each device holds an eighth of every tensor; partials psum and combine stays local."""
    if not rule.properties.elementwise:
        pytest.skip("needs whole tensors")
    mesh = jax.make_mesh((8,), ("cut",), axis_types=(jax.sharding.AxisType.Auto,))
    deltas = random_deltas(3)
    leaves = jax.tree.leaves(deltas)
    settings = {p.name: p.default for p in rule.hyperparameters} | required(rule)
    sizes = [sum(x[0].size for x in leaves)] if rule.scope == "tree" else [x[0].size for x in leaves]
    starts = [rule.start(size, 3, settings) for size in sizes]
    weights = jnp.full(3, 1.0 if rule.default_weight == "one" else 1 / 3, jnp.float32)

    def local(*parts):
        nothing = [None] * len(parts)
        psum = lambda partials: jax.lax.psum(partials, "cut")  # noqa: E731
        return engine.run(rule, parts, weights, starts, nothing, nothing, settings, reduce=psum)

    cut = PartitionSpec(None, "cut")
    found = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(cut,) * len(leaves), out_specs=PartitionSpec("cut")))(
        *leaves
    )
    close(found, jax.tree.leaves(run(method, rule, deltas)), rtol=1e-6)


@every_rule
def test_streamed_candidates_equal_those_in_memory(method, rule):
    assert rule.properties.streamable == (rule.accumulator is not None)
    if rule.accumulator is None:
        pytest.skip("needs all candidates at once")
    deltas, weights = random_deltas(4)["a"], jnp.array([1.0, 0.5, 0.25, -0.3])
    settings = {p.name: p.default for p in rule.hyperparameters} | required(rule)
    carry = rule.accumulator.start(deltas.shape[1:], settings)
    for delta, weight in zip(deltas, weights):
        carry = rule.accumulator.add(carry, delta, weight, settings)
    close(rule.accumulator.finish(carry, settings), run(method, rule, deltas, weights=weights))


@every_rule
def test_stacked_layers_equal_separate_tensors(method, rule):
    from unlearnjax.merging.api import merge_stacked

    stack = random_deltas(3)["a"][:, :3]  # [N, L, ...]
    together = merge_stacked({"w": stack}, method, stacked=1, **options(rule), **required(rule))["w"]
    apart = run(method, rule, {str(i): stack[:, i] for i in range(stack.shape[1])})
    close(together, jnp.stack([apart[str(i)] for i in range(stack.shape[1])]), rtol=1e-6)


@every_rule
def test_other_numbers_do_not_compile_again(method, rule):
    traces = []

    def counting(*args):
        traces.append(1)
        return rule.combine(*args)

    counted = MergeMethod("counted", "", (rule._replace(combine=counting),))
    deltas = random_deltas(3)
    run(counted, rule, deltas)
    once = len(traces)
    assert once == len(jax.tree.leaves(deltas))
    numbers = [p for p in rule.hyperparameters if not p.static]
    for share in (0.3, 0.7, 1.0):
        run(counted, rule, deltas, weights=[share, 1.0, 2.0], **{p.name: share for p in numbers})
        run(counted, rule, deltas, **{p.name: jnp.float32(share) for p in numbers})
    assert len(traces) == once
    run(counted, rule, jax.tree.map(lambda x: x[:2], deltas))  # another N is another program: the counter can count
    assert len(traces) == 2 * once
