"""The merge kernels alone, every back end that runs here, in copies of their input.

    python benchmarks/kernels.py --out benchmarks/results/kernels_cpu.json

On the shapes of `unlearnjax_kernels.*.shapes.LARGE`, in float32 and bfloat16: XLA everywhere, Pallas on a TPU, and for
whole thresholds numpy's quickselect on a CPU, which is what a call of `merge` uses there. "Copy" is as in
merge_memory.py. A counting pass (`hits`) reads its input once; a search (`kth_magnitude`) takes several.
"""

import argparse
import functools
from collections.abc import Callable, Iterator
from typing import Any

import _common as bench


def jobs(dtype: str, smoke: bool) -> Iterator[tuple[str, str, Any, dict[str, Callable[[], Any]]]]:
    """(kernel, shape's name, input, {back end: what to time})"""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from unlearnjax_kernels.consensus import api as consensus
    from unlearnjax_kernels.dare import api as dare
    from unlearnjax_kernels.dare import shapes as dare_shapes
    from unlearnjax_kernels.threshold import api as threshold
    from unlearnjax_kernels.threshold import host
    from unlearnjax_kernels.threshold import shapes as threshold_shapes
    from unlearnjax_kernels.ties import elect_mean
    from unlearnjax_kernels.ties import shapes as ties_shapes

    backends = ["xla", "pallas"] if jax.default_backend() == "tpu" else ["xla"]

    def timed(call: Callable[..., Any], x: Any, *rest: Any) -> dict[str, Callable[[], Any]]:
        def program(implementation: str) -> Callable[[], Any]:
            compiled = jax.jit(lambda x, *rest: call(x, *rest, implementation=implementation))
            return lambda: compiled(x, *rest)

        return {name: program(name) for name in backends}

    def normal(shape: tuple[int, ...]) -> Any:
        return jax.random.normal(jax.random.key(0), tuple(shape) if not smoke else (*shape[:-1], 1 << 12), dtype)

    for name, (shape,) in threshold_shapes.LARGE.items():
        x = normal(shape)
        size = x[0].size
        pivots = jnp.tile(jnp.asarray([[0.5, 1.0, 1.5, 2.0]], jnp.float32).view(jnp.uint32), (x.shape[0], 1))
        yield "threshold.hits", name, x, timed(threshold.hits, x, pivots)
        search = timed(functools.partial(threshold.kth_magnitude, k=size // 5), x)
        if jax.default_backend() == "cpu":
            keep = np.tile(np.asarray(threshold.to_limbs(size // 5)), (x.shape[0], 1))
            search["numpy quickselect"] = lambda x=x, keep=keep: host.found([np.asarray(x)], keep).low
        yield "threshold.kth_magnitude", name, x, search
    for name, shape in ties_shapes.LARGE.items():
        x = normal(shape)
        ones = jnp.ones(x.shape[0], jnp.float32)
        limits = jnp.full(x.shape[0], np.float32(1.28).view(np.uint32), jnp.uint32)
        yield "ties.elect_mean", name, x, timed(elect_mean, x, limits, ones, ones, ones)
        yield "consensus", name, x, timed(consensus.consensus, x, ones, jnp.int32(x.shape[0]))
    for name, shape in dare_shapes.LARGE.items():
        x = normal(shape)
        seed = jnp.asarray([1, 2], jnp.uint32)
        yield "dare.drop", name, x, timed(dare.drop, x, seed, jnp.uint32(0), jnp.float32(0.2))


def measure(repeats: int, smoke: bool) -> list[dict[str, Any]]:
    from unlearnjax.bench.merging import copier
    from unlearnjax.bench.timing import laps, spread

    found = []
    for dtype in ("float32", "bfloat16"):
        for kernel, shape, x, ways in jobs(dtype, smoke):
            seconds = laps({"copy": copier(x), **ways}, repeats)
            for backend in ways:
                over = [a / b for a, b in zip(seconds[backend], seconds["copy"], strict=True)]
                found.append({
                    "kernel": kernel, "shape": shape, "dtype": dtype, "backend": backend,
                    "seconds": spread(seconds[backend]), "over_copy": spread(over),
                    "input_gb_per_second": float(f"{x.nbytes / spread(seconds[backend])['median'] / 1e9:.4g}"),
                })  # fmt: skip
                bench._note(f"{kernel} {shape} {dtype} {backend}: {found[-1]['over_copy']['median']} copies")
    return found


def main() -> None:
    p = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    p.add_argument("--repeats", type=int, default=9)
    p.add_argument("--quick", action="store_true", help="a smoke run: small arrays, figures mean nothing")
    p.add_argument("--out", help="write the whole result to this JSON file")
    a = p.parse_args()
    result = {
        "benchmark": "kernels",
        "hardware": bench.in_child(bench.hardware),
        "kernels": bench.in_child(measure, 1 if a.quick else a.repeats, a.quick),
    }
    for one in result["kernels"]:
        bench.emit(one)
    bench.write(a.out, result)


if __name__ == "__main__":
    main()
