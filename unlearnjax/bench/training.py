"""Training throughput: candidate-tokens per second of N LoRA candidates in one program."""

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from unlearnjax.adapters.lora import lora
from unlearnjax.bench.timing import bytes_held, device, laps, spread
from unlearnjax.data.schedule import Pace, plan
from unlearnjax.data.tokens import pack, to_device
from unlearnjax.distributed.processes import put
from unlearnjax.distributed.rules import idle, of_candidates, of_params, of_store, of_work
from unlearnjax.models.abstract import init_params
from unlearnjax.models.config import ModelConfig
from unlearnjax.models.decoder import Remat, build
from unlearnjax.objectives.objective import objective
from unlearnjax.training.hyperparameters import SCHEDULES, stack
from unlearnjax.training.loop import fresh_states, work_of
from unlearnjax.training.reference import base_reference
from unlearnjax.training.step import Task, compiled_step

TERMS = ("npo", "gdr", "klr")  # ZJUKLAB's
SMALL = ModelConfig(
    "olmo", 4096, 256, 768, 4, 8, 8, 32, "layer", max_positions=2048, eos_token_ids=(), pad_token_id=0
)  # fmt: skip


def measure(
    config: ModelConfig,
    *,
    candidates: int,
    micro_batch: int = 4,
    length: int = 128,
    rank: int = 32,
    dtype: str = "float32",
    mesh: Mesh | None = None,
    remat: Remat | None = None,
    flash: bool = False,
    tokens_at_once: int | None = None,
    repeats: int = 5,
) -> dict[str, Any]:
    """Time one optimizer update of every candidate: `micro_batch` forget rows and as many retain rows of `length`
    tokens each, NPO + GDR + KLR, AdamW, on a model of this shape with random weights.

    Args:
      mesh: its devices share the work as in `train`; candidates and rows that do not divide are not cut.

    Returns:
      seconds per step (median, least, most), tokens_per_second (candidates x 2 x micro_batch x length over the median),
      steps_per_second (candidate-steps), state_mib (of all candidates), held_mib (of the first device: its part of the
      base, rows and states), idle (which devices do others' work again), compile_seconds, and what was measured.
    """
    model = build(config, remat=remat, flash=flash)
    abstract = model.abstract(jnp.dtype(dtype))
    places = None if mesh is None else of_params(mesh, abstract)
    params = jax.jit(lambda key: init_params(abstract, key), out_shardings=places)(jax.random.key(0))
    draw = np.random.default_rng(0)
    sides = {}
    for side in ("forget", "retain"):
        rows = draw.integers(0, config.vocab_size, (micro_batch * 2, length)).tolist()
        sides[side] = pack(rows, [length // 2] * len(rows))
    wanted = objective(TERMS)
    schedule = plan(sides, [Pace(micro_batch, 1, 1, seed) for seed in range(candidates)])
    stores = {
        side: to_device(tokens, base_reference(model, params, tokens, wanted.needs(side)))
        for side, tokens in sides.items()
    }
    adapter = lora(config, tuple(config.linears), rank)
    h = stack([_settings(i, candidates, rank) for i in range(candidates)])
    task = Task(model, adapter, wanted, False, tokens_at_once, mesh=mesh)
    if mesh is not None:
        stores = put(stores, of_store(mesh, stores))
        h = put(h, of_candidates(mesh, {}, h))
    states = fresh_states(task, params, h)
    state_bytes = sum(x.nbytes for x in jax.tree.leaves(states))
    held_mib = round(bytes_held((params, stores, states)) / 2**20, 1)
    step = schedule.steps[0]

    def work() -> Any:
        own = work_of(step)
        return own if mesh is None else put(own, of_work(mesh, own))

    begin = time.perf_counter()
    program = compiled_step(task).lower(params, stores, states, work(), h, step.width, step.answers)
    program = program.compile()
    compile_seconds = time.perf_counter() - begin

    def update() -> Any:
        nonlocal states
        states, metrics = program(params, stores, states, work(), h)
        return states, metrics

    seconds = laps({"step": update}, repeats)["step"]
    tokens = candidates * 2 * micro_batch * length
    return {
        "bench": "train",
        "candidates": candidates,
        "micro_batch": micro_batch,
        "length": length,
        "rank": rank,
        "dtype": dtype,
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "seconds": spread(seconds),
        "tokens_per_second": float(f"{tokens / spread(seconds)['median']:.4g}"),
        "steps_per_second": float(f"{candidates / spread(seconds)['median']:.4g}"),
        "state_mib": round(state_bytes / 2**20, 1),
        "held_mib": held_mib,
        "idle": [] if mesh is None else idle(mesh, candidates, 2 * micro_batch),
        "compile_seconds": float(f"{compile_seconds:.3g}"),
        **device(mesh),
    }


def _settings(number: int, candidates: int, rank: int) -> dict[str, Any]:
    """Candidates that differ in learning rate and initialisation."""
    return {
        "learning_rate": 1e-4 * (1 + number / candidates),
        "weight_decay": 0.01,
        "warmup_updates": 0,
        "total_updates": 1000,
        "schedule": SCHEDULES.index("linear"),
        "max_grad_norm": float("inf"),
        "term_weights": {"npo": 0.4, "gdr": 0.2, "klr": 0.4},
        "beta": 0.1,
        "lora_alpha": rank,
        "lora_rank": rank,
        "dropout": 0.0,
        "init_seed": number,
    }
