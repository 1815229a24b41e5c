"""Training some layers at full rank (Selective Amnesia, SUGD's last layers) and a LoRA on them, against all weights.

    python benchmarks/restricted_training.py --out benchmarks/results/restricted_training_cpu.json

One optimizer update (Selective Amnesia's objective, 12 rows of 64 tokens, AdamW) of a decoder of OLMo's kind with
random weights; each way is a process of its own, and they take turns, lap by lap. Reported: seconds per update, the
operations that XLA counts in it, bytes of what is held per candidate (weights that train, their gradient and two
moments), each over those of full training, and the bound: what a forward pass, the backward pass through the
activations above the lowest trained layer and the weights' own gradients come to, by counting products alone.
"""

import argparse
from typing import Any

import _common as bench

WAYS = ("full", "all layers", "lowest MLPs", "lowest layers", "highest layers", "highest MLPs", "LoRA", "highest LoRA")
ROWS, LENGTH, UPDATES = 12, 64, 4


def share_above(way: str, layers: int, some: int) -> float:
    """The share of the layers that the backward pass goes through."""
    return some / layers if way.startswith("highest") else 1.0


def one(way: str, layers: int, hidden: int, vocabulary: int, some: int) -> tuple[dict[str, Any], Any]:
    """A way's set-up and laps."""
    import time

    import jax
    import jax.numpy as jnp
    import numpy as np

    from unlearnjax.adapters.full import full
    from unlearnjax.adapters.lora import lora
    from unlearnjax.adapters.restricted import restricted
    from unlearnjax.data.sequences import lockstep, mixed
    from unlearnjax.data.tokens import pack, pooled, to_device
    from unlearnjax.models.abstract import init_params
    from unlearnjax.models.config import ModelConfig
    from unlearnjax.models.decoder import build
    from unlearnjax.objectives.objective import expand, objective
    from unlearnjax.objectives.pooled import ADAPTIVE
    from unlearnjax.training.hyperparameters import stack
    from unlearnjax.training.loop import fresh_states, work_of
    from unlearnjax.training.step import Task, compiled_step

    config = ModelConfig("olmo", vocabulary, hidden, 3 * hidden, layers, hidden // 32, hidden // 32, 32, "layer")
    model = build(config, unroll=True)
    params = jax.jit(lambda key: init_params(model.abstract(jnp.float32), key))(jax.random.key(0))
    low, high, every = range(some), range(layers - some, layers), range(layers)
    targets = tuple(config.linears)
    adapter = {
        "full": lambda: full(), "all layers": lambda: restricted(config, every, "all"),
        "lowest MLPs": lambda: restricted(config, low, "mlp"), "lowest layers": lambda: restricted(config, low, "all"),
        "highest layers": lambda: restricted(config, high, "all"),
        "highest MLPs": lambda: restricted(config, high, "mlp"), "LoRA": lambda: lora(config, targets, 32),
        "highest LoRA": lambda: lora(config, targets, 32, high),
    }[way]()  # fmt: skip
    draw = np.random.default_rng(0)
    texts = lambda: draw.integers(0, vocabulary, (ROWS * UPDATES // 2, LENGTH)).tolist()  # noqa: E731
    forget, retain = (pack(texts(), [LENGTH // 2] * (ROWS * UPDATES // 2)) for _ in range(2))
    pool = pooled(forget, retain)
    order = mixed(len(forget.length), len(retain.length), batch=ROWS, accumulation=1, epochs=1, seed=0)
    schedule = lockstep(pool, [order])
    weights = expand("selective_amnesia", "benchmark")
    h = stack([{
        "learning_rate": 1e-5, "weight_decay": 0.0, "warmup_updates": 0, "total_updates": UPDATES, "schedule": 1,
        "max_grad_norm": 1.0, "term_weights": weights, "beta": 0.1, "term_parameters": {"pool_retain": ADAPTIVE},
        "lora_alpha": 32, "lora_rank": 32, "dropout": 0.0, "init_seed": 0,
    }])  # fmt: skip
    task, stores = Task(model, adapter, objective(weights), False), {"pool": to_device(pool)}
    states = fresh_states(task, params, h)
    held = states.trainable, states.gradient, states.moments
    count = sum(x.size for x in jax.tree.leaves(states.trainable))
    first, begin = schedule.steps[0], time.perf_counter()
    lowered = compiled_step(task).lower(params, stores, states, work_of(first), h, first.width, first.answers)
    program = lowered.compile()
    info = {
        "compile_seconds": time.perf_counter() - begin, "trained_parameters": count,
        "all_parameters": sum(x.size for x in jax.tree.leaves(params)),
        "bytes_per_candidate": sum(x.nbytes for x in jax.tree.leaves(held)), "flops": program.cost_analysis()["flops"],
    }  # fmt: skip

    def lap() -> float:
        nonlocal states
        begin = time.perf_counter()
        for step in schedule.steps:
            states, _ = program(params, stores, states, work_of(step), h)
        jax.block_until_ready(states)
        return (time.perf_counter() - begin) / len(schedule.steps)

    lap()
    return info, bench.answers(lap, lambda: bench.memory(bench.jax_peak_mib()))


def bound(way: str, layers: int, hidden: int, vocabulary: int, some: int, trained: int) -> float:
    """Products of an update, in those of one forward pass over the linears: the forward pass, the activations' backward
    pass above the lowest trained layer, and the gradients of what trains; the head meets half of the tokens."""
    linears = layers * (4 + 9) * hidden * hidden
    head = vocabulary * hidden / 2
    forward = linears + head
    activations = share_above(way, layers, some) * linears + head
    gradients = linears + head if way == "full" else min(trained, linears)
    return (forward + activations + gradients) / forward


def main() -> None:
    p = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    p.add_argument("--layers", type=int, default=8)
    p.add_argument("--some", type=int, default=3, help="how many of them the restricted ways train")
    p.add_argument("--hidden", type=int, default=256)
    p.add_argument("--vocabulary", type=int, default=6600)
    p.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    p.add_argument("--laps", type=int, default=5)
    p.add_argument("--out", help="write the whole result to this JSON file")
    a = p.parse_args()
    sizes = (a.layers, a.hidden, a.vocabulary, a.some)
    hardware = bench.in_child(bench.hardware)
    ways = ["full", *(way for way in a.ways if way != "full")]
    jobs: dict[str, Any] = {way: (one, (way, *sizes)) for way in ways}
    done = bench.measure(jobs, a.laps, together=hardware["platform"] == "cpu")
    whole = done["full"]
    result: dict[str, Any] = {"benchmark": "restricted_training", "hardware": hardware, **vars(a), "cases": []}
    for way, found in done.items():
        trained = found.info["trained_parameters"]
        over = {key: found.info[key] / whole.info[key] for key in ("bytes_per_candidate", "flops")}
        products = [bound(w, *sizes, done[w].info["trained_parameters"]) for w in (way, "full")]
        line = {
            "way": way, "seconds_per_update": bench.spread(found.laps), **found.info,
            "share_trained": trained / found.info["all_parameters"],
            "over_full": {"seconds": bench.ratio(found.laps, whole.laps), **over, "bound": products[0] / products[1]},
            **found.after,
        }  # fmt: skip
        bench.emit(line)
        result["cases"].append(line)
    bench.write(a.out, result)


if __name__ == "__main__":
    main()
