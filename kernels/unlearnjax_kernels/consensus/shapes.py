"""Shapes that the tests and the benchmarks of `consensus` share: those of `ties`, which sees the same deltas."""

from unlearnjax_kernels.ties.shapes import LARGE, SMALL

__all__ = ["LARGE", "SMALL"]
