"""What jobs take on machines that are not here: `unlearnjax plan` of three models, many candidates and five slices.

    python benchmarks/plans.py --out benchmarks/results/plans_tpu.json        # hours; what is there already is kept
    python benchmarks/plans.py --out benchmarks/results/plans_tpu.json --table        # what is there, as Markdown

For OLMo-1B, OLMo-7B and Llama-3-70B (bfloat16 base, LoRA of rank 32 on all linears, NPO + GDR + KLR, 4 + 4 rows of 256
tokens per candidate and step), 2, 16 and 64 candidates on v5e-8, v5e-16, v5e-256, v5p-64 and v6e-256, and the largest
number of candidates (powers of two, and those and a half) that fits: the training step is compiled by TPUs' own
compiler, on the mesh that a closed form calls fastest and, where that does not fit, the next two. What that form puts
at more than twice a device's memory on every mesh is not compiled. Reported for each: memory of a device, products,
bytes, bytes sent, and the times that each limit of the chip alone would take. Nothing is run: these are programs that
compile and fit, not speeds.

--scaling: how cost grows instead, with more and more candidates on 16 chips of v5e, and with two to a chip on 8 to 256
of them (Llama-3-70B: one to two chips, from 16 chips on). The efficiency of this, weak scaling, is the time of the
slowest limit on the fewest chips over that on more.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import _common as bench

MODELS = {
    "OLMo-1B": {"family": "olmo", "vocab_size": 50304, "hidden_size": 2048, "intermediate_size": 8192, "layers": 16,
                "heads": 16, "kv_heads": 16, "head_dim": 128, "norm": "layer"},
    "OLMo-7B": {"family": "olmo", "vocab_size": 50304, "hidden_size": 4096, "intermediate_size": 11008, "layers": 32,
                "heads": 32, "kv_heads": 32, "head_dim": 128, "norm": "layer"},
    "Llama-3-70B": {"family": "llama", "vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672,
                    "layers": 80, "heads": 64, "kv_heads": 8, "head_dim": 128, "norm": "rms"},
}  # fmt: skip
TOPOLOGIES = ("v5e-8", "v5e-16", "v5e-256", "v5p-64", "v6e-256")
COUNTS = (2, 16, 64)
MORE = (2, 4, 8, 16, 64)  # on the same chips
CHIPS = (8, 16, 64, 256)
PER_CHIP = {"OLMo-1B": 2, "OLMo-7B": 2, "Llama-3-70B": 0.5}  # candidates, for weak scaling
STEPS = [1, *(n for power in (2**i for i in range(1, 12)) for n in (power, power * 3 // 2)), 4096]  # 1, 2, 3, 4, 6 ...


def model(name: str) -> Any:
    from unlearnjax.models.config import ModelConfig

    return ModelConfig(**MODELS[name])  # type: ignore[arg-type]


def guess(name: str, topology: str) -> int:
    """Which of `STEPS` fits at most, by the closed form: where to begin to look."""
    from unlearnjax.distributed.choose import best_way, fits, meshes
    from unlearnjax.distributed.programs import Workload
    from unlearnjax.distributed.topology import parse_topology

    place = parse_topology(topology)

    def holds(n: int) -> bool:
        work = Workload(candidates=n)
        first = meshes(model(name), work, place.devices, place.chip)[0]
        return fits(best_way(model(name), work, first, place.chip)[1], place.chip.memory)

    return max((n for n in STEPS if holds(n)), default=STEPS[0])


def planned(name: str, topology: str, candidates: int) -> dict[str, Any]:
    """The training step on the first mesh that fits, of three."""
    from unlearnjax.distributed.choose import best_way, meshes
    from unlearnjax.distributed.mesh import describe_sizes
    from unlearnjax.distributed.plan import make_plan, plan_as_plain
    from unlearnjax.distributed.programs import Workload
    from unlearnjax.distributed.topology import parse_topology
    from unlearnjax.errors import UserError

    place, work = parse_topology(topology), Workload(candidates=candidates)
    tried = meshes(model(name), work, place.devices, place.chip)
    # Where none fits the first one is the nearest to it.
    held = best_way(model(name), work, tried[0], place.chip)[1].held
    gib = {"total": round(held / 2**30, 2), "available": round(place.chip.memory / 2**30, 2)}
    found = {"mesh": describe_sizes(tried[0]), "fits": False, "gib": gib, "by": "closed form"}
    if held > 2 * place.chip.memory:
        return found
    found["by"] = "the compiler failed"
    for sizes in tried[:3]:
        try:
            found = plan_as_plain(make_plan(model(name), place, work, sizes, whole=False))["tried"][0]
            del found["compile_seconds"]  # beside whatever else ran
        except UserError as error:
            print(error, flush=True)
            continue
        if found["fits"]:
            break
    return found


def largest(ask: Any, first: int) -> int:
    """The largest of `STEPS` that fits, looked for from `first` on; 0: none does. `ask(n)`: whether n candidates do."""
    at = STEPS.index(first)
    if ask(STEPS[at]):
        while at + 1 < len(STEPS) and ask(STEPS[at + 1]):
            at += 1
        return STEPS[at]
    while at > 0 and not ask(STEPS[at - 1]):
        at -= 1
    return STEPS[at - 1] if at > 0 else 0


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    p.add_argument("--topologies", nargs="+", default=list(TOPOLOGIES))
    p.add_argument("--scaling", action="store_true", help="how cost grows only")
    p.add_argument("--table", action="store_true", help="print what is there and compile nothing")
    a = p.parse_args()
    kept = json.loads(a.out.read_text(encoding="utf-8")) if a.out.exists() else {"benchmark": "plans", "cases": []}
    if a.table:
        print(table(kept), growth(kept), sep="\n\n")
        return
    kept["hardware"] = bench.hardware()
    done = {(c["model"], c["topology"], c["candidates"]): c for c in kept["cases"]}

    def case(name: str, topology: str, candidates: int) -> dict[str, Any]:
        key = (name, topology, candidates)
        if key not in done:
            done[key] = {"model": name, "topology": topology, "candidates": candidates,
                         **planned(name, topology, candidates)}  # fmt: skip
            kept["cases"] = list(done.values())
            keep(kept, a.out)
            found = done[key]
            fits = "fits" if found["fits"] else "does not fit"
            print(f"{name}, {candidates} candidates on {topology}: {found['mesh']}, {fits}, "
                  f"{found['gib']['total']} GiB", flush=True)  # fmt: skip
        return done[key]

    if a.scaling:
        for name in a.models:
            scaling(name, case)
        return
    for name in a.models:
        for topology in a.topologies:
            fits = lambda n, name=name, topology=topology: bool(case(name, topology, n)["fits"])  # noqa: E731
            for n in COUNTS:
                fits(n)
            top = largest(fits, guess(name, topology))
            kept.setdefault("largest", {}).setdefault(name, {})[topology] = top
            keep(kept, a.out)
            print(f"{name} on {topology}: {top} candidates at most", flush=True)


def table(kept: dict[str, Any]) -> str:
    """A row per model and slice: GiB of a device and the time of the slowest limit for each of `COUNTS`, the mesh of
    the middle one, and the largest number that fits."""
    lines = ["| | " + " | ".join(f"N = {n}: GiB, ms" for n in COUNTS) + f" | mesh of N = {COUNTS[1]} | largest N |",
             "| --- |" + " ---: |" * len(COUNTS) + " --- | ---: |"]  # fmt: skip
    found = {(c["model"], c["topology"], c["candidates"]): c for c in kept["cases"]}
    for name, own in kept.get("largest", {}).items():
        for topology, top in own.items():
            cases = [found[name, topology, n] for n in COUNTS]
            most = f"at least {top}" if top == STEPS[-1] else str(top)
            cells = [_cell(c) for c in cases] + [cases[1]["mesh"] if cases[1]["fits"] else "", most]
            lines.append(f"| {name}, {topology} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(case: dict[str, Any]) -> str:
    if not case["fits"]:
        if case.get("by") == "the compiler failed":
            return "compiler failed"
        about = "about " if case.get("by") else ""
        return f"no ({about}{case['gib']['total']:.1f})"
    return f"{case['gib']['total']:.1f}, {_short(1000 * max(case['seconds'].values()))}"


def _short(x: float) -> str:
    """Three digits, and no exponent."""
    if x < 0.0005:
        return "0"
    return f"{x:.0f}" if x >= 100 else f"{x:.3g}"


def keep(found: dict[str, Any], file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def scaling(name: str, case: Any) -> None:
    """As many candidates to a chip, on more and more of them; before that, more and more on the same chips."""
    for n in MORE:
        case(name, "v5e-16", n)
    found = {n: case(name, f"v5e-{n}", int(PER_CHIP[name] * n)) for n in CHIPS}
    bounds = {n: max(one["seconds"].values()) for n, one in found.items() if one["fits"]}
    first = bounds[min(bounds)]
    print(f"{name}: " + ", ".join(f"{n} chips {first / t:.0%}" for n, t in bounds.items()), flush=True)


def growth(kept: dict[str, Any]) -> str:
    """What a device computes, moves and sends in a step: with as many candidates to a chip on more and more chips, and
    with more and more candidates on the same chips."""
    lines = ["| | N | mesh | TFLOP | GB moved | GB sent | limit, ms | against the first |",
             "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: |"]  # fmt: skip
    found = {(c["model"], c["topology"], c["candidates"]): c for c in kept["cases"]}
    for name in MODELS:
        weak = [(f"v5e-{n}", int(PER_CHIP[name] * n)) for n in CHIPS]
        more = [("v5e-16", n) for n in MORE]
        for rows in (weak, more):
            cases = [(place, n, found[name, place, n]) for place, n in rows if (name, place, n) in found]
            cases = [one for one in cases if one[2]["fits"]]
            for place, n, one in cases if len(cases) > 1 else []:
                sent = sum(kind["bytes_sent"] for kind in one["collectives"].values())
                own, first = (max(c["seconds"].values()) for c in (one, cases[0][2]))
                # Of a candidate where their number grows beside the same chips.
                share = first / own if rows is weak else first * n / (own * cases[0][1])
                lines.append(
                    f"| {name}, {place} | {n} | {one['mesh']} | {_short(one['flops'] / 1e12)} "
                    f"| {_short(one['bytes'] / 1e9)} | {_short(sent / 1e9)} | {_short(1000 * own)} ({one['bound']}) "
                    f"| {share:.2f} |"
                )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
