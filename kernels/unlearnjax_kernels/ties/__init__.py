"""TIES after the thresholds are known: trim, elect a sign, average what agrees, in one pass."""

from unlearnjax_kernels.ties.api import elect_mean

__all__ = ["elect_mean"]
