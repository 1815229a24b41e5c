"""What the benchmarks share: the machine's description, children that are measured lap by lap, and JSON out."""

import argparse
import json
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "torch", "transformers", "peft")


class Measured(NamedTuple):
    """One child's answers: about its set-up, one per lap, and at the end."""

    info: dict[str, Any]
    laps: list[Any]
    after: dict[str, Any]


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def hardware() -> dict[str, Any]:
    """The machine and the versions; starts JAX, so call it in a child."""
    import jax

    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    device = jax.devices()[0]
    return {
        "cpu": _cpu_model(),
        "cores": cores(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "platform": device.platform,
        "device": device.device_kind,
        "devices": jax.device_count(),
        "python": platform.python_version(),
        "versions": versions,
        "glibc_tunables": os.environ.get("GLIBC_TUNABLES"),
        # Well above 0 before the start: something else was running, and the figures are noise.
        "load_average_before": round(os.getloadavg()[0], 2),
    }


def peak_rss_mib() -> float:
    """The most memory that this process has held so far; compiling counts too."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(most / (2**20 if sys.platform == "darwin" else 2**10), 1)


def jax_peak_mib() -> float | None:
    """The most memory that JAX has held on an accelerator so far; None on a CPU, which does not count it."""
    import jax

    stats = jax.devices()[0].memory_stats()
    return None if not stats or "peak_bytes_in_use" not in stats else round(stats["peak_bytes_in_use"] / 2**20, 1)


def memory(device_mib: float | None = None) -> dict[str, float | None]:
    """This process's peaks so far; `device_mib` where it is not JAX that holds the accelerator's memory."""
    return {"peak_rss_mib": peak_rss_mib(), "device_peak_mib": device_mib}


def clock(work: Callable[[], Any]) -> float:
    """Seconds of `work`, which must wait for its own result."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def matmul_rates(multiply: Callable[[tuple[int, int, int]], Callable[[], Any]], shapes: Mapping[str, Any]) -> Any:
    """A function that measures GFLOP/s of products [m, k] x [k, n], the best of five each.

    Args:
      multiply: makes, for (m, k, n), a function that multiplies and waits.
      shapes: name -> (m, k, n).
    """
    made = {name: multiply(shape) for name, shape in shapes.items()}
    for work in made.values():
        work()

    def measure() -> dict[str, float]:
        flops = {name: 2 * m * k * n for name, (m, k, n) in shapes.items()}
        return {name: flops[name] / min(clock(work) for _ in range(5)) / 1e9 for name, work in made.items()}

    return measure


def jax_matmul(dtype: str) -> Callable[[tuple[int, int, int]], Callable[[], Any]]:
    """`multiply` for `matmul_rates`, in JAX."""
    import jax
    import jax.numpy as jnp

    # float32 means float32 here as in the models, on accelerators too.
    exact = jax.lax.Precision.HIGHEST if dtype == "float32" else jax.lax.Precision.DEFAULT

    def multiply(shape: tuple[int, int, int]) -> Callable[[], Any]:
        m, k, n = shape
        a, b = jnp.ones((m, k), dtype), jnp.ones((k, n), dtype)
        product = jax.jit(lambda a, b: jnp.matmul(a, b, precision=exact))
        return lambda: product(a, b).block_until_ready()

    return multiply


def _serve(pipe: Any, setup: Callable[..., Any], args: Sequence[Any]) -> None:
    info, answer = setup(*args)
    pipe.send(info)
    for question in iter(pipe.recv, None):
        pipe.send(answer(question))


class _Child:
    """A process that sets one thing up and then answers questions about it."""

    def __init__(self, name: str, setup: Callable[..., Any], args: Sequence[Any]) -> None:
        context = multiprocessing.get_context("spawn")
        self.name = name
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, setup, args), daemon=True)
        self.process.start()
        theirs.close()
        self.info = self._receive()

    def _receive(self) -> Any:
        try:
            return self.pipe.recv()
        except EOFError:
            raise SystemExit(f"benchmark: the process of {self.name!r} failed; its error is above") from None

    def ask(self, question: str) -> Any:
        self.pipe.send(question)
        return self._receive()

    def close(self) -> None:
        self.pipe.send(None)
        self.process.join()


def answers(lap: Callable[[], Any], after: Callable[[], Mapping[str, Any]]) -> Callable[[str], Any]:
    """What a job's setup returns for `measure` to ask: its laps, and what there is to say after them."""
    return lambda question: lap() if question == "lap" else after()


_START = time.perf_counter()


def _note(text: str) -> None:
    """Progress on standard error, with the seconds since the start."""
    print(f"[{time.perf_counter() - _START:5.0f} s] {text}", file=sys.stderr, flush=True)


def measure(jobs: Mapping[str, tuple[Callable[..., Any], Sequence[Any]]], laps: int, together: bool) -> dict[str, Any]:
    """Set each job up in a process of its own and take its laps in turn with the others'.

    Only one process works at a time. Turn by turn, whatever slows the machine for a while slows all jobs, so that the
    ratio of two jobs' laps of the same number is fair.

    Args:
      jobs: name -> (setup, arguments); setup returns its info and a function that answers `lap` and `after`.
      laps: how many of each.
      together: keep all processes alive at once; otherwise (memory of an accelerator) one job after another.

    Returns:
      name -> Measured.
    """
    done: dict[str, Measured] = {}
    for group in [list(jobs)] if together else [[name] for name in jobs]:
        children = []
        for name in group:
            _note(f"setting up: {name}")
            children.append(_Child(name, *jobs[name]))
        taken: list[list[Any]] = [[] for _ in children]
        for lap in range(laps):
            for child, mine in zip(children, taken):
                _note(f"lap {lap + 1} of {laps}: {child.name}")
                mine.append(child.ask("lap"))
        for child, mine in zip(children, taken):
            done[child.name] = Measured(child.info, mine, child.ask("after"))
            child.close()
    return done


def in_child(function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)` in a process of its own, so that this one never starts JAX or torch."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def spread(values: Sequence[float], digits: int = 3) -> dict[str, float]:
    """Median, least and most, to `digits` significant digits."""
    shown = {"median": statistics.median(values), "least": min(values), "most": max(values)}
    return {name: float(f"{value:.{digits}g}") for name, value in shown.items()}


def ratio(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """The spread of the ratios lap by lap."""
    return spread([a / b for a, b in zip(above, below, strict=True)])


def emit(line: Mapping[str, Any]) -> None:
    """One JSON line on standard output."""
    print(json.dumps(line), flush=True)


def write(out: str | None, result: Mapping[str, Any]) -> None:
    """The whole result as one JSON file, where one was asked for."""
    if out is None:
        return
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    beside.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    beside.replace(path)


def common_arguments(description: str) -> argparse.ArgumentParser:
    """The arguments that all benchmarks take."""
    p = argparse.ArgumentParser(description=description)
    p.add_argument("--forget", help="rows to forget (JSONL, parquet or a hub dataset); without it, rows are made up")
    p.add_argument("--retain", help="rows to retain; goes with --forget")
    p.add_argument("--tokenizer", help="a tokenizer.json; default: one is trained on the rows")
    p.add_argument("--size", help="the model: small (the default) or olmo-1b", default="small")
    p.add_argument("--dtype", default="float32", help="of the base weights")
    p.add_argument("--device", help="cpu, gpu or tpu; default: what JAX finds")
    p.add_argument("--laps", type=int, help="repeats of each measurement")
    p.add_argument("--quick", action="store_true", help="a smoke run: a tiny model, one lap, figures that mean nothing")
    p.add_argument("--out", help="write the whole result to this JSON file")
    return p


def parse(p: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse, and choose the device for this process's children."""
    a = p.parse_args()
    if (a.forget is None) != (a.retain is None):
        p.error("--forget and --retain go together")
    if a.laps is not None and a.laps < 1:
        p.error(f"--laps must be at least 1, not {a.laps}")
    if a.device is not None:
        os.environ["JAX_PLATFORMS"] = {"gpu": "cuda"}.get(a.device, a.device)
    # A GPU's memory is shared by the children, and its peak is to be seen.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    # As the command line starts itself (unlearnjax/cli/huge_pages.py), and so for all sides of a comparison.
    os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    return a
