"""How many rows go together where devices tell their memory: by a closed form, and with the same answers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.kernels.base import v5e
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
from unlearnjax.distributed.rules import filled_number, sharding
from unlearnjax.distributed.topology import parse_topology, tpu_devices
from unlearnjax.evaluation import memory, nll
from unlearnjax.evaluation.batches import batches
from unlearnjax.evaluation.full import token_stats
from unlearnjax.evaluation.generate import generate_candidates
from unlearnjax.evaluation.journal import Journal
from unlearnjax.evaluation.memory import SHARE, bytes_of_batch, room
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


def test_batches_are_halved_until_they_fit_and_every_row_is_in_one():
    fits = lambda rows, width: rows * width <= 150  # noqa: E731
    found = list(batches(prompts(), 12, 0, left=True, widest=64, per_octave=2, fits=fits))
    assert sorted(place for batch in found for place in batch.places) == list(range(21))
    assert all(fits(*batch.tokens.shape) for batch in found)
    assert len({batch.tokens.shape[0] for batch in found}) > 1  # shorter rows, more of them
    alone = list(batches(prompts(), 12, 0, left=True, widest=64, per_octave=2, fits=lambda rows, width: False))
    assert [batch.tokens.shape[0] for batch in alone] == [1] * 21


def test_fewer_rows_at_once_say_the_same(params, monkeypatch, tmp_path):
    def answers(folder):
        kept = Journal(tmp_path / folder, {}, pytest.fail).records("answers")
        options = {"eos_token_ids": (7,), "pad_token_id": 0, "max_new_tokens": 20, "batch_size": 16}
        said = generate_candidates(MODEL, params, None, prompts(), records=kept, **options)
        likelihood = nll.token_nll_candidates(MODEL, params, None, prompts(), batch_size=16).mean
        stats = token_stats.token_stats_candidates(MODEL, params, None, prompts(), batch_size=16)
        lines = (tmp_path / folder / "answers.jsonl").read_text().splitlines()
        return said, likelihood, stats, len(lines) - 1

    assert room(CONFIG, params, 1) is None  # a CPU does not tell
    free = answers("free")
    # Two of the longest rows with their caches, and no third.
    space = bytes_of_batch(CONFIG, None, jnp.float32, 1, 3, 48, 20) / SHARE
    monkeypatch.setattr(memory, "free_memory", lambda: int(space) - 1)
    short = answers("short")
    assert short[0] == free[0]
    np.testing.assert_allclose(short[1], free[1], rtol=1e-5)
    for x, y in zip(jax.tree.leaves(short[2]), jax.tree.leaves(free[2]), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)
    assert free[3] == 2 and short[3] > 4


OLMO_1B = ModelConfig("olmo", 50304, 2048, 8192, 16, 16, 16, 128, "layer")
SMALL_HEADS = ModelConfig("llama", 49152, 576, 1536, 30, 9, 3, 64, "rms")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "sizes", "candidates", "rows", "width"),
    [
        (OLMO_1B, {"candidate": 2, "fsdp": 2}, 5, 8, 256), (OLMO_1B, {"tensor": 4}, 4, 4, 1024),
        (OLMO_1B, {"data": 4}, 1, 16, 512), (SMALL_HEADS, {"data": 2, "fsdp": 2}, 3, 8, 256),
    ],
)  # fmt: skip
def test_the_closed_form_is_what_tpus_compiler_says_or_more(config, sizes, candidates, rows, width):
    """Of the loop over new tokens with its cache, and of likelihoods: temporaries and results, in bfloat16."""
    v5e()
    mesh = make_mesh(sizes, tpu_devices(parse_topology("v5e:2x2")))
    news = {"loop": 256, "likelihoods": 0}
    count = filled_number(mesh, candidates)
    work = Workload(count, batch=rows, slots=width + 256)
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
    assert all(SHARE * found[name] < held[name] for name in found), (held, found)
    assert held["loop"] < 4 * found["loop"]  # and not so much more that a batch is cut for nothing
