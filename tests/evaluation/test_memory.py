"""How many rows go together where devices tell their memory: by a closed form, and with the same answers."""

import functools
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.kernels.base import v5e
from unlearnjax.data.buckets import round_up
from unlearnjax.distributed import mesh as mesh_module
from unlearnjax.distributed.mesh import make_mesh
from unlearnjax.distributed.plan import compile_program
from unlearnjax.distributed.programs import (
    Program,
    Workload,
    _adapters,
    _base,
    _model,
    bytes_on_a_device,
    generation_step,
    laid,
)
from unlearnjax.distributed.rules import filled_number, of_params, sharding
from unlearnjax.distributed.topology import parse_topology, tpu_devices
from unlearnjax.evaluation import memory, nll
from unlearnjax.evaluation.batches import batches
from unlearnjax.evaluation.full import token_stats
from unlearnjax.evaluation.generate import generate_candidates
from unlearnjax.evaluation.journal import Journal
from unlearnjax.evaluation.memory import SHARE, SLOT_STEP, bytes_of_batch, bytes_of_cast, room
from unlearnjax.models.abstract import init_params
from unlearnjax.models.config import ModelConfig
from unlearnjax.models.decoder import build

CONFIG = ModelConfig("llama", 64, 32, 48, 2, 4, 4, 8, "rms", max_positions=64)
MODEL = build(CONFIG)


@pytest.fixture(scope="module")
def params():
    return init_params(MODEL.abstract(jnp.float32), jax.random.key(3))


def prompts():
    draw = np.random.default_rng(0)
    return [draw.integers(0, 64, draw.integers(2, 40)).tolist() for _ in range(21)]


def test_batches_take_the_rows_that_fit_and_every_row_is_in_one():
    fitted = lambda rows, width: min(rows, 150 // width)  # noqa: E731
    found = list(batches(prompts(), 12, 0, left=True, widest=64, per_octave=2, fitted=fitted))
    assert sorted(place for batch in found for place in batch.places) == list(range(21))
    assert all(math.prod(batch.tokens.shape) <= 150 for batch in found)
    assert len({batch.tokens.shape[0] for batch in found}) > 1  # shorter rows, more of them
    # More places than rows: filler.
    (*_, last) = batches(prompts(), 20, 0, left=True, widest=64, per_octave=2, fitted=lambda rows, width: 8)
    assert last.tokens.shape[0] == 8 and len(last.places) == 21 % 8
    # What came before comes again, and the rest as it fits now.
    kept = [batch.places for batch in found[:2]]
    options = {"left": True, "widest": 64, "per_octave": 2, "fitted": lambda rows, width: 1, "finished": kept}
    later = [batch.places for batch in batches(prompts(), 12, 0, **options)]
    assert later[:2] == kept and all(len(places) == 1 for places in later[2:])
    assert sorted(place for places in later for place in places) == list(range(21))


def told(monkeypatch, free):
    monkeypatch.setattr(memory, "free_memory", lambda: free)


def test_fewer_rows_at_once_say_the_same(params, monkeypatch, tmp_path):
    def answers(folder, fewest=0):
        """Each kind's results, and whether it took more than so many batches."""
        calls = []
        kept = Journal(tmp_path / folder, {}, pytest.fail).records("answers")
        options = {"eos_token_ids": (7,), "pad_token_id": 0, "max_new_tokens": 20, "batch_size": 16}
        runs = [
            functools.partial(generate_candidates, MODEL, params, None, prompts(), records=kept, **options),
            lambda **more: nll.token_nll_candidates(MODEL, params, None, prompts(), batch_size=16, **more).mean,
            functools.partial(token_stats.token_stats_candidates, MODEL, params, None, prompts(), batch_size=16),
        ]
        found = []
        for run in runs:
            calls.clear()
            found.append(run(progress=calls.append))
            assert sum(calls) == 21 and len(calls) > fewest
        return found

    assert room(CONFIG, params, None, 1) is None  # a CPU does not tell
    free = answers("free")
    # Not three of the longest rows without their caches.
    told(monkeypatch, int(bytes_of_batch(CONFIG, None, jnp.float32, 1, 3, 48) / SHARE) - 1)
    short = answers("short", fewest=5)
    assert short[0] == free[0]
    np.testing.assert_allclose(short[1], free[1], rtol=1e-5)
    for x, y in zip(jax.tree.leaves(short[2]), jax.tree.leaves(free[2]), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


def test_finished_batches_are_not_computed_again_where_other_ones_would_fit(params, monkeypatch, tmp_path):
    class Killed(Exception):
        pass

    def answers(kill_after=99):
        done = []

        def progress(rows):
            done.append(rows)
            if len(done) == kill_after:
                raise Killed

        records = Journal(tmp_path / "kept", {}, pytest.fail).records("answers")
        before = len(records.found)
        found = generate_candidates(
            MODEL, params, None, prompts(), eos_token_ids=(7,), pad_token_id=0, max_new_tokens=20, batch_size=16,
            records=records, progress=progress,
        )  # fmt: skip
        return found, before, done

    expected = answers()[0]
    shutil.rmtree(tmp_path / "kept")
    space = bytes_of_batch(CONFIG, None, jnp.float32, 1, 4, 48, 20) / SHARE
    told(monkeypatch, int(space) + 1)
    with pytest.raises(Killed):
        answers(kill_after=2)
    told(monkeypatch, 0)
    found, before, done = answers()
    assert found == expected and before == 2
    assert done == [4, 4, *[1] * 13]  # what is kept, and then what fits now


def test_rows_divide_among_a_meshs_devices_however_few_fit(monkeypatch):
    mesh = make_mesh({"candidate": 2, "fsdp": 4})
    params = jax.device_put(
        init_params(MODEL.abstract(jnp.float32), jax.random.key(3)), of_params(mesh, MODEL.abstract(jnp.float32))
    )
    stack = {"layers": {"attention": {"q": {"a": jnp.zeros((4, 2, 4, 32)), "b": jnp.zeros((4, 2, 32, 4))}}}}
    told(monkeypatch, 0)
    # Two candidates' halves of the mesh have four devices each; the base alone has all eight.
    assert [room(CONFIG, params, stack, 4)(rows, 32) for rows in (32, 6, 4, 1)] == [4, 4, 4, 1]
    assert [room(CONFIG, params, None, 1)(rows, 32) for rows in (32, 8, 3)] == [8, 8, 8]
    one = bytes_of_batch(CONFIG, mesh, jnp.float32, 1, 16, 32)
    told(monkeypatch, int(one / SHARE) + 1)
    assert [room(CONFIG, params, None, 1)(rows, 32) for rows in (32, 24, 16, 2)] == [16, 16, 16, 2]
    assert room(CONFIG, params, None, 1)(3, 32) == 8  # three would be whole on each device
    # In bfloat16 a stack of float32 is there once more.
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    needs = bytes_of_batch(CONFIG, mesh, jnp.bfloat16, 4, 8, 32)
    for more, rows in ((0, 4), (bytes_of_cast(stack, jnp.bfloat16), 8)):
        told(monkeypatch, int((needs + more) / SHARE) + 1)
        assert room(CONFIG, half, stack, 4)(8, 32) == rows


class Device:
    def __init__(self, **stats):
        self.memory_stats = lambda: stats or None


def test_free_memory_is_the_fullest_devices(monkeypatch):
    asked = []
    monkeypatch.setattr(mesh_module, "device_memory", lambda: 8 * 2**30)
    monkeypatch.setattr(mesh_module, "largest", lambda *numbers: asked.append(numbers) or list(map(int, numbers)))

    def free(*devices):
        monkeypatch.setattr(jax, "local_devices", lambda: devices)
        return mesh_module.free_memory()

    full = Device(bytes_limit=8 * 2**30, bytes_in_use=5 * 2**30 + 1)
    assert free(Device(bytes_limit=8 * 2**30, bytes_in_use=2**30), full) == 3 * 2**30 - 2**20
    assert free(Device(bytes_limit=2**30, bytes_in_use=2**31)) == 0
    assert free(full, Device()) is None
    assert all(abs(number) < 2**31 for numbers in asked for number in numbers)
    # Another process has less.
    monkeypatch.setattr(mesh_module, "largest", lambda *numbers: [max(numbers[0], -512), *numbers[1:]])
    assert free(full) == 512 * 2**20
    monkeypatch.setattr(mesh_module, "device_memory", lambda: None)
    assert free(full) is None


OLMO_1B = ModelConfig("olmo", 50304, 2048, 8192, 16, 16, 16, 128, "layer")
SMALL_HEADS = ModelConfig("llama", 49152, 576, 1536, 30, 9, 3, 64, "rms")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "sizes", "candidates", "rows", "width", "new"),
    [
        (OLMO_1B, {"candidate": 2, "fsdp": 2}, 5, 8, 256, 256), (OLMO_1B, {"tensor": 4}, 4, 4, 1024, 256),
        (OLMO_1B, {"data": 4}, 1, 16, 512, 256), (OLMO_1B, {"data": 4}, 32, 4, 128, 65),
        (SMALL_HEADS, {"data": 2, "fsdp": 2}, 3, 8, 256, 256), (SMALL_HEADS, {"tensor": 4}, 4, 8, 16, 12),
    ],
)  # fmt: skip
def test_the_closed_form_is_near_what_tpus_compiler_says_or_more(config, sizes, candidates, rows, width, new):
    """Of the loop over new tokens with its cache, and of likelihoods: temporaries and results, in bfloat16."""
    v5e()
    mesh = make_mesh(sizes, tpu_devices(parse_topology("v5e:2x2")))
    news = {"loop": new, "likelihoods": 0}
    count = filled_number(mesh, candidates)
    work = Workload(count, batch=rows, slots=round_up(width + new - 1, SLOT_STEP))
    model = _model(config)
    cached = generation_step(config, mesh, work)
    cache = bytes_on_a_device(cached.held["cache"])
    texts = [jax.ShapeDtypeStruct((rows, width), dtype) for dtype in (jnp.int32, jnp.int32, jnp.float32)]
    texts = laid(texts, [sharding(mesh, ("rows" if count > 1 else "batch", None), x.shape) for x in texts])
    adapters = _adapters(model, mesh, work) if count > 1 else None
    lower = lambda: nll.program(model, mesh).lower(_base(model, mesh, "bfloat16"), adapters, *texts, count=count)  # noqa: E731
    chip = parse_topology("v5e:2x2").chip
    found = {"loop": cache + compile_program(cached, chip).temporary}
    found["likelihoods"] = compile_program(Program("likelihoods", lower, {}), chip).temporary
    held = {name: bytes_of_batch(config, mesh, jnp.bfloat16, count, rows, width, n) for name, n in news.items()}
    held = {name: own + bytes_of_cast(adapters, jnp.bfloat16) for name, own in held.items()}
    assert all(SHARE * found[name] < held[name] for name in found), (held, found)
    assert held["loop"] < 4 * found["loop"]  # and not so much more that a batch is cut for nothing
