"""Rows per second of greedy generation: ours, for one model and for N candidates at once, and transformers'.

    python benchmarks/generation.py --out benchmarks/results/generation_cpu.json
    ... --new-tokens 256 --forget LUME/forget_train.parquet --retain LUME/retain_train.parquet

Prompts are the forget rows', the same mix of lengths for every point: 8 at batch 1, 256 at the larger batches, of which
there are several then, of like lengths, as there are of a whole split (64 per candidate for N = 8). There is
no end token, so every row runs to --new-tokens: a model with random weights hardly ever ends a row, and where it did
the amount of work would hang on chance. Real models end most rows early, which favours batches that stop when all rows
have ended (ours) and rows one at a time (transformers at batch 1) over transformers' batches.

Compared: ours at batch 1, 32 and 64 with N = 1 (the base) and N = 8 LoRA candidates in one program, a row of each
candidate counting as a row; transformers' generate at batch 1, as the official script has it, and at batch 32 with left
padding, on the same weights (a folder that save_model wrote). Tokens are compared with transformers' one by one: the
base's at every batch size, and at batch 1 the last candidate's with those of its merged weights.
"""

import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import _common as bench
from _subject import Subject, describe, make, model_entry, stratified


class Point(NamedTuple):
    """One way to generate: `candidates` is 0 for the base alone."""

    batch: int
    candidates: int
    rows: int


class Plan(NamedTuple):
    """What a child does."""

    points: tuple[Point, ...]
    new_tokens: int
    dtype: str
    accelerator: bool


def candidates(config: Any, rank: int, count: int) -> Any:
    """Adapters of random, non-zero factors, small enough to leave the model a model: [N, layers, ...]."""
    import jax.numpy as jnp
    import numpy as np

    draw = np.random.default_rng(0)
    tree: dict[str, Any] = {}
    for name, (block, out, inner) in config.linears.items():
        a = draw.normal(size=(count, config.layers, rank, inner)) * inner**-0.5
        b = draw.normal(size=(count, config.layers, out, rank)) * 0.3 * rank**-0.5
        tree.setdefault(block, {})[name] = {"a": jnp.asarray(a, jnp.float32), "b": jnp.asarray(b, jnp.float32)}
    return {"layers": tree}


def prepare(folder: str, a: Any, count: int) -> Subject:
    """The base in `folder`, and beside it (`-merged`) the base with the last of `count` candidates merged in."""
    import dataclasses

    from unlearnjax.adapters.apply import add_delta
    from unlearnjax.adapters.lora import lora_weights
    from unlearnjax.models.language_model import load_model, save_model
    from unlearnjax.training.hyperparameters import index

    subject = make(folder, a)
    lm = load_model(folder, a.dtype)
    last = index(candidates(lm.config, subject.size.rank, count), count - 1)
    save_model(dataclasses.replace(lm, params=add_delta(lm.params, lora_weights(last))), folder + "-merged")
    return subject


def prompts_of(subject: Subject, rows: int) -> list[list[int]]:
    return stratified([prompt for prompt, _ in subject.rows["forget"]], rows)


def setup_ours(subject: Subject, plan: Plan) -> tuple[dict[str, Any], Callable[[str], Any]]:
    """Ours: a lap generates every point's rows; the first, untimed one compiles and is what is compared."""
    from unlearnjax.evaluation.generate import generate_candidates
    from unlearnjax.models.language_model import load_model

    lm = load_model(subject.folder, plan.dtype)
    adapters = {n: candidates(lm.config, subject.size.rank, n) for n in {p.candidates for p in plan.points} if n}

    def generate(point: Point) -> list[list[list[int]]]:
        return generate_candidates(
            lm.model, lm.params, adapters.get(point.candidates), prompts_of(subject, point.rows), eos_token_ids=(),
            pad_token_id=0, max_new_tokens=plan.new_tokens, batch_size=point.batch,
        )  # fmt: skip

    return _serve(plan, generate, lambda: bench.memory(bench.jax_peak_mib()))


def setup_transformers(subject: Subject, plan: Plan) -> tuple[dict[str, Any], Callable[[str], Any]]:
    """transformers' generate on the base; `outputs` also has what the merged model generates, for the comparison."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(bench.cores())
    device = "cuda" if plan.accelerator and torch.cuda.is_available() else "cpu"

    def load(folder: str) -> Any:
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, plan.dtype)).to(device).eval()
        # The official script leaves caches and kernels at transformers' defaults; so do we.
        assert loaded.generation_config.eos_token_id is None
        return loaded

    def generate(model: Any, prompts: list[list[int]], batch: int) -> list[list[int]]:
        out = []
        for begin in range(0, len(prompts), batch):
            chosen = prompts[begin : begin + batch]
            width = max(len(p) for p in chosen)
            ids = torch.tensor([[0] * (width - len(p)) + p for p in chosen], device=device)
            mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in chosen], device=device)
            with torch.inference_mode():
                new = model.generate(
                    input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=plan.new_tokens, pad_token_id=0
                )
            out += new[:, width:].tolist()
        return out

    base = load(subject.folder)
    merged_prompts = prompts_of(subject, min(p.rows for p in plan.points))
    merged = generate(load(subject.folder + "-merged"), merged_prompts, 1)
    info, answer = _serve(
        plan,
        lambda point: [generate(base, prompts_of(subject, point.rows), point.batch)],
        bench.memory,
    )
    return {**info, "merged": (len(merged_prompts), merged)}, answer


def _serve(
    plan: Plan, generate: Callable[[Point], list[list[list[int]]]], memory: Callable[[], dict[str, Any]]
) -> tuple[dict[str, Any], Callable[[str], Any]]:
    first, outputs = {}, {}
    for point in plan.points:
        begin = time.perf_counter()
        outputs[point] = generate(point)
        first[point] = time.perf_counter() - begin

    def answer(question: str) -> Any:
        if question != "lap":
            return memory()
        seconds = {}
        for point in plan.points:
            begin = time.perf_counter()
            got = generate(point)
            seconds[point] = time.perf_counter() - begin
            assert all(len(row) == plan.new_tokens for rows in got for row in rows)
        return seconds

    return {"outputs": outputs, "first": first}, answer


def agreement(ours: list[list[int]], theirs: list[list[int]]) -> dict[str, Any]:
    """Rows that are the same to the last token, and the share of tokens before a row's first difference."""
    assert len(ours) == len(theirs)
    same = [next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), len(a)) for a, b in zip(ours, theirs)]
    total = sum(len(a) for a in ours)
    return {
        "rows": len(ours),
        "rows_identical": sum(s == len(a) for s, a in zip(same, ours)),
        "tokens_identical_share": round(sum(same) / total, 5),
    }


def main() -> None:
    p = bench.common_arguments(__doc__.splitlines()[0])
    p.add_argument("--new-tokens", type=int, default=64, help="max_new_tokens; the official protocol has 256")
    p.add_argument("--candidates", type=int, default=8)
    a = bench.parse(p)
    laps = a.laps or (1 if a.quick else 3)
    few, many, each, limit = (2, 4, 4, 4) if a.quick else (8, 256, 64, a.new_tokens)
    batches = (1, 4) if a.quick else (1, 32, 64)
    ours = [Point(b, n, few if b == 1 else each if n else many) for n in (0, a.candidates) for b in batches]
    theirs = [Point(b, 0, few if b == 1 else many) for b in batches[:2]]
    with tempfile.TemporaryDirectory() as folder:
        subject = bench.in_child(prepare, folder + "/model", a, a.candidates)
        cpu = subject.hardware["platform"] == "cpu"
        jobs = {
            "ours": (setup_ours, (subject, Plan(tuple(ours), limit, a.dtype, not cpu))),
            "transformers": (setup_transformers, (subject, Plan(tuple(theirs), limit, a.dtype, not cpu))),
        }
        measured = bench.measure(jobs, laps, together=cpu)

    points, rates = [], {}
    for name, m in measured.items():
        for point in ours if name == "ours" else theirs:
            n = max(point.candidates, 1)
            key = f"{name}, N = {n}, batch {point.batch}"
            rates[key] = [n * point.rows / lap[point] for lap in m.laps]
            points.append(
                {
                    "job": key,
                    "adapters": point.candidates > 0,
                    "rows": n * point.rows,
                    "rows_per_second": bench.spread(rates[key]),
                    "tokens_per_second": bench.spread([r * limit for r in rates[key]]),
                    "first_call_seconds": round(m.info["first"][point], 2),
                }
            )
            bench.emit(points[-1])
    ratios = []
    for below in (k for k in rates if k.startswith("transformers")):
        for above in (k for k in rates if k != below):
            ratios.append({"ratio": above, "over": below, **bench.ratio(rates[above], rates[below])})
            bench.emit(ratios[-1])
    # Every point of ours against transformers' point with the same rows.
    outputs, other = (measured[name].info["outputs"] for name in ("ours", "transformers"))
    checks = []
    for mine in ours[: len(batches)]:
        for their in (x for x in theirs if x.rows == mine.rows):
            named = f"the base, ours at batch {mine.batch} against transformers at batch {their.batch}"
            checks.append({"agreement": named, **agreement(outputs[mine][0], other[their][0])})
    count, merged = measured["transformers"].info["merged"]
    single = ours[len(batches)]
    assert single.rows == count
    named = "the last candidate, ours at batch 1 against transformers on its merged weights"
    checks.append({"agreement": named, **agreement(outputs[single][-1], merged)})
    for check in checks:
        bench.emit(check)
    bench.write(
        a.out,
        {
            "benchmark": "generation",
            "hardware": subject.hardware,
            "model": model_entry(subject.size, a.dtype),
            "settings": {"new_tokens": limit, "candidates": a.candidates, "laps": laps, "end_tokens": "none"},
            "rows": describe(subject),
            "points": points,
            "ratios": ratios,
            "agreement": checks,
            "memory": {name: m.after for name, m in measured.items()},
        },
    )


if __name__ == "__main__":
    main()
