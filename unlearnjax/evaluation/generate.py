"""Batched generation with a key-value cache, greedy or sampled, for one model or for N adapters of one model at once.

One candidate's prefill and step never mention N; they are mapped over the candidates' axis, and the loop over steps
lies outside the map. (A mapped loop would keep every candidate's cache through a select at each step.) The loop stops
by itself when all rows have ended. After 32, 64, 128, ... new tokens the host looks and drops the rows that have ended,
which leaves a smaller batch. The cache begins with room up to the first look, and then gets all the room it may need.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, PyTree

from unlearnjax.data.buckets import round_up
from unlearnjax.distributed.mesh import CANDIDATE, mesh_of
from unlearnjax.distributed.processes import fetch
from unlearnjax.distributed.rules import filled, row_shards, sharding, spread_of, spread_rows, whole
from unlearnjax.errors import UserError
from unlearnjax.evaluation.batches import Batch, batches, check_rows, power_of_two
from unlearnjax.evaluation.journal import Records, finished, recorded
from unlearnjax.evaluation.memory import SLOT_STEP, room
from unlearnjax.models.cache import Cache
from unlearnjax.models.precision import precision
from unlearnjax.models.protocol import WHERE_IT_IS, Model, Spread, Variables

FIRST_LOOK = 32  # new tokens before the host first looks, and doubling from there. LUME's answers: 7 (qa) or 46 (sc)
SHRINK = 4  # drop ended rows when at most 1/SHRINK of the batch is alive: each size is another program to compile
CPU_TOKENS_AT_ONCE = 4096  # of the candidates that read their prompts together; more only miss the caches

# The candidates' axis of a Cache: all rows of all candidates have written the same number of slots.
_CACHE_AXES = Cache(0, 0, 0, None)  # type: ignore[arg-type]


class Sampling(NamedTuple):
    """Draw each token from the softmax of logits / temperature instead of taking the likeliest.

    A draw depends on the seed, the prompt's place in the list and the token's place in the row only, so neither on the
    batch nor on the candidate: candidates that agree draw the same tokens.
    """

    temperature: float = 1.0
    seed: int = 0


class Noise(NamedTuple):
    """`Sampling` as arrays."""

    key: Array
    temperature: Float[Array, ""]


class State(NamedTuple):
    """Rows under way. `last` is the newest token, not yet in the cache, and `position` its place in its row."""

    cache: Cache  # leaves [N, ...], except length; without the axis where N is 1
    last: Int[Array, "N rows"]
    position: Int[Array, "N rows"]
    ended: Bool[Array, "N rows"]
    prompt: Int[Array, "N rows"]  # the row's place in the caller's list


def places(mesh: Mesh, state: State) -> PyTree[Any]:
    """Where a state's arrays (or their shapes) lie: cut along candidates and rows, and the cache along heads too."""
    lead = ("candidate",) if state.last.shape[0] > 1 else ()

    def kept(x: Any) -> Any:
        layers = (None,) * (len(x.shape) - len(lead) - 4)
        return sharding(mesh, (*lead, *layers, "batch", "kv_heads", None, None), x.shape)

    keys, values, segments, _ = state.cache
    read: Any = sharding(mesh, (*lead, "batch", None), segments.shape)
    length: Any = whole(mesh)
    cache = Cache(jax.tree.map(kept, keys), jax.tree.map(kept, values), read, length)
    return State(cache, *(sharding(mesh, ("candidate", "batch"), x.shape) for x in state[1:]))  # type: ignore[arg-type]


def next_token(
    model: Model,
    params: PyTree[Array],
    hidden: Float[Array, "rows hidden"],
    noise: Noise | None,
    prompt: Int[Array, " rows"],
    position: Int[Array, " rows"],
) -> Int[Array, " rows"]:
    """Each row's next token: the likeliest (the lowest id among equals), or a draw (by the Gumbel-max trick).

    Logits are float32 [rows, vocab].
    """
    head = model.head(params)
    dims = (((1,), (1,)), ((), ()))
    exact = precision(hidden.dtype)
    logits = jax.lax.dot_general(hidden, head, dims, precision=exact, preferred_element_type=jnp.float32)
    if noise is not None:
        key, temperature = noise

        def gumbel(prompt: Array, position: Array) -> Array:
            own = jax.random.fold_in(jax.random.fold_in(key, prompt), position)
            return jax.random.gumbel(own, logits.shape[1:], jnp.float32)

        logits = logits / temperature + jax.vmap(gumbel)(prompt, position)
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def prefill(
    model: Model,
    params: PyTree[Array],
    lora: PyTree[Array] | None,
    tokens: Int[Array, "rows length"],
    segments: Int[Array, "rows length"],
    noise: Noise | None,
    prompt: Int[Array, " rows"],
    spread: Spread = WHERE_IT_IS,
) -> tuple[Cache, Int[Array, " rows"]]:
    """One candidate's left-padded prompts: the filled cache (of `length` slots) and the first new tokens."""
    rows, length = tokens.shape
    positions = jnp.maximum(jnp.cumsum(segments, axis=1, dtype=jnp.int32) - 1, 0)
    cache = model.init_cache(rows, length, params["embed"]["weight"].dtype)
    newest = jnp.full((rows, 1), length - 1, jnp.int32)
    out = model.forward(
        params, lora, tokens, positions=positions, segments=segments, cache=cache, at=newest, spread=spread
    )
    return out.cache, next_token(model, params, out.hidden[:, 0], noise, prompt, positions[:, -1] + 1)  # type: ignore[return-value]


def step(
    model: Model,
    params: PyTree[Array],
    lora: PyTree[Array] | None,
    cache: Cache,
    last: Int[Array, " rows"],
    position: Int[Array, " rows"],
    noise: Noise | None,
    prompt: Int[Array, " rows"],
    spread: Spread = WHERE_IT_IS,
) -> tuple[Cache, Int[Array, " rows"]]:
    """One candidate's next tokens."""
    out = model.forward(params, lora, last[:, None], positions=position[:, None], cache=cache, spread=spread)
    return out.cache, next_token(model, params, out.hidden[:, 0], noise, prompt, position + 1)  # type: ignore[return-value]


class Programs(NamedTuple):
    """A model's compiled programs, mapped over candidates."""

    start: Callable[..., State]
    run: Callable[..., tuple[State, Array]]
    grow: Callable[..., State]
    keep: Callable[..., State]


@functools.lru_cache(maxsize=4)
def programs(model: Model, mesh: Mesh | None = None) -> Programs:
    """Jitted once per model: `model` must be the same object for the compiled programs to be found again.

    Args:
      mesh: the devices that share the work, where there are several. Each program leaves its state where `places` says:
        XLA, left alone, puts what `keep` gathers whole on every device, and it stays there.
    """

    def placed(state: State) -> State:
        return state if mesh is None else jax.lax.with_sharding_constraint(state, places(mesh, state))

    @functools.partial(jax.jit, static_argnames=("count",))
    def start(
        params: PyTree, lora: PyTree, tokens: Array, segments: Array, prompt: Array, eos: Array, noise: Noise | None,
        *, count: int,
    ) -> State:  # fmt: skip
        one = functools.partial(prefill, model, spread=spread_of(mesh, count))
        # On a mesh all at once: groups would take each device's candidates from the others.
        alone = mesh is None and jax.default_backend() == "cpu"
        group = max(1, CPU_TOKENS_AT_ONCE // tokens.size) if alone else count
        if group < count:
            run = lambda mine: one(params, mine, tokens, segments, noise, prompt)  # noqa: E731
            cache, last = jax.lax.map(run, lora, batch_size=group)
            cache = cache._replace(length=cache.length[0])
        else:
            mapped = _mapped(one, count, (None, 0, None, None, None, None))
            cache, last = mapped(params, lora, tokens, segments, noise, prompt)
        position = jnp.broadcast_to(jnp.sum(segments, axis=1, dtype=jnp.int32)[None], last.shape)
        prompts = jnp.broadcast_to(prompt[None], last.shape)
        return placed(State(cache, last, position, _is_in(last, eos) | (prompts < 0), prompts))

    @functools.partial(jax.jit, static_argnames=("size",), donate_argnames=("state",))
    def run(
        params: PyTree, lora: PyTree, state: State, steps: Array, eos: Array, noise: Noise | None, *, size: int
    ) -> tuple[State, Array]:
        count, prompt = state.last.shape[0], state.prompt
        one = functools.partial(step, model, spread=spread_of(mesh, count))
        mapped = _mapped(one, count, (None, 0, _CACHE_AXES, 0, 0, None, 0))
        params, lora = model.apart(params), model.apart(lora, axis=1)

        def unfinished(carry: tuple[Array, State, Array]) -> Array:
            return (carry[0] < steps) & ~jnp.all(carry[1].ended)

        def body(carry: tuple[Array, State, Array]) -> tuple[Array, State, Array]:
            i, (cache, last, position, ended, _), out = carry
            cache, token = mapped(params, lora, cache, last, position, noise, prompt)
            out = jax.lax.dynamic_update_index_in_dim(out, token, i, axis=0)
            return i + 1, placed(State(cache, token, position + 1, ended | _is_in(token, eos), prompt)), out

        out = jnp.zeros((size, *state.last.shape), jnp.int32)
        _, state, out = jax.lax.while_loop(unfinished, body, (jnp.zeros((), jnp.int32), state, out))
        return state, out

    @functools.partial(jax.jit, static_argnames=("slots",))
    def grow(state: State, *, slots: int) -> State:
        def widen(leaf: Array, axis: int) -> Array:
            return jnp.pad(leaf, [(0, slots - n if axis == i - leaf.ndim else 0) for i, n in enumerate(leaf.shape)])

        keys, values, segments, length = state.cache
        keys, values = tuple(widen(part, -1) for part in keys), tuple(widen(part, -2) for part in values)
        return placed(state._replace(cache=Cache(keys, values, widen(segments, -1), length)))

    @jax.jit
    def keep(state: State, index: Array, live: Array) -> State:
        def rows(leaf: Array, axis: int) -> Array:
            take = functools.partial(jnp.take, axis=axis, mode="clip")
            return take(leaf, index[0]) if index.shape[0] == 1 else jax.vmap(take)(leaf, index)

        keys, values, segments, length = state.cache
        keys, values = (tuple(rows(part, -4) for part in parts) for parts in (keys, values))
        own = [jnp.take_along_axis(x, index, axis=1, mode="clip") for x in state[1:]]
        kept = State(Cache(keys, values, rows(segments, 0), length), *own)
        return placed(kept._replace(ended=kept.ended | ~live))

    return Programs(start, run, grow, keep)


def _mapped(one: Callable[..., tuple[Cache, Array]], count: int, axes: tuple[Any, ...]) -> Callable[..., Any]:
    """`one` (a prefill or a step) mapped over the candidates.

    A single candidate is not mapped: its cache has no candidates' axis, whose removal would be the reshape that makes
    XLA copy the cache at every step.
    """
    if count > 1:
        return jax.vmap(one, in_axes=axes, out_axes=(_CACHE_AXES, 0), axis_size=count, spmd_axis_name=CANDIDATE)

    def alone(*args: Any) -> tuple[Cache, Array]:
        cache, last = one(*(jax.tree.map(lambda x: x[0], arg) if axis == 0 else arg for arg, axis in zip(args, axes)))
        return cache, last[None]

    return alone


def _is_in(tokens: Array, ids: Array) -> Array:
    return jnp.any(tokens[..., None] == ids.reshape((1,) * tokens.ndim + (-1,)), axis=-1)


def _looks(limit: int) -> list[int]:
    """How many new tokens exist each time the host looks; the last is `limit`."""
    looks, at = [], FIRST_LOOK
    while at < limit:
        looks.append(at)
        at *= 2
    return [*looks, limit]


def _generate_batch(
    run: Programs, mesh: Mesh | None, params: PyTree, lora: PyTree, count: int, batch: Batch, eos: np.ndarray,
    limit: int, noise: Noise | None,
) -> np.ndarray:  # fmt: skip
    """New tokens, int32 [count, rows, limit]; what follows an end token means nothing."""
    total, width = batch.tokens.shape
    live = np.arange(total) < len(batch.places)
    prompt = np.full(total, -1, np.int32)
    prompt[live] = batch.places
    tokens, segments, prompt = spread_rows(params, batch.tokens, batch.segments, prompt, candidates=count)
    shards = row_shards(mesh, count, total)
    state = run.start(params, lora, tokens, segments, prompt, eos, noise, count=count)
    produced = np.zeros((count, total, limit), np.int32)
    produced[:, :, 0] = fetch(state.last)
    # rows[n, i]: which of the batch's rows runs in place i of candidate n; -1 where the place is filler.
    rows = np.where(live, np.arange(total), -1)[None].repeat(count, 0)
    done = 1
    for end in _looks(limit):
        ended = np.asarray(fetch(state.ended))
        if done == limit or ended.all():
            break
        # As many on each device: of fewer than there are devices, all of them would do all.
        alive = round_up(power_of_two(int((~ended).sum(axis=1).max())), shards)
        if alive * SHRINK <= rows.shape[1]:
            order = np.argsort(ended, axis=1, kind="stable")[:, :alive].astype(np.int32)
            rows = np.take_along_axis(np.where(ended, -1, rows), order, axis=1)
            state = run.keep(state, order, rows >= 0)
        # The newest token is never in the cache, so `room` new tokens take one slot less.
        room = end if done == 1 else limit
        slots = -(-(width + room - 1) // SLOT_STEP) * SLOT_STEP
        if slots > state.cache.slots:
            state = run.grow(state, slots=slots)
        size = max(64, power_of_two(limit))
        state, new = run.run(params, lora, state, np.int32(end - done), eos, noise, size=size)
        fresh = np.asarray(fetch(new))[: end - done].transpose(1, 2, 0)
        for n, at in zip(*np.nonzero(rows >= 0)):
            produced[n, rows[n, at], done:end] = fresh[n, at]
        done = end
    return produced


def generate_candidates(
    model: Model,
    params: PyTree[Array],
    lora: PyTree[Array] | None,
    prompts: Sequence[Sequence[int]],
    *,
    eos_token_ids: Sequence[int],
    pad_token_id: int,
    max_new_tokens: int,
    batch_size: int,
    sampling: Sampling | None = None,
    names: Sequence[str] | None = None,
    progress: Callable[[int], None] | None = None,
    records: Records | None = None,
) -> list[list[list[int]]]:
    """Continuations of each prompt by each of N candidates, all candidates in one program.

    The base weights are shared and have no candidates' axis; a batch holds N x batch_size rows of cache at most.

    Args:
      model: the decoder; reuse the object, the compiled programs are kept by it.
      params: base weights; the cache has their dtype.
      lora: adapters stacked to [N, layers, ...] with the scale folded into `b`; None is the base alone (N = 1).
      prompts: token ids of each row; at least one each.
      eos_token_ids: a row ends at any of these; none means that every row runs to max_new_tokens.
      pad_token_id: fills the left of short prompts; any id of the vocabulary, it is never attended to.
      max_new_tokens: the most new tokens of a row, at least 1.
      batch_size: prompts per batch, per candidate; on accelerators fewer where that many do not fit (`memory.room`).
      sampling: draw tokens; default greedy.
      names: the rows' names, for error messages.
      progress: called with the number of continuations that have been finished since the last call.
      records: finished batches of the same work, which are not computed again; gets each further one.

    Returns:
      [N][rows] lists of new ids, without the end token: a list of max_new_tokens ids is a row that did not end.

    Raises:
      UserError: a row without tokens, with an id outside the vocabulary, or that with max_new_tokens is longer than
        the context; max_new_tokens or batch_size below 1; a temperature that is not above 0.
    """
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    config = model.config
    check_rows(prompts, config.vocab_size, config.max_positions, max_new_tokens, names)
    wanted = 1 if lora is None else jax.tree.leaves(lora)[0].shape[0]
    lora = filled(params, lora)
    count = 1 if lora is None else jax.tree.leaves(lora)[0].shape[0]
    # Padded with an id that no token has, so that the number of end tokens makes no new program.
    eos = np.array(sorted({int(i) for i in eos_token_ids}), np.int32)
    eos = np.pad(eos, (0, -len(eos) % 4 or 4 * (not len(eos))), constant_values=-1)
    mesh = mesh_of(params)
    run = programs(model, mesh)
    noise = None
    if sampling is not None:
        if not sampling.temperature > 0:
            raise UserError(f"temperature must be above 0, not {sampling.temperature}; without sampling it is greedy")
        noise = Noise(jax.random.key(sampling.seed), jnp.float32(sampling.temperature))
    results: list[list[list[int]]] = [[[] for _ in prompts] for _ in range(count)]

    def continuations(batch: Batch) -> list[list[list[int]]]:
        produced = _generate_batch(run, mesh, params, lora, count, batch, eos, max_new_tokens, noise)
        ends = np.isin(produced, eos)
        lengths = np.where(ends.any(axis=-1), ends.argmax(axis=-1), max_new_tokens)
        rows = range(len(batch.places))
        return [[produced[n, at, : lengths[n, at]].tolist() for at in rows] for n in range(count)]

    for batch in batches(
        prompts, batch_size, pad_token_id, left=True, widest=config.max_positions, per_octave=2,
        fitted=room(config, params, lora, count, max_new_tokens), finished=finished(records),
    ):  # fmt: skip
        for n, found in enumerate(recorded(records, batch, continuations)):
            for row, ids in zip(batch.places, found, strict=True):
                results[n][row] = ids
        if progress is not None:
            progress(wanted * len(batch.places))
    return results[:wanted]


def generate(
    model: Model,
    variables: Variables,
    prompts: Sequence[Sequence[int]],
    *,
    eos_token_ids: Sequence[int],
    pad_token_id: int,
    max_new_tokens: int,
    batch_size: int,
    sampling: Sampling | None = None,
    names: Sequence[str] | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """Continuations by one model: `generate_candidates` with N = 1, and its arguments, returns and errors."""
    return generate_candidates(
        model,
        variables.params,
        stack_of_one(variables.lora),
        prompts,
        eos_token_ids=eos_token_ids,
        pad_token_id=pad_token_id,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        sampling=sampling,
        names=names,
        progress=progress,
    )[0]


def stack_of_one(lora: PyTree[Array] | None) -> Any:
    """One adapter as a stack with N = 1."""
    return None if lora is None else jax.tree.map(lambda leaf: leaf[None], lora)
