"""Training throughput: candidate-tokens per second of N LoRA candidates in one program."""

import functools
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from unlearnjax.adapters.lora import lora
from unlearnjax.bench.timing import bytes_held, device, laps, matmul_rate, published_rate, spread
from unlearnjax.data.schedule import Pace, plan
from unlearnjax.data.tokens import Store, Tokens, pack, to_device
from unlearnjax.distributed.choose import best_way, this_chip
from unlearnjax.distributed.estimate import candidates_apart, remat_of, step_flops
from unlearnjax.distributed.processes import put
from unlearnjax.distributed.programs import Workload
from unlearnjax.distributed.rules import idle, of_candidates, of_params, of_store, of_work
from unlearnjax.models.abstract import init_params
from unlearnjax.models.attention import flash_suits
from unlearnjax.models.config import ModelConfig, Remat
from unlearnjax.models.decoder import build
from unlearnjax.models.protocol import Model
from unlearnjax.objectives.objective import objective
from unlearnjax.training.hyperparameters import SCHEDULES, stack
from unlearnjax.training.loop import fresh_states, work_of
from unlearnjax.training.reference import base_reference
from unlearnjax.training.step import Task, compiled_step, together

TERMS = ("npo", "gdr", "klr")  # ZJUKLAB's
SMALL = ModelConfig(
    "olmo", 4096, 256, 768, 4, 8, 8, 32, "layer", max_positions=2048, eos_token_ids=(), pad_token_id=0
)  # fmt: skip


class _Base(NamedTuple):
    """What all numbers of candidates are measured on."""

    model: Model
    params: Any
    sides: dict[str, Tokens]
    stores: dict[str, Store]


@functools.lru_cache(maxsize=1)
def _base(config: ModelConfig, dtype: str, micro_batch: int, length: int, mesh: Mesh | None) -> _Base:
    """Random weights, rows, and what the base says of them."""
    model = build(config)
    abstract = model.abstract(jnp.dtype(dtype))
    places = None if mesh is None else of_params(mesh, abstract)
    params = jax.jit(lambda key: init_params(abstract, key), out_shardings=places)(jax.random.key(0))
    draw = np.random.default_rng(0)
    sides = {}
    for side in ("forget", "retain"):
        rows = draw.integers(0, config.vocab_size, (micro_batch * 2, length)).tolist()
        sides[side] = pack(rows, [length // 2] * len(rows))
    wanted = objective(TERMS)
    stores = {
        side: to_device(tokens, base_reference(model, params, tokens, wanted.needs(side)))
        for side, tokens in sides.items()
    }
    return _Base(model, params, sides, stores if mesh is None else put(stores, of_store(mesh, stores)))


def as_a_run_does(
    config: ModelConfig, work: Workload, mesh: Mesh | None = None, flash: bool | None = None
) -> tuple[Model, Workload, bool]:
    """The decoder that a run on these devices trains with, the workload with its way through it, and whether attention
    is cuDNN's; what is given is left as it is."""
    chip = this_chip(1 if mesh is None else mesh.size)
    if chip is not None:
        work, _ = best_way(config, work, {} if mesh is None else dict(mesh.shape), chip)
    if flash is None:
        flash = mesh is None and flash_suits(config.head_dim, jnp.dtype(work.dtype), [work.length])
    return build(config, remat=work.remat, flash=flash), work, flash


def measure(
    config: ModelConfig,
    *,
    candidates: int,
    micro_batch: int = 4,
    length: int = 128,
    rank: int = 32,
    dtype: str = "float32",
    dropout: float = 0.0,
    mesh: Mesh | None = None,
    remat: Remat | None = None,
    tokens_at_once: int | None = None,
    flash: bool | None = None,
    repeats: int = 5,
) -> dict[str, Any]:
    """Time one optimizer update of every candidate: `micro_batch` forget rows and as many retain rows of `length`
    tokens each, NPO + GDR + KLR, AdamW, on a model of this shape with random weights.

    Args:
      mesh: its devices share the work as in `train`; candidates and rows that do not divide are not cut.
      remat, tokens_at_once, flash: how the step goes through the model; by default as a run on these devices does.

    Returns:
      seconds per step (median, least, most), tokens_per_second (candidates x 2 x micro_batch x length over the median),
      steps_per_second (candidate-steps), tflops (of a device, in 10^12 a second: the model's own products, without what
      is recomputed), matmul_tflops (of a large matrix product there), percent_of_matmul, mfu_percent (of the published
      rate, where it is known for the device and dtype, else None), state_mib (of all candidates), held_mib (of the
      first device: its part of the base, rows and states), temporary_mib (what the step needs beside, by XLA), idle
      (which devices do others' work again), compile_seconds, and what was measured.
    """
    work = Workload(
        candidates, micro_batch, length, rank, TERMS, dtype, 2 * micro_batch * length, tokens_at_once=tokens_at_once,
        remat=remat,
    )  # fmt: skip
    model, work, flash = as_a_run_does(config, work, mesh, flash)
    base = _base(config, dtype, micro_batch, length, mesh)
    params, wanted = base.params, objective(TERMS)
    schedule = plan(base.sides, [Pace(micro_batch, 1, 1, seed) for seed in range(candidates)])
    adapter = lora(config, tuple(config.linears), rank)
    h = stack([_settings(i, candidates, rank, dropout) for i in range(candidates)])
    task = Task(model, adapter, wanted, dropout > 0, work.tokens_at_once, mesh=mesh)
    if mesh is not None:
        h = put(h, of_candidates(mesh, {}, h))
    states = fresh_states(task, params, h)
    state_bytes = sum(x.nbytes for x in jax.tree.leaves(states))
    held_mib = round(bytes_held((params, base.stores, states)) / 2**20, 1)
    step = schedule.steps[0]

    def rows() -> Any:
        own = work_of(step)
        return own if mesh is None else put(own, of_work(mesh, own))

    begin = time.perf_counter()
    program = compiled_step(task).lower(params, base.stores, states, rows(), h, step.width, step.answers)
    program = program.compile()
    compile_seconds = time.perf_counter() - begin

    def update() -> Any:
        nonlocal states
        states, metrics = program(params, base.stores, states, rows(), h)
        return states, metrics

    seconds = laps({"step": update}, repeats)["step"]
    tokens = candidates * 2 * micro_batch * length
    achieved = step_flops(config, work, recomputed=False) / spread(seconds)["median"] / (mesh.size if mesh else 1)
    rate, peak = matmul_rate(dtype), published_rate(dtype)
    own = candidates_apart(work, {} if mesh is None else dict(mesh.shape))
    return {
        "bench": "train",
        "candidates": candidates,
        "micro_batch": micro_batch,
        "length": length,
        "rank": rank,
        "dropout": dropout,
        "dtype": dtype,
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "remat": remat_of(config, work),
        "together": together(task, own, 2 * micro_batch * length, candidates // own),
        "flash": flash,
        "seconds": spread(seconds),
        "tokens_per_second": float(f"{tokens / spread(seconds)['median']:.4g}"),
        "steps_per_second": float(f"{candidates / spread(seconds)['median']:.4g}"),
        "tflops": float(f"{achieved / 1e12:.4g}"),
        "matmul_tflops": float(f"{rate / 1e12:.4g}"),
        "percent_of_matmul": float(f"{100 * achieved / rate:.3g}"),
        "mfu_percent": None if peak is None else float(f"{100 * achieved / peak:.3g}"),
        "state_mib": round(state_bytes / 2**20, 1),
        "held_mib": held_mib,
        "temporary_mib": round(program.memory_analysis().temp_size_in_bytes / 2**20, 1),
        "idle": [] if mesh is None else idle(mesh, candidates, 2 * micro_batch),
        "compile_seconds": float(f"{compile_seconds:.3g}"),
        **device(mesh),
    }


def _settings(number: int, candidates: int, rank: int, dropout: float) -> dict[str, Any]:
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
        "dropout": dropout,
        "init_seed": number,
    }
