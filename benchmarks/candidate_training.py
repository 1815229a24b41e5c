"""Candidate-steps per second: N LoRA candidates in one program, our own step one at a time, and the published code.

    python benchmarks/candidate_training.py --torch --out benchmarks/results/candidate_training_cpu.json
    ... --forget LUME/forget_train.parquet --retain LUME/retain_train.parquet

A candidate-step is one optimizer update of one candidate, of one micro-batch of forget rows and one of retain rows
(NPO, GDR and KLR). Compared, on the same rows cut the same way, the same model and the same adapters:

- ours at N = 1, 2, 4, 8, 16 by the library's own step, schedule of length buckets and reference;
- ours one candidate after another: the rate of N = 1. It is measured for one candidate and holds for any number of
  them, since the candidates of such a run share nothing;
- with --torch, ZJUKLAB's recipe as its code does it (benchmarks/_torch_recipe.py), also one after another.

A lap times one step of every program (width) of the plan; the plan of one epoch says how often each width comes, and
the rate is that epoch's updates over the seconds it takes by these times. Compiling is left out and reported apart, and
so is the reference, which is computed once, before any candidate is trained, and serves them all. Jobs take their laps
in turn; ratios are lap by lap.
"""

import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import _common as bench
import _flops
import _torch_recipe
from _subject import LIMIT, Subject, describe, make, model_entry

TERMS = ("npo", "gdr", "klr")


class Settings(NamedTuple):
    """How our side is run."""

    dtype: str
    micro_batch: int
    dropout: float
    buckets: int
    burst: int  # steps of a width per lap, dispatched together


def _tokens(subject: Subject) -> dict[str, Any]:
    from unlearnjax.data.tokens import pack

    return {s: pack([p + x for p, x in rows], [len(p) for p, _ in rows]) for s, rows in subject.rows.items()}


def prepare(folder: str, a: Any) -> tuple[Subject, float]:
    """The model, the rows, and what the base says of them (in `folder`, for every N); and how long the last took."""
    import numpy as np

    from unlearnjax.models.language_model import load_model
    from unlearnjax.objectives.objective import objective
    from unlearnjax.training.reference import base_reference

    subject = make(folder, a)
    lm = load_model(folder, a.dtype)
    begin = time.perf_counter()
    for side, tokens in _tokens(subject).items():
        reference = base_reference(lm.model, lm.params, tokens, objective(TERMS).needs(side))
        held = {name: np.asarray(x) for name, x in reference._asdict().items() if x is not None}
        np.savez(f"{folder}/reference-{side}.npz", **held)
    return subject, time.perf_counter() - begin


def candidates(count: int, updates: list[int], size: Any, dropout: float) -> Any:
    """Candidates that differ in all that may differ without changing the amount of work."""
    from unlearnjax.training.hyperparameters import SCHEDULES, stack

    return stack(
        [
            {
                "learning_rate": _torch_recipe.LEARNING_RATE * (1 + i / count),
                "weight_decay": _torch_recipe.WEIGHT_DECAY,
                "warmup_updates": updates[i] // 5,
                "total_updates": updates[i],
                "schedule": SCHEDULES.index("linear"),
                "max_grad_norm": float("inf"),
                "term_weights": {"npo": 0.4 - 0.1 * (i % 2), "klr": 0.4 - 0.1 * (i % 2), "gdr": 0.2 + 0.2 * (i % 2)},
                "beta": _torch_recipe.BETA,
                "lora_alpha": size.rank,
                "lora_rank": size.rank,
                "dropout": dropout,
                "init_seed": i,
            }
            for i in range(count)
        ]
    )


def setup(subject: Subject, settings: Settings, count: int) -> tuple[dict[str, Any], Callable[[str], Any]]:
    """N candidates: plan, compile every program of the plan, and run each once."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from unlearnjax.adapters.lora import lora
    from unlearnjax.bench.training import as_a_run_does
    from unlearnjax.data.schedule import Pace, plan, programs
    from unlearnjax.data.tokens import Reference, to_device
    from unlearnjax.distributed.programs import Workload
    from unlearnjax.models.language_model import load_model
    from unlearnjax.objectives.objective import objective
    from unlearnjax.training.loop import work_of
    from unlearnjax.training.state import init_state
    from unlearnjax.training.step import Task, compiled_step

    lm = load_model(subject.folder, settings.dtype)
    sides = _tokens(subject)
    paces = [Pace(settings.micro_batch, 1, 1, seed) for seed in range(count)]
    schedule = plan(sides, paces, buckets=settings.buckets)
    wanted = objective(TERMS)
    adapter = lora(lm.config, tuple(lm.config.linears), subject.size.rank)
    h = candidates(count, schedule.updates.tolist(), subject.size, settings.dropout)
    stores = {}
    for side, tokens in sides.items():
        held = np.load(f"{subject.folder}/reference-{side}.npz")
        stores[side] = to_device(tokens, Reference(**{name: jnp.asarray(held[name]) for name in held.files}))
    states = jax.jit(jax.vmap(lambda c: init_state(adapter, lm.params, c)))(h)
    state_mib = sum(x.nbytes for x in jax.tree.leaves(states)) / 2**20
    work = Workload(count, settings.micro_batch, LIMIT, subject.size.rank, TERMS, settings.dtype)
    decoder, work, _ = as_a_run_does(lm.config, work)
    jitted = compiled_step(Task(decoder, adapter, wanted, settings.dropout > 0, work.tokens_at_once))
    # A program's steps with every slot filled; the epoch's last step may have empty ones.
    full = {p: [s for s in schedule.steps if (s.width, s.answers) == p] for p in programs(schedule)}
    full = {p: [s for s in steps if (s.micro_weight > 0).all()] or steps for p, steps in full.items()}
    before = bench.peak_rss_mib()
    run: dict[tuple[int, int], Any] = {}
    begin = time.perf_counter()
    for (width, answers), steps in full.items():
        run[width, answers] = jitted.lower(lm.params, stores, states, work_of(steps[0]), h, width, answers).compile()
    compile_seconds = time.perf_counter() - begin
    compiled_peak = bench.peak_rss_mib()
    memory = max((r.memory_analysis() for r in run.values()), key=lambda m: m.temp_size_in_bytes)

    turn = dict.fromkeys(full, 0)

    def burst(program: tuple[int, int], steps: int) -> Any:
        nonlocal states
        metrics = None
        for _ in range(steps):
            step = full[program][turn[program] % len(full[program])]
            turn[program] += 1
            states, metrics = run[program](lm.params, stores, states, work_of(step), h)
        jax.block_until_ready((states, metrics))
        return metrics

    first = [float(burst(p, 1).loss[0]) for p in full]  # each program's first run is not timed
    most = 2 * settings.micro_batch * LIMIT
    edge = 2048 if jax.default_backend() == "cpu" else 8192
    shapes = {"square": (edge,) * 3, "model": (most, subject.size.width, subject.size.intermediate)}
    rates = bench.matmul_rates(bench.jax_matmul(settings.dtype), shapes)

    def answer(question: str) -> dict[str, Any]:
        if question == "lap":
            seconds = []
            for program in full:
                begin = time.perf_counter()
                burst(program, settings.burst)
                seconds.append((time.perf_counter() - begin) / settings.burst)
            return {"seconds": seconds, "finite": bool(jnp.all(states.alive)), "gemm": rates()}
        return bench.memory(bench.jax_peak_mib())

    counts = [sum((s.width, s.answers) == p for s in schedule.steps) for p in full]
    flops = [_flops.ours(subject.size, settings.micro_batch, *p) for p in full]
    info = {
        "programs": [
            {"width": w, "answers": x, "steps": c, "gflop": round(f / 1e9, 3)}
            for (w, x), c, f in zip(full, counts, flops)
        ],
        "updates": int(schedule.updates.sum()),
        "padding_share": schedule.padding_share,
        "gflop_per_candidate_step": sum(c * f for c, f in zip(counts, flops)) / sum(counts) / 1e9,
        "compile_seconds": compile_seconds,
        "first_loss": first[0],
        "state_mib": state_mib,
        "rss_mib_before_compiling": before,
        "rss_mib_after_compiling": compiled_peak,
        "program_mib": {
            "arguments": memory.argument_size_in_bytes / 2**20,
            "temporaries": memory.temp_size_in_bytes / 2**20,
            "outputs": memory.output_size_in_bytes / 2**20,
            "aliased": memory.alias_size_in_bytes / 2**20,
        },
    }
    return info, answer


def rounded(x: Any) -> Any:
    if isinstance(x, dict):
        return {k: rounded(v) for k, v in x.items()}
    return float(f"{x:.4g}") if isinstance(x, float) else x


def point(name: str, measured: Any, rate: list[float], gflop: float, **more: Any) -> dict[str, Any]:
    """What is reported of one job."""
    info = dict(measured.info)
    gemm = {k: max(lap["gemm"][k] for lap in measured.laps) for k in ("square", "model")}
    if not all(lap["finite"] for lap in measured.laps):
        raise SystemExit(f"benchmark: {name}: the loss is no longer finite; the figures would mean nothing")
    achieved = [r * gflop for r in rate]
    return {
        "job": name,
        **more,
        "candidate_steps_per_second": bench.spread(rate),
        "gflop_per_candidate_step": float(f"{gflop:.4g}"),
        "gflops": bench.spread(achieved),
        "gemm_gflops": rounded(gemm),
        "share_of_square_gemm": bench.spread([a / lap["gemm"]["square"] for a, lap in zip(achieved, measured.laps)]),
        **rounded({k: v for k, v in info.items() if k != "gflop_per_candidate_step"}),
        **measured.after,
    }


def main() -> None:
    p = bench.common_arguments(__doc__.splitlines()[0])
    p.add_argument("--torch", action="store_true", help="measure the published code's way too")
    p.add_argument("--candidates", default="1,2,4,8,16", help="the values of N; 1 is always measured")
    p.add_argument("--micro-batch", type=int, default=4)
    p.add_argument("--dropout", type=float, default=0.05)
    p.add_argument("--buckets", type=int, default=5, help="compiled widths at most (recipes: 8)")
    a = bench.parse(p)
    counts = sorted({1, *(int(n) for n in a.candidates.split(","))}) if not a.quick else [1, 2]
    laps = a.laps or (1 if a.quick else 3)
    with tempfile.TemporaryDirectory() as folder:
        subject, reference_seconds = bench.in_child(prepare, folder + "/model", a)
        cpu = subject.hardware["platform"] == "cpu"
        ours = Settings(a.dtype, a.micro_batch, a.dropout, 1 if a.quick else a.buckets, 1 if cpu else 8)
        theirs = _torch_recipe.Settings(a.dtype, a.micro_batch, a.dropout, 2 if cpu else 16, not cpu)
        jobs = {f"ours, N = {n}": (setup, (subject, ours, n)) for n in counts}
        if a.torch:
            jobs["torch, one after another"] = (_torch_recipe.setup, (subject, theirs))
        measured = bench.measure(jobs, laps, together=cpu)

    rates, points = {}, []
    for name, m in measured.items():
        if name.startswith("torch"):
            rates[name] = [1 / lap["seconds"] for lap in m.laps]
            gflop = _flops.torch(subject.size, a.micro_batch, LIMIT) / 1e9
        else:
            steps = [x["steps"] for x in m.info["programs"]]
            epoch = [sum(c * s for c, s in zip(steps, lap["seconds"])) for lap in m.laps]
            rates[name] = [m.info["updates"] / seconds for seconds in epoch]
            gflop = m.info["gflop_per_candidate_step"]
            for i, program in enumerate(m.info["programs"]):
                program["seconds"] = bench.spread([lap["seconds"][i] for lap in m.laps])
        points.append(point(name, m, rates[name], gflop))
        bench.emit(points[-1])
    ratios = []
    for below in ("ours, N = 1", "torch, one after another"):
        for above in (n for n in rates if n.startswith("ours") and n != below and below in rates):
            ratios.append({"ratio": above, "over": below, **bench.ratio(rates[above], rates[below])})
            bench.emit(ratios[-1])
    bench.write(
        a.out,
        {
            "benchmark": "candidate_training",
            "hardware": subject.hardware,
            "model": model_entry(subject.size, a.dtype),
            "settings": {"micro_batch": a.micro_batch, "dropout": a.dropout, "buckets": ours.buckets, "laps": laps},
            "rows": describe(subject),
            "reference_seconds": round(reference_seconds, 2),
            "flops": _flops.FORMULA,
            "points": points,
            "ratios": ratios,
        },
    )


if __name__ == "__main__":
    main()
