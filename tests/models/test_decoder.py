"""The decoder against itself: ways to run it that must not change what it computes. (Parity is in tests/parity.)"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unlearnjax.adapters.lora import lora_weights
from unlearnjax.models.abstract import abstract_params, init_params, logical_axes
from unlearnjax.models.config import ModelConfig, replace
from unlearnjax.models.config_json import FAMILIES
from unlearnjax.models.decoder import build
from unlearnjax.models.families import BUFFERS, NAMES, sources
from unlearnjax.models.protocol import Taps

CONFIG = ModelConfig(
    family="llama", vocab_size=50, hidden_size=16, intermediate_size=24, layers=3, heads=4, kv_heads=2, head_dim=6,
    norm="rms",
)  # fmt: skip
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 50, (2, 9)), jnp.int32)


@pytest.fixture(scope="module")
def params():
    tree = init_params(abstract_params(CONFIG), jax.random.key(0))
    # Initial embeddings are small, and the norms' scales all 1.
    noisy = lambda x: x + 0.3 * jax.random.normal(jax.random.key(1), x.shape) if x.ndim < 3 else x  # noqa: E731
    return jax.tree.map(noisy, tree)


@pytest.fixture(scope="module")
def lora():
    tree = {}
    for i, name in enumerate(("q", "down")):
        block, out, inner = CONFIG.linears[name]
        a, b = jax.random.split(jax.random.key(2 + i))
        shapes = {"a": (a, (CONFIG.layers, 3, inner)), "b": (b, (CONFIG.layers, out, 3))}
        tree.setdefault(block, {})[name] = {n: 0.3 * jax.random.normal(k, s) for n, (k, s) in shapes.items()}
    return {"layers": tree}


def run(model, params, lora=None, tokens=TOKENS, **keywords):
    return jax.jit(lambda p, a, t: model.forward(p, a, t, **keywords))(params, lora, tokens)


def loss(model, params, lora):
    return jnp.mean(jnp.square(model.forward(params, lora, TOKENS).hidden @ model.head(params).T))


@pytest.fixture(scope="module")
def gradient(params, lora):
    return jax.jit(jax.grad(lambda p, a: loss(build(CONFIG, unroll=True), p, a), (0, 1)))(params, lora)


@pytest.mark.parametrize("remat", ["none", "linears", "full"])
@pytest.mark.parametrize("unroll", [True, False])
def test_remat_and_scan_give_the_same_gradient(params, lora, gradient, unroll, remat):
    model = build(CONFIG, unroll=unroll, remat=remat)
    other = jax.jit(jax.grad(lambda p, a: loss(model, p, a), (0, 1)))(params, lora)
    assert all(float(jnp.abs(x).max()) > 1e-4 for x in jax.tree.leaves(gradient))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5, rtol=1e-4), other, gradient)


@pytest.mark.parametrize("unroll", [True, False])
def test_remat_recomputes_what_it_says(params, lora, unroll):
    """All products of a layer's pass forward come once more with `full`, attention's scores alone with `linears`."""

    def products(remat):
        model = build(CONFIG, unroll=unroll, remat=remat)
        found = jax.make_jaxpr(jax.grad(lambda a: loss(model, params, a)))(lora)
        return str(found).count("dot_general")

    none, linears, full = products("none"), products("linears"), products("full")
    assert none < linears < full


@pytest.mark.parametrize("unroll", [True, False])
def test_layer_ranges_compose(params, lora, unroll):
    model = build(CONFIG, unroll=unroll)
    whole = run(model, params, lora, taps=Taps(read=("hidden",)))
    x, read = TOKENS, []
    for first, last in ((0, 1), (1, 3)):
        out = run(model, params, lora, x, layers=(first, last), taps=Taps(read=("hidden",)))
        x, read = out.hidden, [*read, out.taps["hidden"]]
    np.testing.assert_allclose(x, whole.hidden, atol=1e-5)
    np.testing.assert_allclose(jnp.concatenate(read), whole.taps["hidden"], atol=1e-5)


def test_a_stopped_gradient_between_ranges_trains_the_last_layers_only(params):
    model = build(CONFIG)

    def tail(p):
        x = jax.lax.stop_gradient(model.forward(p, None, TOKENS, layers=(0, 2)).hidden)
        return jnp.mean(jnp.square(model.forward(p, None, x, layers=(2, 3)).hidden))

    up = jax.jit(jax.grad(tail))(params)["layers"]["mlp"]["up"]["weight"]
    assert float(jnp.abs(up[:2]).max()) == 0 and float(jnp.abs(up[2]).max()) > 0


def test_an_adapter_is_the_weights_it_adds(params, lora):
    model = build(CONFIG)
    merged = {**params, "layers": jax.tree.map(lambda x: x, params["layers"])}
    for block, names in lora_weights(lora)["layers"].items():
        for name, change in names.items():
            merged["layers"][block][name]["weight"] = merged["layers"][block][name]["weight"] + change["weight"]
    a, b, plain = (run(model, p, z).hidden for p, z in ((params, lora), (merged, None), (params, None)))
    assert float(jnp.abs(a - plain).max()) > 0.1
    np.testing.assert_allclose(a, b, atol=1e-4)


def test_packed_rows_do_not_see_each_other(params):
    model = build(CONFIG)
    alone = run(model, params).hidden
    packed = jnp.concatenate([TOKENS[:1], TOKENS[1:]], axis=1)
    segments = jnp.repeat(jnp.asarray([[1, 2]], jnp.int32), 9, axis=1)
    positions = jnp.tile(jnp.arange(9, dtype=jnp.int32), 2)[None]
    together = run(model, params, None, packed, segments=segments, positions=positions).hidden
    np.testing.assert_allclose(together, alone.reshape(1, 18, -1), atol=1e-5)


@pytest.mark.parametrize("family", list(NAMES))
@pytest.mark.parametrize("tied", [True, False])
def test_the_abstract_tree_is_the_whole_truth(family, tied):
    config = replace(CONFIG, family=family, tie_embeddings=tied, **FAMILIES[family].fixed)
    tree = abstract_params(config)
    params = init_params(tree, jax.random.key(0))
    shapes = jax.eval_shape(lambda: init_params(tree, jax.random.key(0)))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(lambda x: (x.shape, x.dtype), shapes)
    axes = jax.tree.leaves(logical_axes(tree), is_leaf=lambda x: isinstance(x, tuple))
    assert [len(a) for a in axes] == [x.ndim for x in jax.tree.leaves(params)]
    # Our linears that are one tensor in the checkpoint have different rows of it.
    assert len({(n, s.rows) for s in sources(config, tree) for n in s.names}) == sum(
        len(s.names) for s in sources(config, tree)
    )
    names = [n for names in {s.names for s in sources(config, tree)} for n in names]
    assert len(set(names)) == len(names) == len(set(names) - {n for n in names if BUFFERS.search(n)})
    assert all(("layers" in s.info.axes) == s.stacked == (len(s.names) == 3) for s in sources(config, tree))
    assert np.isfinite(run(build(config), params).hidden).all()


FAMILY_CONFIGS = {
    "grouped": CONFIG,
    "windowed": replace(CONFIG, window=3, sliding=(True, False, True)),
    "padded": CONFIG,
}


@pytest.mark.parametrize("unroll", [True, False])
@pytest.mark.parametrize("kind", list(FAMILY_CONFIGS))
def test_hidden_states_at_some_positions_are_those_of_all(params, lora, kind, unroll):
    """Values and gradients, whatever the mask; positions may repeat."""
    model = build(FAMILY_CONFIGS[kind], unroll=unroll)
    at = jnp.asarray([[8, 3, 0, 3], [2, 7, 8, 5]], jnp.int32)
    keywords = {}
    if kind == "padded":
        keywords["segments"] = jnp.asarray([[0, 0, 0, *[1] * 6], [1] * 9], jnp.int32)
        at = jnp.maximum(at, 3)

    def some(p, a):
        return model.forward(p, a, TOKENS, at=at, **keywords).hidden

    def picked(p, a):
        return jnp.take_along_axis(model.forward(p, a, TOKENS, **keywords).hidden, at[..., None], axis=1)

    def both(f):
        weights = jnp.cos(jnp.arange(2 * 4 * 16, dtype=jnp.float32)).reshape(2, 4, 16)
        return jax.jit(lambda p, a: (f(p, a), jax.grad(lambda a: jnp.sum(f(p, a) * weights))(a)))(params, lora)

    got, expected = both(some), both(picked)
    assert got[0].shape == (2, 4, 16) and all(float(jnp.abs(x).max()) > 1e-3 for x in jax.tree.leaves(expected))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5, rtol=1e-4), got, expected)


def test_positions_do_not_go_with_taps(params):
    with pytest.raises(ValueError, match="not go with taps"):
        run(build(CONFIG), params, at=jnp.zeros((2, 1), jnp.int32), taps=Taps(read=("mlp",)))


@pytest.mark.parametrize("unroll", [True, False])
@pytest.mark.parametrize("kind", list(FAMILY_CONFIGS))
def test_a_cache_gives_what_whole_rows_give(params, lora, kind, unroll):
    """Padded prompts of 6, then three calls of one token, with the layers taken apart, against one call of 9."""
    model = build(FAMILY_CONFIGS[kind], unroll=unroll)
    segments = jnp.asarray([[0, 0, *[1] * 7], [1] * 9])
    positions = jnp.maximum(jnp.cumsum(segments, axis=1) - 1, 0)
    whole = run(model, params, lora, segments=segments, positions=positions).hidden
    cache = model.init_cache(2, 6, jnp.float32)
    first = {"segments": segments[:, :6], "positions": positions[:, :6], "cache": cache, "at": jnp.full((2, 1), 5)}
    out = run(model, params, lora, TOKENS[:, :6], **first)
    found, cache = [out.hidden], out.cache
    keys = tuple(jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, 4)]) for x in cache.keys)
    values = tuple(jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, 4), (0, 0)]) for x in cache.values)
    cache = cache._replace(keys=keys, values=values, segments=jnp.pad(cache.segments, [(0, 0), (0, 4)]))
    split = model.apart(params), model.apart(lora)
    for i in range(6, 9):
        out = run(model, *split, TOKENS[:, i : i + 1], positions=positions[:, i : i + 1], cache=cache)
        found, cache = [*found, out.hidden], out.cache
    np.testing.assert_allclose(jnp.concatenate(found, axis=1), whole[:, 5:], atol=2e-5)


@pytest.mark.parametrize("kind", list(FAMILY_CONFIGS))
def test_attention_in_blocks_of_rows_is_attention(params, lora, kind):
    """Blocks of one row and of two with one left over, against all rows at once: values and gradients."""
    tokens = jnp.concatenate([TOKENS, TOKENS[:1, ::-1]])
    keywords = {"segments": jnp.asarray([[0, 0, 0, *[1] * 6], [1] * 9, [0, *[1] * 8]])} if kind == "padded" else {}
    scores = CONFIG.heads * 9 * 9

    def both(at_once):
        model = build(FAMILY_CONFIGS[kind], unroll=True, scores_at_once=at_once)
        weights = jnp.cos(jnp.arange(3 * 6 * 16, dtype=jnp.float32)).reshape(3, 6, 16)
        hidden = lambda a: model.forward(params, a, tokens, **keywords).hidden[:, 3:]  # noqa: E731
        f = lambda a: (hidden(a), jax.grad(lambda a: jnp.sum(hidden(a) * weights))(a))  # noqa: E731
        return jax.jit(f)(lora), str(jax.make_jaxpr(hidden)(lora)).count("scan[")

    expected, loops = both(100 * scores)
    for at_once in (scores, 2 * scores):
        got, more_loops = both(at_once)
        assert more_loops > loops
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5, rtol=1e-4), got, expected)
